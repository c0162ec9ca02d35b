"""The bare example: it publishes, it consumes what it published, and so does the order service."""

import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos.checks import passes
from chaos.rig import Rig
from servers.broker import Broker
from servers.processes import Child
from servers.servers import REPOSITORY, Servers
from servers.services import environment
from servers.wait import eventually


@pytest.fixture
def example1(clean: Servers, tmp_path: Path) -> Iterator[Child]:
    """Run example1 against the broker."""
    child = Child(
        [sys.executable, "example1.py"],
        env={**environment(), "RABBITMQ_URL": clean.rabbitmq.url},
        cwd=REPOSITORY / "example1",
        log=tmp_path / "example1.log",
    )
    child.start()
    yield child
    if child.running:
        child.kill()


def published(child: Child) -> set[str]:
    """Return the ids that it says it has published."""
    return set(re.findall(r"^published (\S+)", child.output(), re.MULTILINE))


def consumed(child: Child) -> set[str]:
    """Return the ids that it says it has consumed."""
    return set(re.findall(r'^consumed .*"id": "([^"]+)"', child.output(), re.MULTILINE))


def test_example1_and_the_order_service_consume_what_it_publishes(
    rig: Rig, example1: Child
) -> None:
    """Two consumers that never hear of each other; SIGTERM ends it with exit code 0."""
    rig.start("order")
    passes(lambda: len(published(example1)), 1)

    def both_consumed() -> None:
        assert consumed(example1) >= published(example1)
        assert len(rig.store.done("order")) >= 1

    eventually(both_consumed)
    assert example1.terminate(10) == 0
    assert rig.store.done("order") <= published(example1)


def test_example1_goes_on_after_a_strange_message_and_a_lost_connection(
    rig: Rig, example1: Child
) -> None:
    """It shows what is no event, says that its connection is lost, and makes a new one."""
    passes(lambda: len(consumed(example1)), 0)
    rig.broker.publish_raw(b"\xff not json")
    passes(lambda: example1.output().count("not json"), 0)
    rig.servers.rabbitmq.ctl("close_all_connections", "closed by the test")
    eventually(lambda: _assert_lost(example1))
    before = consumed(example1)
    passes(lambda: len(consumed(example1)), len(before))
    assert example1.terminate(10) == 0
    # Its queue is its own: exclusive, and gone with it.
    eventually(lambda: _assert_no_queue(rig.broker))


def test_example1_ends_beside_a_broker_that_does_not_answer(tmp_path: Path) -> None:
    """Once it has connected to one that says nothing, and is asked to stop."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        child = Child(
            [sys.executable, "example1.py"],
            env={**environment(), "RABBITMQ_URL": f"amqp://127.0.0.1:{mute.getsockname()[1]}/"},
            cwd=REPOSITORY / "example1",
            log=tmp_path / "example1.log",
        )
        child.start()
        mute.settimeout(10)
        connection, _ = mute.accept()
        with connection:
            assert connection.recv(4) == b"AMQP"
            assert child.terminate(10) == 0


def _assert_lost(example1: Child) -> None:
    if "no connection to RabbitMQ" not in example1.output():
        raise AssertionError("it has not noticed")


def _assert_no_queue(broker: Broker) -> None:
    if queues := broker.queues():
        raise AssertionError(f"left behind: {queues}")
