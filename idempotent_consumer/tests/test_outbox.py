"""Events that a handler publishes: recorded with their event, published, then done."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from fakes.events import Claimed, body
from fakes.world import Order, World
from idempotent_consumer.calls import Handler
from idempotent_consumer.event import Event, Outgoing, Publish, Put, decode
from idempotent_consumer.records import CLAIMED, DONE, PUBLISHING, encode
from idempotent_consumer.testing.broker import Ack
from idempotent_consumer.testing.etcd import ANSWER_LOST, FINE

PATIENCE_S = 10.0
"""Longer than WAITS_FOR_ITS_EVENTS waits, which take a second each at most."""

SHIPPED = b'{"id":"1/order/0","type":"shipped","args":{"n":1}}'
BILLED = b'{"id":"1/order/1","type":"billed","args":{}}'


def ship(event: Event) -> list[Put | Publish]:
    return [Publish("shipped", event.args), Put(f"/parcels/{event.id}", b"x"), Publish("billed")]


def start(world: World, call: Claimed | None = None, **options: Any) -> Order:
    """Start a process with a pure and a claimed handler, which publish two events each."""
    call = call or Claimed(returns=ship)
    return world.start({"new_order": Handler(ship), "call": call.handler}, **options)


@pytest.fixture
def order() -> Iterator[Order]:
    with World() as world:
        yield start(world)


@pytest.fixture
def other(order: Order) -> Order:
    """Another process, on the same etcd."""
    return start(order.world)


@pytest.mark.parametrize(("event_type", "begins"), [("new_order", []), ("call", [CLAIMED])])
def test_events_are_recorded_then_published_then_done_then_acked(
    order: Order, event_type: str, begins: list[str]
) -> None:
    """Until then, a second delivery is no known duplicate."""
    order.broker.confirms = False
    order.deliver(body("1", event_type, n=1))
    assert order.record().state == PUBLISHING
    assert order.record().events == (Outgoing(SHIPPED), Outgoing(BILLED))
    parcel, record = (order.store.get(key) for key in ("/parcels/1", "/service/order/1"))
    assert parcel.mod_revision == record.mod_revision
    assert order.published == [SHIPPED, BILLED]
    order.confirm(1)
    order.deliver(body("1", event_type, n=1))
    assert order.record().state == PUBLISHING
    assert order.acks == []
    order.confirm(2)
    assert (order.record().state, order.record().events) == (DONE, ())
    assert order.acks == [Ack(1, (1, 2), True)]
    order.deliver(body("1", event_type, n=1))
    assert order.states() == [*begins, PUBLISHING, DONE]
    ended = {"processed": 1, "processed_skipped": 2} | ({"sent": 1} if begins else {})
    assert order.counts() == {"received": 3, **ended}
    assert order.published == [SHIPPED, BILLED]


def test_what_a_stop_leaves_unpublished_another_publishes(order: Order, other: Order) -> None:
    order.broker.confirms = False
    order.deliver(body("1", n=1))
    order.stop()
    other.advance(PATIENCE_S)
    assert (order.task.done(), order.record().state) == (True, PUBLISHING)
    assert order.broker.queues["order"].bodies == [body("1", n=1)]
    other.deliver(body("1", n=1))
    other.advance(PATIENCE_S)
    assert other.published == [SHIPPED, BILLED]
    assert other.record().token.startswith(order.running.process), "it keeps its writer's token"
    assert other.counts() == {"received": 1, "processed_skipped": 1}


@pytest.mark.parametrize(
    ("confirmed_after_s", "published_again"), [(0.2, []), (PATIENCE_S, [SHIPPED, BILLED])]
)
def test_a_duplicate_completes_its_event_if_its_writer_does_not(
    order: Order, other: Order, confirmed_after_s: float, published_again: list[bytes]
) -> None:
    """It gives the writer some time first. The writer counts the event in any case."""
    order.broker.confirms = False
    order.deliver(body("1", n=1))
    other.deliver(body("1", n=1))
    order.advance(confirmed_after_s)
    order.confirm()
    order.advance(PATIENCE_S)
    assert other.published == published_again
    assert other.counts() == {"received": 1, "processed_skipped": 1}
    assert order.counts() == {"received": 1, "processed": 1}
    assert order.states() == [PUBLISHING, DONE]


def test_a_process_that_waited_for_a_long_call_leaves_its_events_to_the_caller(
    other: Order,
) -> None:
    """Waits for the claim do not count as waits for the events."""
    calling = Claimed(returns=ship, waits=True, timeout_s=60.0)
    order = start(other.world, calling)
    order.broker.confirms = False
    order.deliver(body("1", "call", n=1))
    other.deliver(body("1", "call", n=1))
    order.advance(PATIENCE_S)
    calling.end()
    order.advance(1)
    order.confirm()
    order.advance(PATIENCE_S)
    assert (order.published, other.published) == ([SHIPPED, BILLED], [])


def test_a_claim_is_not_lost_if_another_process_completed_its_event(other: Order) -> None:
    """The record landed, but the answer was lost: another replica publishes its events."""
    calling = Claimed(returns=ship, waits=True)
    order = start(other.world, calling)
    order.deliver(body("1", "call", n=1))
    order.etcd.fate = lambda call: ANSWER_LOST if call.method == "Txn" else FINE
    calling.end()
    other.deliver(body("1", "call", n=1))
    order.advance(PATIENCE_S)
    order.etcd.fate = lambda _: FINE
    order.advance(30)
    assert order.states() == [CLAIMED, PUBLISHING, DONE]
    assert order.counts() == {"received": 1, "processed": 1, "sent": 1}
    assert order.published == [], "the other process has published them"


def test_a_record_that_has_gone_is_written_again_with_its_effects(order: Order) -> None:
    """An operator may have deleted it. Only *done* would be a record without effects."""
    order.broker.confirms = False
    order.deliver(body("1", n=1))
    order.store.delete("/service/order/1")
    order.store.delete("/parcels/1")
    order.confirm()
    assert order.record().state == PUBLISHING
    assert order.store.get("/parcels/1").value == b"x"
    order.confirm()
    assert order.record().state == DONE
    assert order.count("processed") == 1


@pytest.mark.parametrize("members", [{"events": []}, {"state": "finished"}])
@pytest.mark.parametrize("event_type", ["new_order", "call"])
def test_the_event_of_a_record_that_cannot_be_read_is_parked(
    order: Order, members: dict[str, object], event_type: str
) -> None:
    """Retries would find the same record again and again."""
    event = decode(body("1", event_type))
    value = encode(PUBLISHING, event.digest, "b/1/1", "now", [Outgoing(SHIPPED)])
    order.store.put("/service/order/1", json.dumps({**json.loads(value), **members}).encode())
    order.deliver(body("1", event_type), body("2", event_type))
    order.advance(PATIENCE_S)
    assert [message.headers["x-reason"] for message in order.parked] == ["conflict"]
    assert "record that cannot be read" in str(order.parked[0].headers["x-error"])
    assert order.count("conflicted") == order.count("processed") == 1
    assert order.in_hand == 0
    assert len(order.published) == 2, "the other event's"
