"""Dead letters: read where they lie, sent back to their service, or removed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, NamedTuple

from .. import names
from ..amqp import forwarded_properties
from ..bus import LAST_ACKS_S
from ..event import Event, InvalidEvent, decode
from .broker import Broker, BrokerError

_ARRIVE_WITHIN_S = 10.0

_OURS = (names.REASON_HEADER, names.ERROR_HEADER, names.ATTEMPTS_HEADER, names.PARKED_AT_HEADER)


class Letter(NamedTuple):
    """A dead letter. ``event`` is None where its body is no event.

    ``reason`` is the one it was parked for, or RabbitMQ's own word where the broker put it here.
    ``since`` is when that was, by the clock of the machine that did it; None where nobody said.
    """

    tag: int
    body: bytes
    properties: Any
    event: Event | None
    reason: str
    error: str
    attempts: int | None
    since: datetime | None

    @property
    def fingerprint(self) -> bytes:
        """Return what tells it from others over two looks; a look changes its delivery count."""
        headers = {
            name: value
            for name, value in (self.properties.headers or {}).items()
            if name not in ("x-delivery-count", "x-acquired-count")
        }
        return sha256(self.body + repr(sorted(headers.items())).encode()).digest()


def read_letter(tag: int, properties: Any, body: bytes) -> Letter:
    """Read a message of a dead-letter queue. Headers are anybody's, and can be of any type."""
    headers = properties.headers or {}
    try:
        event = decode(body)
    except InvalidEvent:
        event = None
    # What is parked has no deaths any more, so those that are there are the broker's own.
    death = _death(headers)
    reason = death.get("reason") or headers.get(names.REASON_HEADER, "unknown")
    since = _time(death.get("time") or headers.get(names.PARKED_AT_HEADER))
    attempts = headers.get(names.ATTEMPTS_HEADER)
    error = str(headers.get(names.ERROR_HEADER, ""))
    return Letter(
        tag,
        body,
        properties,
        event,
        str(reason),
        error,
        attempts if type(attempts) is int else None,
        since,
    )


class DeadLetterQueue:
    """The dead letters of a service, in hand: what is not resent or removed goes back in place."""

    def __init__(self, broker: Broker, channel: Any, service: str) -> None:
        self._broker, self._channel, self._service = broker, channel, service
        self._queue = names.dead_letter_queue(service)
        self._acked = False

    def __iter__(self) -> Iterator[Letter]:
        """Yield all that are ready at this instant, in their order; none that comes later.

        All of them, whoever looks for one: what goes back goes to the end, so a look at a part
        would leave them in another order.
        """
        left = self._channel.queue_declare(self._queue, passive=True).method.message_count
        if not left:
            return
        for method, properties, body in self._channel.consume(
            self._queue, inactivity_timeout=_ARRIVE_WITHIN_S
        ):
            if method is None:
                raise BrokerError(
                    f"{self._queue}: {left} dead letters did not arrive in time; "
                    "somebody else may be looking at them"
                )
            yield read_letter(method.delivery_tag, properties, body)
            left -= 1
            if not left:
                return

    def resend(self, letter: Letter) -> None:
        """Publish a letter to its service's own queue as it first was, and then remove it."""
        properties = forwarded_properties(letter.properties, {}, without=_OURS)
        self._channel.basic_publish(
            names.DEFAULT_EXCHANGE, self._service, letter.body, properties, mandatory=True
        )
        self.remove(letter)

    def remove(self, letter: Letter) -> None:
        """Remove a letter for good."""
        self._channel.basic_ack(letter.tag)
        self._acked = True

    def settle(self) -> None:
        """Wait until what was removed is."""
        if self._acked:
            self._broker.wait(LAST_ACKS_S)


@contextmanager
def open_dead_letter_queue(broker: Broker, service: str) -> Iterator[DeadLetterQueue]:
    """Take a service's dead letters in hand for the block. Raises BrokerError."""
    with broker.channel() as channel:
        channel.confirm_delivery()
        letters = DeadLetterQueue(broker, channel, service)
        try:
            yield letters
        finally:
            letters.settle()


def _death(headers: dict[str, Any]) -> dict[str, Any]:
    """Return the latest of the deaths that RabbitMQ notes, or an empty one."""
    deaths = headers.get("x-death")
    first = deaths[0] if isinstance(deaths, list) and deaths else None
    return first if isinstance(first, dict) else {}


def _time(value: object) -> datetime | None:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return None
    if not isinstance(value, datetime):
        return None
    return value if value.tzinfo else value.replace(tzinfo=UTC)
