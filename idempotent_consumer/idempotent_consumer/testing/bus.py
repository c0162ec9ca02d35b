"""A broker's queue and channel in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pika

from ..bus.delivery import Delivery, Epoch
from .loop import ManualLoop


class FakeChannel:
    """A channel that knows what has not been acked, and refuses an ack that names nothing."""

    def __init__(self, acked: Callable[[list[int], bool], None]) -> None:
        self.is_open = True
        self.unacked: dict[int, Delivery] = {}
        self._acked = acked

    def basic_ack(self, delivery_tag: int, multiple: bool = False) -> None:
        """Ack one tag, or with ``multiple`` all up to it."""
        if not self.is_open:
            raise AssertionError("an ack on a channel that has gone")
        if delivery_tag not in self.unacked:
            raise AssertionError(f"PRECONDITION_FAILED - unknown delivery tag {delivery_tag}")
        tags = [t for t in self.unacked if t <= delivery_tag] if multiple else [delivery_tag]
        self._acked(tags, multiple)
        for tag in tags:
            del self.unacked[tag]


@dataclass(frozen=True)
class Ack:
    """An ack as it went out: one tag, or every one up to the last of these."""

    epoch: int
    tags: tuple[int, ...]
    multiple: bool


@dataclass
class Forwarded:
    """A message sent on to a queue."""

    delivery: Delivery
    queue: str
    headers: dict[str, object]
    confirmed: Callable[[], None] = field(repr=False)

    @property
    def body(self) -> bytes:
        """Return the body, which is the one that arrived."""
        return self.delivery.body


class FakeBus:
    """The consumer's Bus. What is delivered goes to ``take``, which the caller sets.

    ``confirms`` off holds the broker's confirms back until ``confirm``. ``on_ack`` is told of each
    delivery just before it is acked.
    """

    def __init__(self, loop: ManualLoop) -> None:
        self._loop = loop
        self.take: Callable[[list[Delivery]], None] = lambda _: None
        self.returned: Callable[[int], None] = lambda _: None
        self.on_ack: Callable[[Delivery], None] = lambda _: None
        self.confirms = True
        self.acks: list[Ack] = []
        self.acked: list[Delivery] = []
        self.forwarded: list[Forwarded] = []
        self.published: list[bytes] = []
        self._unconfirmed: list[Callable[[], None]] = []
        self.ready: list[Delivery] = []
        self._tag = 0
        self.intake_stopped = self.closed = self.opened = False
        self.epoch = self._new_epoch(1)

    # What the test does.

    def deliver(self, *bodies: bytes, properties: Any = None) -> list[Delivery]:
        """Let messages arrive together, as one read of the socket brings them."""
        arrived = [self._arrive(body, properties or pika.BasicProperties()) for body in bodies]
        self.take(arrived)
        return arrived

    def lose_channel(self) -> None:
        """End the channel and open another: what was not acked is ready again."""
        self.channel.is_open = False
        self.ready.extend(self.channel.unacked.values())
        self.returned(self.epoch.end())
        self.epoch = self._new_epoch(self.epoch.number + 1)

    def redeliver(self) -> list[Delivery]:
        """Let what is ready arrive again, on the channel there is now."""
        ready, self.ready = self.ready, []
        arrived = [self._arrive(delivery.body, delivery.properties) for delivery in ready]
        self.take(arrived)
        return arrived

    def confirm(self) -> None:
        """Confirm what has been sent on."""
        unconfirmed, self._unconfirmed = self._unconfirmed, []
        for confirmed in unconfirmed:
            confirmed()

    def come_back(self, message: Forwarded) -> list[Delivery]:
        """Let a message arrive again from the retry queue it was sent to."""
        properties = message.delivery.properties
        headers = {**(properties.headers or {}), **message.headers}
        return self.deliver(message.body, properties=pika.BasicProperties(headers=headers))

    def sent_to(self, queue: str) -> list[Forwarded]:
        """Return what has been sent on to a queue."""
        return [message for message in self.forwarded if message.queue == queue]

    # What the consumer does.

    def open(self) -> None:
        """Note that consuming has begun."""
        self.opened = True

    def flush(self) -> None:
        """Ack what is settled up to the first delivery in hand."""
        self.epoch.flush()

    def flush_past_gap(self) -> None:
        """Ack all that is settled."""
        self.epoch.flush_past_gap()

    def forward(
        self,
        delivery: Delivery,
        queue: str,
        headers: dict[str, object],
        confirmed: Callable[[], None],
    ) -> None:
        """Send a message on, and confirm it soon or at the test's word."""
        if not delivery.alive:
            return
        message = Forwarded(delivery, queue, headers, confirmed)
        self.forwarded.append(message)
        self._confirm_later(confirmed)

    def publish(self, body: bytes, confirmed: Callable[[], None]) -> None:
        """Publish an event, and confirm it soon or at the test's word."""
        self.published.append(body)
        self._confirm_later(confirmed)

    def _confirm_later(self, confirmed: Callable[[], None]) -> None:
        if self.confirms:
            self._loop.call_soon(confirmed)
        else:
            self._unconfirmed.append(confirmed)

    def stop_intake(self) -> None:
        """Note that no more is to be taken."""
        self.intake_stopped = True

    @property
    def in_hand(self) -> int:
        """How many deliveries are not settled."""
        return self.epoch.in_hand

    def close(self) -> None:
        """Take back what is not settled."""
        self.closed = True
        self.channel.is_open = False
        self.returned(self.epoch.end())

    def _new_epoch(self, number: int) -> Epoch:
        def acked(tags: list[int], multiple: bool) -> None:
            for tag in tags:
                self.on_ack(self.channel.unacked[tag])
                self.acked.append(self.channel.unacked[tag])
            self.acks.append(Ack(number, tuple(tags), multiple))

        self.channel = FakeChannel(acked)
        self._tag = 0
        return Epoch(number, self.channel)

    def _arrive(self, body: bytes, properties: Any) -> Delivery:
        self._tag += 1
        self.epoch.arrived(self._tag, 0.0)
        delivery = Delivery(self.epoch, self._tag, properties, body)
        self.channel.unacked[self._tag] = delivery
        return delivery
