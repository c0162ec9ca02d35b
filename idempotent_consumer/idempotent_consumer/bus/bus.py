"""The bus: what the consumer needs of RabbitMQ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from structlog.typing import FilteringBoundLogger

from .. import names
from ..health import Health
from ..settings import Settings
from . import topology
from .delivery import Delivery
from .forwarding import bare, forwarded
from .headers import tolerate_bad_headers
from .intake import Intake
from .loop import PikaLoop
from .outgoing import event_message
from .publisher import Message, Publisher

COMMITS_IN_FLIGHT = 4
_MAX_PREFETCH = 32_767


class Bus(Protocol):
    """Deliveries in, acks and forwarded messages out."""

    def open(self) -> None:
        """Connect, consume, and go on doing so."""
        ...

    def flush(self) -> None:
        """Ack what is settled up to the first delivery in hand."""
        ...

    def flush_past_gap(self) -> None:
        """Ack all that is settled."""
        ...

    def forward(
        self,
        delivery: Delivery,
        queue: str,
        headers: dict[str, object],
        confirmed: Callable[[], None],
    ) -> None:
        """Send a delivery's message on to a queue, with more headers; then ``confirmed``."""
        ...

    def publish(self, body: bytes, confirmed: Callable[[], None]) -> None:
        """Publish an event; then ``confirmed``."""
        ...

    def stop_intake(self) -> None:
        """Take no more deliveries."""
        ...

    @property
    def in_hand(self) -> int:
        """How many deliveries are not settled."""
        ...

    def close(self) -> None:
        """Close: the broker takes back what is not settled."""
        ...

    @property
    def closed(self) -> bool:
        """Whether everything has been closed."""
        ...


class RabbitBus:
    """The bus on RabbitMQ: one connection to consume, one to publish."""

    def __init__(
        self,
        service: str,
        settings: Settings,
        loop: PikaLoop,
        health: Health,
        log: FilteringBoundLogger,
        take: Callable[[list[Delivery]], None],
        returned: Callable[[int], None],
    ) -> None:
        tolerate_bad_headers()
        urls, delays = settings.rabbitmq_urls, settings.retry_delays
        # Enough for the batches in flight, and as much again arriving behind them.
        prefetch = min(_MAX_PREFETCH, 2 * COMMITS_IN_FLIGHT * settings.batch_size)
        self._intake = Intake(service, urls, prefetch, delays, loop, health, log, take, returned)
        self._publisher = Publisher(
            urls, lambda channel: topology.declare(channel, service, delays), loop, health, log
        )

    def open(self) -> None:
        """Connect, consume, and go on doing so."""
        self._intake.open()
        self._publisher.open()

    def flush(self) -> None:
        """Ack what is settled up to the first delivery in hand."""
        self._intake.flush()

    def flush_past_gap(self) -> None:
        """Ack all that is settled."""
        self._intake.flush_past_gap()

    def forward(
        self,
        delivery: Delivery,
        queue: str,
        headers: dict[str, object],
        confirmed: Callable[[], None],
    ) -> None:
        """Send a delivery's message on to a queue, with more headers; then ``confirmed``."""
        self._publisher.publish(
            Message(
                names.DEFAULT_EXCHANGE,
                queue,
                delivery.body,
                forwarded(delivery.properties, headers),
                bare(headers),
                lambda: delivery.alive,
                confirmed,
            )
        )

    def publish(self, body: bytes, confirmed: Callable[[], None]) -> None:
        """Publish an event; then ``confirmed``."""
        self._publisher.publish(event_message(body, lambda: True, confirmed))

    def stop_intake(self) -> None:
        """Take no more deliveries."""
        self._intake.stop()

    @property
    def in_hand(self) -> int:
        """How many deliveries are not settled."""
        return self._intake.in_hand

    def close(self) -> None:
        """Close: the broker takes back what is not settled."""
        self._intake.close()
        self._publisher.close()

    @property
    def closed(self) -> bool:
        """Whether both connections have been closed."""
        return self._intake.closed and self._publisher.closed
