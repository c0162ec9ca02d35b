"""A delivery, and the life of the channel it belongs to."""

from __future__ import annotations

from typing import Any

from ..names import ATTEMPTS_HEADER
from .frames import decode_properties


class Epoch:
    """One life of a channel: which of its deliveries are in hand, and how they are settled.

    A delivery tag means nothing on another channel, so deliveries are settled here or, once the
    channel has gone, not at all: the broker gives them out again.
    """

    def __init__(self, number: int, channel: Any) -> None:
        self.number = number
        self.alive = True
        self._channel = channel
        self._in_hand: dict[int, float] = {}  # When each arrived, in the order of their tags.
        self._settled: list[int] = []

    def arrived(self, tag: int, at_s: float) -> None:
        """Note a delivery, and when it arrived, by the loop's clock."""
        self._in_hand[tag] = at_s

    def settle(self, tag: int) -> None:
        """Note that a delivery is to be acked."""
        del self._in_hand[tag]
        self._settled.append(tag)

    @property
    def in_hand(self) -> int:
        """How many deliveries are not settled."""
        return len(self._in_hand)

    @property
    def oldest_s(self) -> float | None:
        """When the oldest of them arrived; None where none is in hand."""
        return next(iter(self._in_hand.values()), None)

    def flush(self) -> None:
        """Ack what is settled up to the first delivery in hand, with one ack."""
        if not self._settled or not self._channel.is_open:
            return
        first_in_hand = next(iter(self._in_hand), None)
        if first_in_hand is None:
            prefix, self._settled = self._settled, []
        else:
            prefix = [tag for tag in self._settled if tag < first_in_hand]
            self._settled = [tag for tag in self._settled if tag > first_in_hand]
        if prefix:
            self._channel.basic_ack(max(prefix), multiple=True)

    def flush_past_gap(self) -> None:
        """Ack all that is settled: one ack up to the first delivery in hand, past it one each."""
        self.flush()
        if self._channel.is_open:
            for tag in self._settled:
                self._channel.basic_ack(tag)
            self._settled.clear()

    def end(self) -> int:
        """Settle nothing any more; return how many deliveries went back to the broker."""
        self.alive = False
        return len(self._in_hand)


class Delivery:
    """One arrival of a message: its body and properties, bound to its epoch.

    Properties are pika's, or as they came: few are ever read.
    """

    __slots__ = ("_properties", "body", "epoch", "tag")

    def __init__(self, epoch: Epoch, tag: int, properties: Any, body: bytes) -> None:
        self.epoch, self.tag, self._properties, self.body = epoch, tag, properties, body

    @property
    def properties(self) -> Any:
        """Return the message's properties as pika's BasicProperties."""
        if isinstance(self._properties, bytes):
            self._properties = decode_properties(self._properties)
        return self._properties

    @property
    def attempts(self) -> int:
        """How often its event has failed: our own header, where it makes sense."""
        value = (self.properties.headers or {}).get(ATTEMPTS_HEADER, 0)
        return value if type(value) is int and 0 <= value <= 1000 else 0

    @property
    def alive(self) -> bool:
        """Whether it can still be settled."""
        return self.epoch.alive

    def settle(self) -> bool:
        """Mark it for the next ack; False where it has gone back to the broker already."""
        if not self.epoch.alive:
            return False
        self.epoch.settle(self.tag)
        return True
