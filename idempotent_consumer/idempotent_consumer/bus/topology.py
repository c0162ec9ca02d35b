"""The exchange and queues of a service, declared on each new channel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .. import names

DELIVERY_LIMIT = 1000
"""On RabbitMQ 4.0 each return counts: a crash, a lost connection. The limit is for events that
kill the process again and again, so it is far above what outages cost the others."""


def declare(channel: Any, service: str, retry_delays: Iterable[tuple[str, int]]) -> None:
    """Declare everything without waiting: the broker answers an error by closing the channel.

    Dead-lettering at least once needs quorum queues and ``reject-publish``; without both RabbitMQ
    falls back to at-most-once (RabbitMQ's guide "Quorum Queues", Dead Lettering). It goes by the
    default exchange to one queue: through ``events`` every service would get it again.
    """
    declare_exchange(channel)
    dead_letters = names.dead_letter_queue(service)
    _queue(channel, dead_letters)
    _queue(channel, service, **_dead_lettered_to(dead_letters), **{
        "x-delivery-limit": DELIVERY_LIMIT,
    })
    channel.queue_bind(service, names.EXCHANGE, names.BINDING_KEY)
    for delay, seconds in dict(retry_delays).items():
        # One queue a delay: in one queue a message would wait behind all that wait longer.
        _queue(channel, names.retry_queue(service, delay), **_dead_lettered_to(service), **{
            "x-message-ttl": seconds * 1000,
        })


def declare_exchange(channel: Any) -> None:
    """Declare where events are published, as `declare` does."""
    channel.exchange_declare(names.EXCHANGE, "topic", durable=True)


def _queue(channel: Any, queue: str, **arguments: object) -> None:
    channel.queue_declare(queue, durable=True, arguments={"x-queue-type": "quorum", **arguments})


def _dead_lettered_to(queue: str) -> dict[str, object]:
    return {
        "x-dead-letter-exchange": names.DEFAULT_EXCHANGE,
        "x-dead-letter-routing-key": queue,
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }
