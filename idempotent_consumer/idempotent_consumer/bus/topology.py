"""The exchange and queues of a service, declared on each new channel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .. import names

DELIVERY_LIMIT = 1000
"""On RabbitMQ 4.0 each return counts: a crash, a lost connection. The limit is for events that
kill the process again and again, so it is far above what outages cost the others."""

NO_LIMIT = -1
"""For dead letters: by default the 21st look at one, in RabbitMQ's UI for instance, drops it."""


def declare(channel: Any, service: str, retry_delays: Iterable[tuple[str, int]]) -> None:
    """Declare everything without waiting: the broker answers an error by closing the channel."""
    declare_exchange(channel)
    for queue, arguments in queue_arguments(service, retry_delays).items():
        channel.queue_declare(queue, durable=True, arguments=arguments)
    channel.queue_bind(service, names.EXCHANGE, names.BINDING_KEY)


def declare_exchange(channel: Any) -> None:
    """Declare where events are published, as `declare` does."""
    channel.exchange_declare(names.EXCHANGE, "topic", durable=True)


def queue_arguments(
    service: str, retry_delays: Iterable[tuple[str, int]]
) -> dict[str, dict[str, object]]:
    """Return the arguments of each queue of a service, by its name. They never change once made.

    Dead-lettering at least once needs quorum queues and ``reject-publish``; without both RabbitMQ
    falls back to at-most-once (RabbitMQ's guide "Quorum Queues", Dead Lettering). It goes by the
    default exchange to one queue: through ``events`` every service would get it again.
    """
    dead_letters = names.dead_letter_queue(service)
    found = {
        dead_letters: _quorum({"x-delivery-limit": NO_LIMIT}),
        service: _quorum({"x-delivery-limit": DELIVERY_LIMIT, **_dead_lettered_to(dead_letters)}),
    }
    for delay, seconds in retry_delays:
        # One queue a delay: in one queue a message would wait behind all that wait longer.
        found[names.retry_queue(service, delay)] = _quorum(
            {"x-message-ttl": seconds * 1000, **_dead_lettered_to(service)}
        )
    return found


def _quorum(arguments: dict[str, object]) -> dict[str, object]:
    return {"x-queue-type": "quorum", **arguments}


def _dead_lettered_to(queue: str) -> dict[str, object]:
    return {
        "x-dead-letter-exchange": names.DEFAULT_EXCHANGE,
        "x-dead-letter-routing-key": queue,
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }
