"""A service that publishes is killed on the way: each event it owes is published, and none else.

The example service of the library, which ships orders and publishes an event for each. What is
killed finds eight full batches at once; the positions are the first of the first batch, one amid
the fourth and the last of the last.
"""

import json
from collections import Counter
from collections.abc import Callable
from itertools import chain, product
from random import Random

import pika
import pytest

from chaos.acks import AckAudit
from chaos.conftest import StartTrial
from chaos.crash_cells import (
    BATCH,
    POSITIONS,
    REDELIVERY_TIMEOUT_S,
    REPLICAS,
    SETTINGS,
    Where,
    assert_done,
    batches,
    frozen,
    killed_at,
    start_crashing,
)
from chaos.durations import often
from idempotent_consumer.flow import WAITS_FOR_ITS_EVENTS
from idempotent_consumer.system import claim_wait
from integration.load import ids
from servers.broker import Broker
from servers.publisher import EXCHANGE
from servers.server import RabbitMQ
from servers.servers import Servers
from servers.services import Service
from servers.store import Store
from servers.wait import eventually

SHIPPED = "order_shipped"
OBSERVED = "shipping.observed"
LEFT_ALONE_S = WAITS_FOR_ITS_EVENTS * claim_wait(Random()).longest_s
"""For so long at the most a record is left to the process that was killed: it may yet publish."""

BATCHES = 8
BATCHES_FOR_TWO = 4 * BATCHES
EVENT = (1, 3 * BATCH + BATCH // 2, BATCHES * BATCH)
STEPS = ("events recorded", "event sent", "event confirmed")

CELLS = [
    pytest.param(
        Where(step, EVENT[POSITIONS.index(position)]),
        replicas,
        id="-".join((step.replace(" ", "_"), position, REPLICAS[replicas], f"run_{run}")),
    )
    for step, position, replicas, run in product(
        STEPS, POSITIONS, REPLICAS, range(1, 1 + often(1, 5))
    )
]


@pytest.mark.parametrize(("at", "replicas"), CELLS)
def test_killed_with_events_to_publish(
    at: Where,
    replicas: int,
    trial: StartTrial,
    start_audited: Callable[..., Service],
    clean: Servers,
    store: Store,
    acks: AckAudit,
) -> None:
    acks.unhandled.add(SHIPPED)
    observe(clean.rabbitmq)
    attempt = trial(f"killed: {at.point}", service="shipping")
    killed = start_crashing(start_audited, "shipping", at)
    others = [start_audited("shipping", **SETTINGS) for _ in range(replicas - 1)]
    backlog = list(chain.from_iterable(batches(BATCHES_FOR_TWO if others else BATCHES)))
    with frozen([killed, *others]):
        attempt.publish(backlog)
    killed_at(killed, at)
    attempt.fired()
    unfinished = {
        id_ for id_, record in store.records("shipping").items() if record.state == "publishing"
    }
    assert unfinished or others, "it was killed with an event that it owed"
    if not others:
        start_audited("shipping", wait=False, **SETTINGS)
    attempt.recovers()
    eventually(
        lambda: assert_done(store, "shipping", ids(backlog)), REDELIVERY_TIMEOUT_S + LEFT_ALONE_S
    )
    attempt.judge(at_least=len(ids(backlog)))
    assert_recorded_in_two_steps(store)
    assert_published(attempt.broker, store, may_repeat=unfinished if not others else None)


def observe(rabbitmq: RabbitMQ) -> None:
    """Bind a queue of the test's own to all events."""
    connection = pika.BlockingConnection(pika.URLParameters(rabbitmq.url))
    channel = connection.channel()
    channel.exchange_declare(EXCHANGE, "topic", durable=True)
    channel.queue_declare(OBSERVED, durable=True, arguments={"x-queue-type": "quorum"})
    channel.queue_bind(OBSERVED, EXCHANGE, SHIPPED)
    connection.close()


def assert_recorded_in_two_steps(store: Store) -> None:
    """Check each record's history, and that its parcel was written in the first of the two."""
    assert set(map(tuple, store.steps("shipping").values())) == {("publishing", "done")}
    recorded = {
        change.key.rpartition("/")[2]: change.revision
        for change in store.history("/service/shipping/")
        if json.loads(change.value)["state"] == "publishing"
    }
    parcels = {
        change.key.rpartition("/")[2]: change.revision for change in store.history("/parcels/")
    }
    assert parcels == recorded


def assert_published(broker: Broker, store: Store, *, may_repeat: set[str] | None) -> None:
    """Check what others have seen: an event for each order, and again only what was cut off."""
    seen = Counter(json.loads(message.body)["id"] for message in broker.drain(OBSERVED))
    assert set(seen) == {f"{id_}/shipping/0" for id_ in store.done("shipping")}
    if may_repeat is not None:
        repeated = {id_.removesuffix("/shipping/0") for id_, times in seen.items() if times > 1}
        assert repeated <= may_repeat
    assert max(seen.values()) <= 2
