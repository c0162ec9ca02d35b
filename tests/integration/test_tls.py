"""TLS to both servers, with certificates on both sides; and what a wrong one looks like."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos.checks import (
    becomes,
    lines,
    not_ready,
    says,
    throughout,
    true,
)
from chaos.hosts import Hosts
from chaos.load import ids, orders, repeated
from chaos.outages import alarm
from chaos.rig import Rig
from integration.containers import Authority, TlsServers, start_tls_servers
from servers.servers import docker_available
from servers.services import Service
from servers.wait import eventually

_WATCHED_S = 4.0


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsServers]:
    """Give servers that want TLS in the place of the plain ones."""
    if not docker_available():
        pytest.skip("servers with TLS need Docker, which does not answer")
    with start_tls_servers(tmp_path_factory.mktemp("tls")) as running:
        yield running


def test_events_are_handled_once_over_tls(rig: Rig) -> None:
    """Both connections to the broker show the client's certificate, and nothing is done twice."""
    rig.start("order")
    listed = rig.servers.rabbitmq.ctl(
        "list_connections", "--no-table-headers", "ssl", "peer_cert_subject"
    )
    assert [line.split() for line in listed.splitlines()] == [["true", "CN=order"]] * 2
    events = orders(300)
    confirmed = rig.broker.publish(repeated(events, 2))
    becomes(lambda: rig.store.done("order"), ids(events))
    rig.handled_once("order", events, confirmed)


BROKER = {
    "another authority": ("certificate verify failed", {"RABBITMQ_CA_CERT": "{other}"}),
    "another name": (
        "certificate is not valid for 'elsewhere.example'",
        {"RABBITMQ_URL": "amqps://guest:guest@elsewhere.example:{amqps}/"},
    ),
    "no certificate": ("certificate", {"RABBITMQ_CERT": "", "RABBITMQ_KEY": ""}),
    "a wrong password": (
        "refuses the user or the password",
        {"RABBITMQ_URL": "amqps://guest:no@127.0.0.1:{amqps}/"},
    ),
}
ETCD = {
    "another authority": ("not from the authority", {"ETCD_CA_CERT": "{other}"}),
    "another name": ("other names", {"ETCD_ENDPOINTS": "https://elsewhere.example:{https}"}),
    "no certificate": ("ETCD_CERT", {"ETCD_CERT": "", "ETCD_KEY": ""}),
    "no TLS": (
        "ETCD_CA_CERT",
        {
            "ETCD_ENDPOINTS": "127.0.0.1:{https}",
            "ETCD_CA_CERT": "",
            "ETCD_CERT": "",
            "ETCD_KEY": "",
        },
    ),
}


@pytest.mark.parametrize(
    ("missing", "why", "wrong"),
    [
        *(pytest.param("rabbitmq", *case, id=f"broker, {name}") for name, case in BROKER.items()),
        *(pytest.param("etcd", *case, id=f"etcd, {name}") for name, case in ETCD.items()),
    ],
)
def test_what_is_wrong_is_said_and_waited_for(
    rig: Rig,
    servers: TlsServers,
    tmp_path: Path,
    missing: str,
    why: str,
    wrong: dict[str, str],
) -> None:
    """Alive, not ready, one clear reason, no busy loop, and nothing is consumed."""
    assert rig.start("order").terminate(10) == 0
    events = orders(20)
    rig.broker.publish(events)
    other = Authority(tmp_path / "other").certificate
    settings = {
        name: text.format(other=other, amqps=servers.amqps_port, https=servers.https_port)
        for name, text in wrong.items()
    }
    hosts = Hosts(tmp_path)
    hosts.point("elsewhere.example", "127.0.0.1")
    service = rig.start("order", wait=False, **settings, **hosts.settings())

    def explained() -> None:
        reason = not_ready(service, missing)[missing]
        assert re.search(why, reason, re.IGNORECASE), reason
        assert "\n" not in reason

    eventually(explained, also=(OSError,))
    before_s = _processor_s(service)
    throughout(_WATCHED_S, explained)
    assert _processor_s(service) - before_s < _WATCHED_S / 4, "a busy loop"
    assert rig.broker.depth("order") == (len(events), 0)
    assert len(lines(service, "no connection to RabbitMQ")) < 5 * _WATCHED_S


def _processor_s(service: Service) -> float:
    """Return how long a process has run on any processor (proc_pid_stat(5), utime and stime)."""
    fields = Path(f"/proc/{service.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_no_more_is_read_over_tls_while_too_much_is_in_flight(rig: Rig) -> None:
    """pika reads on by itself as long as TLS has decrypted something. The alarm keeps it."""
    assert rig.start("order").terminate() == 0
    bodies = [bytes([number]) * 15 * 1024 * 1024 for number in range(5)]
    for body in bodies:
        rig.broker.publish_raw(body)
    received = rig.statsd.count("orders_received")
    with alarm(rig.servers.rabbitmq, "memory"):
        service = rig.start("order")
        eventually(lambda: says(service, "what is in flight is large"))
        becomes(lambda: rig.statsd.count("orders_received"), received + 3)
        throughout(_WATCHED_S, lambda: true(rig.statsd.count("orders_received") == received + 3))
    assert sorted(message.body for message in rig.parked("order", len(bodies))) == bodies
    assert lines(service, "no connection to RabbitMQ") == []
