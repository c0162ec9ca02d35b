"""The consuming side: deliveries arrive here and are settled here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from structlog.typing import FilteringBoundLogger

from ..health import Health
from . import topology
from .connection import LAST_ACKS_S, Connection
from .delivery import Delivery, Epoch
from .frames import Reader
from .loop import PikaLoop

GONE_WITHIN_S = 0.25
"""The broker cancels the consumers of a queue that is deleted some milliseconds before the queue is
gone (2 to 6 ms on RabbitMQ 4.0.5 and 4.3.6, one node): it is looked for after that."""


class Intake:
    """Consumes one queue on a connection of its own, with a bounded number of deliveries in hand.

    ``take`` gets what has arrived: whatever one read from the socket brought, never a timer's
    worth. ``returned`` is told how many deliveries went back with a lost channel.
    """

    def __init__(
        self,
        service: str,
        urls: Sequence[str],
        prefetch: int,
        retry_delays: Sequence[tuple[str, int]],
        loop: PikaLoop,
        health: Health,
        log: FilteringBoundLogger,
        take: Callable[[list[Delivery]], None],
        returned: Callable[[int], None],
    ) -> None:
        self._service, self._prefetch, self._retry_delays = service, prefetch, retry_delays
        self._loop, self._take, self._returned = loop, take, returned
        self._arrived: list[Delivery] = []
        self._arrived_s = 0.0
        self._epochs = 0
        self._epoch: Epoch | None = None
        self._channel: Any = None
        self._consumer_tag: str | None = None
        self._stopping = False
        self._connection = Connection("rabbitmq", urls, loop, health, log, self._opened, self._lost)

    def open(self) -> None:
        """Connect, and consume from then on."""
        self._connection.open()

    @property
    def in_hand(self) -> int:
        """How many deliveries have arrived and are not settled."""
        return self._epoch.in_hand if self._epoch is not None else 0

    def flush(self) -> None:
        """Ack what is settled up to the first delivery in hand."""
        if self._epoch is not None:
            self._epoch.flush()

    def flush_past_gap(self) -> None:
        """Ack all that is settled."""
        if self._epoch is not None:
            self._epoch.flush_past_gap()

    def stop(self) -> None:
        """Take no more; what is in hand can still be settled.

        What arrives until the broker knows is handed back by pika itself.
        """
        self._stopping = True
        if self._consumer_tag is not None and self._channel.is_open:
            self._channel.connection.reader = None
            self._channel.basic_cancel(self._consumer_tag)

    def close(self) -> None:
        """Close the connection, in a moment: the broker takes back what is not settled."""
        self._loop.call_later(LAST_ACKS_S, self._connection.close)

    @property
    def closed(self) -> bool:
        """Whether the connection has been closed, or was not there."""
        return self._connection.closed

    def _opened(self, channel: Any) -> None:
        channel.add_on_cancel_callback(lambda _: self._cancelled(channel))
        topology.declare(channel, self._service, self._retry_delays)
        channel.basic_qos(prefetch_count=self._prefetch, callback=lambda _: self._consume(channel))

    def _consume(self, channel: Any) -> None:
        if self._stopping:
            return
        self._epochs += 1
        self._channel, epoch = channel, Epoch(self._epochs, channel)
        self._epoch = epoch

        def arrive(tag: int, properties: Any, body: bytes) -> None:
            if not self._arrived:
                self._arrived_s = self._loop.now_s()
                self._loop.call_soon(self._hand_over)
            epoch.arrived(tag, self._arrived_s)
            self._arrived.append(Delivery(epoch, tag, properties, body))

        def on_message(_channel: Any, method: Any, properties: Any, body: bytes) -> None:
            arrive(method.delivery_tag, properties, body)

        self._consumer_tag = channel.basic_consume(
            self._service, on_message, callback=lambda _: self._connection.ready()
        )
        channel.connection.reader = Reader(channel.channel_number, self._consumer_tag, arrive)

    def _hand_over(self) -> None:
        arrived, self._arrived = self._arrived, []
        self._take(arrived)

    def _cancelled(self, channel: Any) -> None:
        """Give a channel up whose consumer the broker has cancelled, and say why it has.

        basic.cancel carries no reason. Where the queue is gone, it was deleted. Where it is still
        there, RabbitMQ 4.3 cancels a consumer that has held a delivery for longer than the consumer
        time-out, and requeues that delivery; 4.0 closes the channel instead. A cancelled consumer
        gets nothing more, but keeps its other deliveries for as long as its channel is open.
        """
        oldest_s = self._epoch.oldest_s if self._epoch is not None else None
        held_s = None if oldest_s is None else self._loop.now_s() - oldest_s

        def look() -> None:
            if channel.is_open:  # A queue that is gone closes it: the connection says why.
                channel.queue_declare(
                    self._service,
                    passive=True,
                    callback=lambda _: self._connection.drop(_why_cancelled(held_s)),
                )

        self._loop.call_later(GONE_WITHIN_S, look)

    def _lost(self) -> None:
        epoch, self._epoch, self._consumer_tag = self._epoch, None, None
        if epoch is not None:
            self._returned(epoch.end())


def _why_cancelled(held_s: float | None) -> str:
    """Explain a cancel whose queue is there, with how long the oldest delivery had been unacked."""
    held = "none is unacked now" if held_s is None else f"the oldest for {held_s:.1f} s"
    return (
        "the broker cancelled the consumer, whose queue is still there: probably a delivery was "
        f"unacked for longer than the broker's consumer_timeout ({held})"
    )
