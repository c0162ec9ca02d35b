"""The bare example publishes events, which it consumes itself, as the order service does."""

import re
import socket
import sys
from functools import partial

import pytest

from chaos.checks import becomes, passes, true
from chaos.rig import Rig
from servers.services import Service
from servers.wait import eventually


def start(rig: Rig, url: str) -> Service:
    command = [sys.executable, "example1.py"]
    return rig.start("example1", command=command, wait=False, RABBITMQ_URL=url)


def published(example1: Service) -> set[str]:
    return set(re.findall(r"^published (\S+)", example1.output(), re.MULTILINE))


def consumed(example1: Service) -> int:
    """Return how many of its own events it has consumed."""
    found = re.findall(r'^consumed .*"id": "([^"]+)"', example1.output(), re.MULTILINE)
    return len(published(example1) & set(found))


def test_it_and_the_order_service_consume_what_it_publishes(rig: Rig) -> None:
    """It survives a message that is no event, and a lost connection. Its queue ends with it."""
    example1 = start(rig, rig.servers.rabbitmq.url)
    order = rig.start("order")
    passes(partial(consumed, example1), 1)
    passes(lambda: len(rig.store.done("order") & published(example1)), 0)
    rig.broker.publish_raw(b"\xff not json")
    eventually(lambda: true("not json" in example1.output()))
    rig.servers.rabbitmq.ctl("close_all_connections", "closed by the test")
    eventually(lambda: true("no connection to RabbitMQ" in example1.output()))
    passes(partial(consumed, example1), consumed(example1))
    queues = len(rig.broker.queues())
    assert [example1.terminate(10), order.terminate(10)] == [0, 0]
    becomes(lambda: len(rig.broker.queues()), queues - 1)
    assert rig.store.done("order") <= published(example1)


def test_it_ends_although_the_broker_does_not_answer(rig: Rig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        example1 = start(rig, f"amqp://127.0.0.1:{mute.getsockname()[1]}/")
        mute.settimeout(30)
        connection, _ = mute.accept()
        with connection:
            assert connection.recv(4) == b"AMQP"
            assert example1.terminate(10) == 0


@pytest.mark.parametrize(
    "rest", [":x/", "/?ssl_options=[]", "/?ssl_options={", "/?ssl_options={'ca_certs':'/no/such'}"]
)
def test_it_explains_a_wrong_url(rig: Rig, rest: str) -> None:
    """In one line, without the password, and with exit code 2, as the services do."""
    example1 = start(rig, f"amqp://guest:hunter2@localhost{rest}")
    assert example1.wait_end() == 2
    said = example1.output()
    assert (said.count("\n"), said[-1:], "hunter2" in said) == (1, "\n", False)
    assert "RABBITMQ_URL" in said
