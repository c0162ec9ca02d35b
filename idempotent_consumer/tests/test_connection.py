"""How soon a lost connection is followed by another."""

from __future__ import annotations

from typing import Any

import pytest
import structlog
from structlog.testing import LogCapture

from fakes.amqp import Broker, Loop
from idempotent_consumer.bus.connection import Connection
from idempotent_consumer.health import Health

AT_ONCE_S = 0.25
"""The longest wait after a first failure."""

TIMES = 30


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def broker(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> Broker:
    """Give a broker that a connection is being opened to; it is ready as soon as it is open."""
    broker = Broker.reached(loop, monkeypatch)
    log: Any = structlog.wrap_logger(None, processors=[LogCapture()])
    connection = Connection(
        "rabbitmq",
        ["amqp://h/"],
        loop,  # type: ignore[arg-type]
        Health(),
        log,
        lambda _: connection.ready(),
        lambda: None,
    )
    connection.open()
    return broker


def hold(loop: Loop, broker: Broker, seconds: float) -> float:
    """Let the connection be there for so long, then another begin; return the wait between."""
    broker.connection.accept()
    loop.advance(seconds)
    broker.connection.lose()
    return wait(loop)


def wait(loop: Loop) -> float:
    """Wait for the next connection's beginning; return for how long."""
    due_s, now_s = loop.next_timer_s, loop.now_s()
    assert due_s is not None
    loop.advance(due_s - now_s)
    return due_s - now_s


def test_a_connection_that_held_is_followed_by_another_at_once(loop: Loop, broker: Broker) -> None:
    assert max(hold(loop, broker, 11) for _ in range(TIMES)) <= AT_ONCE_S


def test_connections_that_do_not_hold_follow_each_other_ever_more_slowly(
    loop: Loop, broker: Broker
) -> None:
    """Each of them costs every delivery in hand one of its returns."""
    assert max(hold(loop, broker, 9) for _ in range(TIMES)) > 4 * AT_ONCE_S
    assert hold(loop, broker, 11) <= AT_ONCE_S


def test_a_broker_that_refuses_is_asked_ever_more_slowly(loop: Loop, broker: Broker) -> None:
    """Also when the connection before had held."""
    hold(loop, broker, 11)
    waits_s = []
    for _ in range(TIMES):
        broker.connection.refuse()
        waits_s.append(wait(loop))
    assert max(waits_s) > 4 * AT_ONCE_S
