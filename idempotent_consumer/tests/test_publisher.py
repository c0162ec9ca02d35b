"""What is sent again, and as what."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import structlog
from structlog.testing import LogCapture

from fakes.amqp import Broker, Loop
from idempotent_consumer.bus.publisher import Message, Publisher
from idempotent_consumer.health import Health

WHOLE, BARE = object(), object()


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def broker(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> Broker:
    return Broker.reached(loop, monkeypatch)


@pytest.fixture
def health() -> Health:
    return Health()


@pytest.fixture
def publisher(loop: Loop, broker: Broker, health: Health) -> Publisher:
    """Give a publisher that is connected."""
    log: Any = structlog.wrap_logger(None, processors=[LogCapture()])
    publisher = Publisher(
        ("amqp://localhost/",),
        lambda _: None,
        loop,  # type: ignore[arg-type]
        health,
        log,
    )
    publisher.open()
    broker.connection.accept()
    return publisher


def message() -> Message:
    return Message("", "order.retry.1s", b"{}", WHOLE, BARE, lambda: True, lambda: None)


def test_a_nacked_message_is_sent_again_with_all_its_properties(
    loop: Loop, broker: Broker, publisher: Publisher
) -> None:
    """A queue without a leader nacks for a while; it says nothing of the message."""
    publisher.publish(message())
    for number in range(1, 6):
        broker.channel.nack(number)
        loop.advance(5)
    assert broker.sent == [WHOLE] * 6
    assert len(broker.connections) == 1


def test_a_message_that_channels_are_lost_with_is_sent_bare(
    loop: Loop, broker: Broker, publisher: Publisher
) -> None:
    publisher.publish(message())
    for _ in range(3):
        broker.connection.lose()
        loop.advance(5)
        broker.connection.accept()
    assert broker.sent == [WHOLE, WHOLE, WHOLE, BARE]


def test_a_message_without_a_confirm_is_sent_again_on_another_connection(
    loop: Loop, broker: Broker, publisher: Publisher, health: Health
) -> None:
    publisher.publish(message())
    loop.advance(9)
    assert broker.connection.is_open
    loop.advance(3)
    assert [connection.is_closed for connection in broker.connections] == [True, False]
    assert health.missing == {"rabbitmq-publishing": "no confirm within 10 s"}
    broker.connection.accept()
    assert broker.sent == [WHOLE, WHOLE]
    assert health.missing == {}


def test_a_confirmed_message_waits_for_nothing_more(
    loop: Loop, broker: Broker, publisher: Publisher
) -> None:
    publisher.publish(message())
    broker.channel.ack(1)
    loop.advance(60)
    assert broker.connection.is_open
    assert broker.sent == [WHOLE]


def test_during_an_alarm_no_confirm_is_late_and_after_it_each_has_its_whole_time(
    loop: Loop, broker: Broker, publisher: Publisher
) -> None:
    """The broker has not read the message, and needs a moment when it reads on."""
    publisher.publish(message())
    loop.advance(5)
    broker.connection.alarm()
    loop.advance(60)
    assert broker.connection.is_open
    broker.connection.alarm_ends()
    loop.advance(9)
    assert broker.connection.is_open
    loop.advance(3)
    assert [connection.is_closed for connection in broker.connections] == [True, False]


class Wanted:
    """Whether a message is still wanted."""

    yet = True

    def __call__(self) -> bool:
        return self.yet


def test_what_nobody_wants_any_more_is_not_kept_until_a_broker_is_there(
    loop: Loop, broker: Broker, publisher: Publisher
) -> None:
    """It would be for ever, with its body, where an application tries again and again."""
    wanted = Wanted()
    broker.connection.lose()
    publisher.publish(Message("", "order", b"{}", WHOLE, BARE, wanted, lambda: None))
    wanted.yet, kept = False, weakref.ref(wanted)
    del wanted
    assert kept() is not None
    loop.advance(2)
    assert kept() is None
