"""What is sent again, and as what."""

from __future__ import annotations

from typing import Any

import structlog
from pika import frame, spec
from structlog.testing import LogCapture

from idempotent_consumer.bus.publisher import Message, Publisher
from idempotent_consumer.health import Health
from idempotent_consumer.testing.loop import ManualLoop

WHOLE, BARE = object(), object()


class Channel:
    """A channel that keeps the properties of what is published on it."""

    is_open = True

    def __init__(self) -> None:
        self.sent: list[object] = []

    def basic_publish(self, *arguments: Any, **_: Any) -> None:
        """Publish."""
        self.sent.append(arguments[3])


def start(loop: ManualLoop, channel: Channel) -> Publisher:
    log: Any = structlog.wrap_logger(None, processors=[LogCapture()])
    publisher = Publisher(("amqp://localhost/",), lambda _: None, loop, Health(),  # type: ignore[arg-type]
                          log)
    publisher._connection._current = publisher._connection._next()
    publisher._start(channel)
    return publisher


def message() -> Message:
    return Message("", "order.retry.1s", b"{}", WHOLE, BARE, lambda: True, lambda: None)


def test_a_nacked_message_is_sent_again_with_all_its_properties() -> None:
    """A queue without a leader nacks for a while; it says nothing of the message."""
    loop, channel = ManualLoop(), Channel()
    publisher = start(loop, channel)
    publisher.publish(message())
    for number in range(1, 6):
        publisher._on_confirm(frame.Method(1, spec.Basic.Nack(number)))
        loop.advance(10)
    assert channel.sent == [WHOLE] * 6


def test_a_message_that_channels_are_lost_with_is_sent_bare() -> None:
    loop, channel = ManualLoop(), Channel()
    publisher = start(loop, channel)
    publisher.publish(message())
    for _ in range(3):
        publisher._lost()
        publisher._start(channel)
    assert channel.sent == [WHOLE, WHOLE, WHOLE, BARE]
