"""Fill a queue before anything consumes it."""

import random
import uuid
from collections.abc import Sequence
from enum import Enum
from typing import Any

import pika

from .progress import NotMeasuredError

PERSISTENT = pika.BasicProperties(content_type="application/json", delivery_mode=2)

_UNCONFIRMED = 5_000
_SEED = 4


class Mix(Enum):
    """How a series is made of events.

    A repeated series comes a second time behind itself: the second consists of duplicates of
    what the same process has just recorded, so the cache is as warm as can be, with no restart
    and no import in between. In a shuffled one each event comes twice, in an order that is the
    same in each run.
    """

    FRESH = "each once"
    REPEATED = "the whole series twice"
    SHUFFLED = "each twice, shuffled"


def body(event_id: object) -> bytes:
    """Return the body of an event."""
    return b'{"id":"%s","type":"new_order","args":{"item":"tea","quantity":1}}' % (
        str(event_id).encode()
    )


def new_events(number: int) -> list[bytes]:
    """Return the bodies of so many events with fresh ids."""
    return [body(uuid.uuid4()) for _ in range(number)]


def series(mix: Mix, length: int) -> tuple[list[bytes], int]:
    """Return the bodies to publish, and how many events they are; `length` is of one series."""
    if mix is Mix.SHUFFLED:
        bodies = 2 * new_events(length // 2)
        random.Random(_SEED).shuffle(bodies)
        return bodies, length // 2
    bodies = new_events(length)
    return (2 * bodies if mix is Mix.REPEATED else bodies), length


class Loader:
    """Publishes bodies to one queue in order, with thousands of confirms outstanding.

    pika's blocking channel would wait for each confirm by itself.
    """

    def __init__(self, url: str, queue: str, bodies: Sequence[bytes]) -> None:
        self._queue, self._bodies = queue, bodies
        self._sent = self._confirmed = 0
        self._channel: Any = None
        self._connection: Any = pika.SelectConnection(
            pika.URLParameters(url),
            on_open_callback=lambda connection: connection.channel(on_open_callback=self._opened),
            on_close_callback=lambda connection, _error: connection.ioloop.stop(),
        )

    def run(self) -> None:
        """Publish everything; raises NotMeasuredError unless the broker has confirmed it all."""
        self._connection.ioloop.start()
        if self._confirmed < len(self._bodies):
            raise NotMeasuredError(
                f"{self._queue}: {self._confirmed} of {len(self._bodies)} events confirmed"
            )

    def _opened(self, channel: Any) -> None:
        self._channel = channel
        channel.confirm_delivery(self._answered, callback=lambda _: self._fill())

    def _fill(self) -> None:
        last = min(len(self._bodies), self._confirmed + _UNCONFIRMED)
        for body in self._bodies[self._sent : last]:
            self._channel.basic_publish("", self._queue, body, PERSISTENT)
        self._sent = last

    def _answered(self, frame: Any) -> None:
        method = frame.method
        if method.NAME != "Basic.Ack":
            self._connection.close()
            return
        # A quorum queue confirms in order where nothing fails.
        self._confirmed = max(self._confirmed, method.delivery_tag)
        if self._confirmed == len(self._bodies):
            self._connection.close()
        elif self._sent - self._confirmed < _UNCONFIRMED // 2:
            self._fill()
