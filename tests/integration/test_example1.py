"""The bare example: it publishes, it consumes what it published, and so does the order service."""

import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chaos.checks import becomes, passes, true
from chaos.rig import Rig
from servers.processes import Child
from servers.servers import REPOSITORY
from servers.services import environment
from servers.wait import eventually

StartExample = Callable[[str], Child]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartExample]:
    """Start example1 with a broker's URL."""
    started = []

    def start(url: str) -> Child:
        child = Child(
            [sys.executable, "example1.py"],
            env={**environment(), "RABBITMQ_URL": url},
            cwd=REPOSITORY / "example1",
            log=tmp_path / "example1.log",
        )
        child.start()
        started.append(child)
        return child

    yield start
    for child in started:
        child.kill()


def published(child: Child) -> set[str]:
    """Return the ids that it says it has published."""
    return set(re.findall(r"^published (\S+)", child.output(), re.MULTILINE))


def consumed(child: Child) -> set[str]:
    """Return the ids that it says it has consumed."""
    return set(re.findall(r'^consumed .*"id": "([^"]+)"', child.output(), re.MULTILINE))


def test_it_and_the_order_service_consume_what_it_publishes(rig: Rig, start: StartExample) -> None:
    """Two consumers that never hear of each other; SIGTERM ends it with exit code 0."""
    example1 = start(rig.servers.rabbitmq.url)
    rig.start("order")
    passes(lambda: len(published(example1)), 1)

    def both_consumed() -> None:
        assert consumed(example1) >= published(example1)
        assert len(rig.store.done("order")) >= 1

    eventually(both_consumed)
    assert example1.terminate(10) == 0
    becomes(lambda: rig.store.done("order") <= published(example1), expected=True)


def test_it_goes_on_after_a_strange_message_and_a_lost_connection(
    rig: Rig, start: StartExample
) -> None:
    """It shows what is no event, says that its connection is lost, and makes a new one."""
    example1 = start(rig.servers.rabbitmq.url)
    passes(lambda: len(consumed(example1)), 0)
    rig.broker.publish_raw(b"\xff not json")
    eventually(lambda: true("not json" in example1.output()))
    rig.servers.rabbitmq.ctl("close_all_connections", "closed by the test")
    eventually(lambda: true("no connection to RabbitMQ" in example1.output()))
    passes(lambda: len(consumed(example1)), len(consumed(example1)))
    assert example1.terminate(10) == 0
    # Its queue is its own: exclusive, and gone with it.
    becomes(rig.broker.queues, [])


def test_it_ends_beside_a_broker_that_does_not_answer(start: StartExample) -> None:
    """Once it has connected to one that says nothing, and is asked to stop."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        example1 = start(f"amqp://127.0.0.1:{mute.getsockname()[1]}/")
        mute.settimeout(30)
        connection, _ = mute.accept()
        with connection:
            assert connection.recv(4) == b"AMQP"
            assert example1.terminate(10) == 0


@pytest.mark.parametrize(
    "rest", [":x/", "/?ssl_options=[]", "/?ssl_options={", "/?ssl_options={'ca_certs':'/no/such'}"]
)
def test_it_explains_a_wrong_url(start: StartExample, rest: str) -> None:
    """In one line that gives no password away, with exit code 2, as the services do."""
    example1 = start(f"amqp://guest:hunter2@localhost{rest}")
    becomes(lambda: example1.exit_code, 2)
    said = example1.output()
    assert (said.count("\n"), said[-1:]) == (1, "\n")
    assert "RABBITMQ_URL" in said
    assert "hunter2" not in said
