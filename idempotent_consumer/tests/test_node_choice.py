"""Which of several RabbitMQ nodes a connection is opened to, and how soon a lost one is noticed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from idempotent_consumer.bus import frames
from idempotent_consumer.bus.connection import (
    KEEPALIVE,
    TCP_OPTIONS,
    Connection,
    parameters_of,
)
from idempotent_consumer.bus.loop import PikaLoop
from idempotent_consumer.bus.publisher import Publisher
from idempotent_consumer.health import Health

NODES = ["a", "b", "c"]


class Opened:
    """The nodes that connections were opened to, in their order; none of them answers."""

    def __init__(self) -> None:
        self.nodes: list[str] = []
        self.loop = PikaLoop()

    def open(self, parameters: Any, **_: object) -> object:
        """Take the place of pika's connection."""
        self.nodes.append(parameters.host)
        return object()

    def to(self, nodes: list[str]) -> Connection:
        """Make a connection to one of these."""
        return Connection(
            "rabbitmq",
            [f"amqp://{node}/" for node in nodes],
            self.loop,
            Health(),
            structlog.get_logger(),
            lambda _: None,
            lambda: None,
        )


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    """Open no connection, and note where to."""
    noted = Opened()
    monkeypatch.setattr(frames, "Connection", noted.open)
    yield noted
    noted.loop.ioloop.close()


def test_each_node_is_tried_before_any_is_tried_again(opened: Opened) -> None:
    tried = opened.to(NODES)
    for turn in range(50):
        for _ in NODES:
            tried.open()
        assert sorted(opened.nodes[3 * turn :]) == NODES


def test_the_node_that_was_lost_is_never_the_next(opened: Opened) -> None:
    tried = opened.to(NODES)
    for _ in range(300):
        tried.open()
    assert all(one != other for one, other in zip(opened.nodes, opened.nodes[1:], strict=False))


def test_the_first_node_is_a_random_one(opened: Opened) -> None:
    for _ in range(100):
        opened.to(NODES).open()
    assert set(opened.nodes) == set(NODES)


@pytest.mark.parametrize("nodes", [["a"], ["a", "b"]])
def test_one_node_or_two_are_tried_in_turn(opened: Opened, nodes: list[str]) -> None:
    tried = opened.to(nodes)
    for _ in range(20):
        tried.open()
    assert all(set(opened.nodes[at : at + len(nodes)]) == set(nodes) for at in range(18))


def test_a_node_that_vanishes_is_noticed_by_tcp_unless_the_url_says_otherwise() -> None:
    assert parameters_of("amqp://h/", "test").tcp_options == TCP_OPTIONS
    other = parameters_of("amqp://h/?tcp_options={'TCP_USER_TIMEOUT':1000}", "test")
    assert other.tcp_options == {"TCP_USER_TIMEOUT": 1000}


def test_a_publisher_outlasts_an_alarm_in_which_the_broker_does_not_read() -> None:
    loop = PikaLoop()
    publisher = Publisher(["amqp://h/"], lambda _: None, loop, Health(), structlog.get_logger())
    loop.close()
    (parameters,) = publisher._connection._parameters
    assert parameters.tcp_options == KEEPALIVE
    assert "TCP_USER_TIMEOUT" not in KEEPALIVE


def test_the_log_names_the_node(opened: Opened) -> None:
    with structlog.testing.capture_logs() as logs:
        tried = opened.to(["a"])
        tried.open()
        tried.ready()
    assert [(line["event"], line["node"]) for line in logs] == [("connected to RabbitMQ", "a:5672")]
