"""No output of a service or of the command contains a secret from the settings."""

import asyncio
import io
from contextlib import redirect_stderr, redirect_stdout

import pytest
from structlog.testing import LogCapture

from idempotent_consumer import Service
from idempotent_consumer.cli.command import main
from idempotent_consumer.service import Running, real_system
from idempotent_consumer.settings import Settings
from idempotent_consumer.testing.process import Counts, captured

SECRET = "s3cret"  # noqa: S105 - it is only used here.
CLOSED = "127.0.0.1:1"
KEY = f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----"
PATIENCE_S = 30.0

AMQP = [
    "http://guest:s3cret@h",
    "amqp://guest:s3cret@",
    "amqp://guest:s3cret@h:port/",
    "amqp://guest:12/s3cret@h",
    "amqp://guest:12?heartbeat=s3cret@h",
    "amqp://guest:12#s3cret@h",
    "amqp://guest:12,s3cret@h",
    "amqp://h,amqp://guest:s3cret@[",
    "amqp://guest:s3cret@h/?heartbeat=soon",
    "amqp://guest:s3cret@h/?heartbeat=0",
    "amqp://guest:s3cret@h/?socket_timeout=-1",
    "amqp://guest:s3cret@h/?unknown=1",
    "amqp://guest:s3cret@h/?channel_max=x",
    "amqp://guest:s3cret@h/?ssl_options=[]",
    "amqp://h/?heartbeat=s3cret",
    "amqp://h/?ssl_options={",
    "amqp://h/?ssl_options='s3cret'",
    "amqp://h/?ssl_options={'certfile':'/no/such','password':'s3cret'}",
    "amqps://h/?ssl_options={'password':'s3cret'}&ssl_options={'password':'s3cret'}",
    "amqp://h/?client_properties='s3cret'",
    "amqp://h/?tcp_options=['s3cret']",
    "amqp://h/?tcp_options={'TCP_KEEPIDLE':'s3cret'}",
    f"amqp://guest:s3cret@h/{'v' * 256}",
]
ETCD = [
    "http://root:s3cret@host",
    "root:s3cret@host:2379",
    "http://:s3cret@host",
    "http://root:12/s3cret@host",
    "http://root:12#s3cret@host",
    "http://root:12?s3cret@host",
    "http://root:12,s3cret@host",
    "host:2379,http://root:s3cret@[",
    "s3cret:word",
]
WRONG = {
    **{f"RABBITMQ_URL={url}"[:80]: {"RABBITMQ_URL": url} for url in AMQP},
    **{f"ETCD_ENDPOINTS={endpoint}": {"ETCD_ENDPOINTS": endpoint} for endpoint in ETCD},
    "ETCD_PASSWORD alone": {"ETCD_PASSWORD": SECRET},
    "ETCD_PASSWORD and no UTF-8": {"ETCD_USER": "root", "ETCD_PASSWORD": f"{SECRET}\udcff"},
    "ETCD_KEY, the key itself": {"ETCD_KEY": KEY},
    "RABBITMQ_KEY, the key itself": {"RABBITMQ_KEY": KEY},
    "BATCH_SIZE, a URL": {"BATCH_SIZE": "amqp://guest:s3cret@h"},
    "all right but one": {
        "RABBITMQ_URL": "amqp://guest:s3cret@h",
        "ETCD_USER": "root",
        "ETCD_PASSWORD": SECRET,
        "BATCH_SIZE": "0",
    },
}
"""Wrong settings with a secret in them, in the right place or in a wrong one."""

RIGHT = {
    "ENABLE_ETCD": "true",
    "RABBITMQ_URL": f"amqp://guest:s3cret@{CLOSED}/,amqps://guest:s3cret@{CLOSED}/?heartbeat=5",
    "RABBITMQ_MANAGEMENT_URL": f"http://guest:s3cret@{CLOSED}",
    "ETCD_ENDPOINTS": CLOSED,
    "ETCD_USER": "root",
    "ETCD_PASSWORD": SECRET,
}
"""Valid settings for servers that are absent."""


@pytest.mark.parametrize("environ", WRONG.values(), ids=WRONG)
def test_a_wrong_setting_gives_one_line_without_the_secret(environ: dict[str, str]) -> None:
    """The command prints the error's message, and so does a service (test_process.py)."""
    code, said = run(environ, "dead-letters", "list", "order")
    assert code == 2
    assert said.startswith(("RABBITMQ_", "ETCD_", "BATCH_SIZE"), len("idempotent-consumer: "))
    assert said.count("\n") == 1
    assert SECRET not in said


@pytest.mark.parametrize("more", [(), ("--json",)])
@pytest.mark.parametrize(
    "verb",
    [
        ("status", "order", "--ready", f"http://guest:s3cret@{CLOSED}"),
        ("doctor", "order"),
        ("inspect", "order", "1"),
        ("dead-letters", "list", "order"),
        ("dead-letters", "replay", "order", "--all"),
        ("publish", '{"id":"1","type":"t"}'),
        ("status", "order", "--ready", f"http://guest:s3cret@{CLOSED}:no"),
        ("status", "order", "--ready", "http://guest:1/s3cret@h"),
    ],
    ids=" ".join,
)
def test_the_command_shows_no_secret_if_a_server_is_absent(
    verb: tuple[str, ...], more: tuple[str, ...]
) -> None:
    code, said = run(RIGHT, *verb, *more)
    assert code in (1, 2)
    assert said
    assert SECRET not in said


@pytest.mark.parametrize("servers", ["rabbitmq rabbitmq-publishing", "etcd"])
def test_a_service_logs_no_secret_if_a_server_is_absent(servers: str) -> None:
    """With etcd, it is reached before RabbitMQ, so RabbitMQ is tested without it."""
    lines = LogCapture()

    async def try_in_vain() -> dict[str, str]:
        service = Service("order", "orders")
        service.handler("new_order")(lambda _: None)
        enable_etcd = str(servers == "etcd")
        settings = Settings.from_environ({**RIGHT, "ENABLE_ETCD": enable_etcd})
        running = Running(service, settings, real_system(), Counts(), captured(lines))
        at_first = dict(running.health.missing)
        task = asyncio.create_task(running.run())
        async with asyncio.timeout(PATIENCE_S):
            while any(running.health.missing[each] == at_first[each] for each in servers.split()):
                await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait({task})
        return running.health.missing

    missing = asyncio.run(try_in_vain())
    said = [line["error"] for line in lines.entries if "error" in line]
    assert {missing[server] for server in servers.split()} <= set(said)
    assert SECRET not in repr((lines.entries, missing))


@pytest.mark.parametrize(
    "url",
    [
        *("amqp://u:s3cret@h", "http://u:s3cret@h:no", "http://u:1/s3cret@h"),
        *("localhost:15672", "amqp://localhost", "http://"),
    ],
)
def test_a_wrong_url_of_the_management_api_is_not_shown(url: str) -> None:
    code, said = run({**RIGHT, "RABBITMQ_MANAGEMENT_URL": url}, "status", "order")
    assert code == 2
    assert said.startswith("idempotent-consumer: RABBITMQ_MANAGEMENT_URL: write ")
    assert SECRET not in said


def test_the_repr_of_settings_contains_no_secret() -> None:
    assert SECRET not in repr(Settings.from_environ(RIGHT))


def run(environ: dict[str, str], *arguments: str) -> tuple[int, str]:
    """Run the command on real sockets; return its exit code and its output."""
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(said):
        try:
            code = main(arguments, environ)
        except SystemExit as ended:  # Raised by argparse.
            code = int(str(ended.code))
    return code, said.getvalue()
