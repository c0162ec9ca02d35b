"""How fast events are published, through the library and by pika alone."""

from functools import partial

from harness.broker import Broker
from harness.servers import Servers
from harness.wait import eventually
from idempotent_consumer import Settings
from idempotent_consumer.bus import declare

from .outcome import outcome
from .preparing import channel
from .progress import Rate, Rates

UNCONFIRMED, CONFIRMED = "pika without confirms", "library, all confirmed"
PUBLISHERS = {UNCONFIRMED: "unconfirmed", CONFIRMED: "library"}
"""Their modules."""

_QUEUE = "bare"
_ENDS_WITHIN_S = 60.0


def publish_once(servers: Servers, name: str, events: int) -> Rates:
    """Let it publish to an empty quorum queue, and see that the broker has everything."""
    broker = Broker(servers.rabbitmq)
    with channel(servers) as declaring:
        declare(declaring, _QUEUE, Settings().retry_delays)
    try:
        told = outcome(
            f"benchmarks.publishers.{PUBLISHERS[name]}",
            servers.rabbitmq.url,
            str(events),
            within_s=_ENDS_WITHIN_S,
        )
        eventually(partial(_require_ready, broker, events))
    finally:
        broker.delete_queues(_QUEUE)
    return {name: Rate(**told)}


def _require_ready(broker: Broker, number: int) -> None:
    ready = broker.ready(_QUEUE)
    assert ready == number, f"{ready} of {number} events in the queue"
