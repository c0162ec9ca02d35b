"""How fast events are published, through the library and by pika alone."""

from functools import partial
from typing import NamedTuple

import pika

from harness.broker import Broker
from harness.servers import Servers
from harness.wait import eventually
from idempotent_consumer import Settings
from idempotent_consumer.bus import topology

from .outcome import run_process
from .progress import Rate, Rates

UNCONFIRMED, CONFIRMED, ONE_BY_ONE = (
    "pika without confirms",
    "library, all confirmed",
    "pika, confirmed one by one",
)

_QUEUE = "bare"
_ENDS_WITHIN_S = 60.0


class Publisher(NamedTuple):
    """A publisher's module; it gets one of `one_in` of the events that a run has."""

    name: str
    module: str
    one_in: int = 1


PUBLISHERS = (
    Publisher(UNCONFIRMED, "unconfirmed"),
    Publisher(CONFIRMED, "library"),
    Publisher(ONE_BY_ONE, "one_by_one", one_in=20),
)


def publish_once(servers: Servers, publisher: Publisher, events: int) -> Rates:
    """Let it publish to an empty quorum queue, and see that the broker has everything."""
    number = events // publisher.one_in
    connection = pika.BlockingConnection(pika.URLParameters(servers.rabbitmq.url))
    topology.declare(connection.channel(), _QUEUE, Settings().retry_delays)
    connection.close()
    try:
        told = run_process(f"benchmarks.publishers.{publisher.module}", servers.rabbitmq.url,
                           str(number), within_s=_ENDS_WITHIN_S)
        eventually(partial(_require_ready, Broker(servers.rabbitmq), number))
    finally:
        Broker(servers.rabbitmq).delete_queues(_QUEUE)
    return {publisher.name: Rate(**told)}


def _require_ready(broker: Broker, number: int) -> None:
    ready = broker.ready(_QUEUE)
    assert ready == number, f"{ready} of {number} events in the queue"
