"""Events that a handler publishes: recorded with their event, published, and done after that."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from fakes.events import Claimed, body
from fakes.world import DEAD_LETTERS, OrderProcess, World
from idempotent_consumer.calls import Handler
from idempotent_consumer.event import Event, Publish, Put, decode
from idempotent_consumer.records import CLAIMED, DONE, PUBLISHING, encode
from idempotent_consumer.settings import Settings
from idempotent_consumer.testing.broker import Ack
from idempotent_consumer.testing.etcd import ANSWER_LOST, FINE

PATIENCE_S = 10.0
"""More than WAITS_FOR_ITS_EVENTS waits of a second at the most add up to."""

SHIPPED = b'{"id":"1/order/0","type":"shipped","args":{"n":1}}'
BILLED = b'{"id":"1/order/1","type":"billed","args":{}}'


def ship(event: Event) -> list[Put | Publish]:
    return [Publish("shipped", event.args), Put(f"/parcels/{event.id}", b"x"), Publish("billed")]


@pytest.fixture
def world() -> Iterator[World]:
    """Give a world; whatever the test did, each delivery is counted once and acked when it may."""
    world = World()
    yield world
    world.close()


@pytest.fixture
def process(world: World) -> OrderProcess:
    return start(world)


def start(world: World, call: Claimed | None = None, **options: Any) -> OrderProcess:
    call = call or Claimed(returns=ship)
    return world.start({"new_order": Handler(ship), "call": call.handler}, **options)


def test_events_are_recorded_then_published_then_done_then_acked(
    world: World, process: OrderProcess
) -> None:
    process.broker.confirms = False
    process.deliver(body("1", n=1))
    assert world.record().state == PUBLISHING
    assert world.record().events == (SHIPPED, BILLED)
    parcel, record = (world.store.get(key) for key in ("/parcels/1", "/service/order/1"))
    assert parcel.mod_revision == record.mod_revision
    assert process.published == [SHIPPED, BILLED]
    assert process.acks == []
    process.confirm()
    assert (world.record().state, world.record().events) == (DONE, ())
    assert process.acks == [Ack(1, (1,), True)]
    assert process.counts() == {"received": 1, "processed": 1}


def test_nothing_is_published_before_it_is_known_to_be_recorded(
    world: World, process: OrderProcess
) -> None:
    process.etcd.script("Txn", ANSWER_LOST)
    process.deliver(body("1", n=1))
    assert process.published == []
    world.advance(30)
    assert process.published == [SHIPPED, BILLED]
    assert process.count("processed") == 1


def test_one_event_of_two_confirmed_is_not_all(world: World, process: OrderProcess) -> None:
    process.broker.confirms = False
    process.deliver(body("1", n=1))
    process.confirm(1)
    assert world.record().state == PUBLISHING
    process.confirm(2)
    assert world.record().state == DONE


def test_one_confirm_of_several_is_all_of_them(world: World, process: OrderProcess) -> None:
    process.broker.confirms = False
    process.deliver(body("1", n=1), body("2", n=2))
    process.confirm(4, multiple=True)
    assert [world.record(event_id).state for event_id in "12"] == [DONE, DONE]


def test_who_finds_events_unpublished_goes_on_with_them(
    world: World, process: OrderProcess
) -> None:
    """The process that recorded them died: what it recorded counts, not what is handled now."""
    died = start(world)
    died.broker.confirms = False
    died.deliver(body("1", n=1))
    died.kill()
    process.deliver(body("1", n=1))
    world.advance(PATIENCE_S)
    assert process.published == [SHIPPED, BILLED]
    assert world.states() == [PUBLISHING, DONE]
    assert world.record().token.startswith(died.running.process), (
        "it was the other one that processed it"
    )
    assert process.counts() == {"received": 1, "processed_skipped": 1}


def test_a_duplicate_that_comes_meanwhile_publishes_nothing_again(
    world: World, process: OrderProcess
) -> None:
    process.broker.confirms = False
    process.deliver(body("1", n=1))
    other = start(world)
    other.deliver(body("1", n=1))
    world.advance(0.2)
    process.confirm()
    world.advance(PATIENCE_S)
    assert other.counts() == {"received": 1, "processed_skipped": 1}
    assert other.published == []


def test_who_waited_for_a_long_call_leaves_its_events_to_the_caller_all_the_same(
    world: World,
) -> None:
    """How long its claim was waited for says nothing of how long its events have been."""
    calling = Claimed(returns=ship, waits=True, timeout_s=60.0)
    process = start(world, calling)
    process.broker.confirms = False
    process.deliver(body("1", "call", n=1))
    other = start(world)
    other.deliver(body("1", "call", n=1))
    world.advance(PATIENCE_S)
    calling.end()
    world.advance(1)
    process.confirm()
    world.advance(PATIENCE_S)
    assert (process.published, other.published) == ([SHIPPED, BILLED], [])


def test_its_writer_counts_it_though_another_has_completed_it(
    world: World, process: OrderProcess
) -> None:
    process.broker.confirms = False
    process.deliver(body("1", n=1))
    other = start(world)
    other.deliver(body("1", n=1))
    world.advance(PATIENCE_S)
    assert other.counts() == {"received": 1, "processed_skipped": 1}
    process.confirm()
    assert process.counts() == {"received": 1, "processed": 1}
    assert world.states() == [PUBLISHING, DONE]


def test_another_body_under_its_id_is_a_conflict_before_it_is_done(
    world: World, process: OrderProcess
) -> None:
    other = start(world)
    other.broker.confirms = False
    other.deliver(body("1", n=1))
    process.deliver(body("1", n=2))
    assert process.counts() == {"received": 1, "conflicted": 1}
    assert process.published == []


def test_what_is_not_done_is_not_known_as_a_duplicate(process: OrderProcess) -> None:
    process.broker.confirms = False
    process.deliver(body("1", n=1))
    process.deliver(body("1", n=1))
    assert process.acks == []
    process.confirm()
    process.deliver(body("1", n=1))
    assert process.counts() == {"received": 3, "processed": 1, "processed_skipped": 2}
    assert process.published == [SHIPPED, BILLED]


def test_a_channel_lost_meanwhile_changes_nothing(world: World, process: OrderProcess) -> None:
    process.broker.confirms = False
    process.deliver(body("1", n=1))
    process.reconnect()
    process.confirm()
    assert process.published == [SHIPPED, BILLED]
    assert world.states() == [PUBLISHING, DONE]
    assert process.in_hand == 0


def test_a_claimed_handlers_events_go_the_same_way(world: World, process: OrderProcess) -> None:
    process.deliver(body("1", "call", n=1))
    assert world.states() == [CLAIMED, PUBLISHING, DONE]
    assert process.published == [SHIPPED, BILLED]
    assert process.counts() == {"received": 1, "processed": 1, "sent": 1}


def test_a_claim_is_not_lost_where_another_completed_its_event(world: World) -> None:
    """The record is there, and its answers lost: another replica finds it and goes on with it."""
    calling = Claimed(returns=ship, waits=True)
    process = start(world, calling)
    process.deliver(body("1", "call", n=1))
    process.etcd.fate = lambda call: ANSWER_LOST if call.method == "Txn" else FINE
    calling.end()
    other = start(world)
    other.deliver(body("1", "call", n=1))
    world.advance(PATIENCE_S)
    process.etcd.fate = lambda _: FINE
    world.advance(30)
    assert world.states() == [CLAIMED, PUBLISHING, DONE]
    assert process.counts() == {"received": 1, "processed": 1, "sent": 1}
    assert process.published == [], "the other one has"


def test_a_record_that_has_gone_before_its_last_step_is_made_anew_with_its_effects(
    world: World, process: OrderProcess
) -> None:
    """An operator has deleted it, or etcd is another: done without the effects would be a lie."""
    process.broker.confirms = False
    process.deliver(body("1", n=1))
    world.store.delete("/service/order/1")
    world.store.delete("/parcels/1")
    process.confirm()
    assert world.record().state == PUBLISHING
    assert world.store.get("/parcels/1").value == b"x"
    process.confirm()
    assert world.record().state == DONE
    assert process.count("processed") == 1


def test_what_is_not_confirmed_when_the_process_ends_goes_back_and_is_not_done(
    world: World, process: OrderProcess
) -> None:
    """Whoever takes it next publishes its events again."""
    process.broker.confirms = False
    process.deliver(body("1", n=1))
    process.stop()
    world.advance(10)
    assert process.task.done()
    assert world.record().state == PUBLISHING
    assert process.broker.queues["order"].bodies == [body("1", n=1)]
    other = start(world)
    other.deliver(body("1", n=1))
    world.advance(PATIENCE_S)
    assert other.published == [SHIPPED, BILLED]
    assert world.record().state == DONE


def test_without_etcd_events_are_published_for_each_delivery(world: World) -> None:
    process = start(world, settings=Settings())
    process.deliver(body("1", n=1), body("1", n=1))
    assert process.published == [SHIPPED, BILLED] * 2
    assert process.counts() == {"received": 2, "processed": 2}


HOSTILE: dict[str, dict[str, object]] = {
    "no events": {"events": []},
    "events that are none": {"events": [1]},
    "an event of no type": {"events": [{"id": "1"}]},
    "no list of events": {"events": None},
    "an unknown state": {"state": "finished"},
    "a state that is no text": {"state": ["publishing"]},
    "a digest that is no text": {"digest": 1},
    "a token that is no text": {"token": None},
    "a time that is not a number": {"time": float("nan")},
    "an event that is not a number": {"events": [float("nan")]},
}


@pytest.mark.parametrize("members", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("event_type", ["new_order", "call"])
def test_the_event_of_a_record_that_cannot_be_read_is_parked(
    world: World, process: OrderProcess, members: dict[str, object], event_type: str
) -> None:
    """It would come again and again, and the record with it."""
    event = decode(body("1", event_type))
    value = encode(PUBLISHING, event.digest, "b/1/1", "now", [SHIPPED])
    world.store.put("/service/order/1", json.dumps({**json.loads(value), **members}).encode())
    process.deliver(body("1", event_type), body("2", event_type))
    world.advance(PATIENCE_S)
    parked = [message.headers for message in process.sent_to(DEAD_LETTERS)]
    assert [headers["x-reason"] for headers in parked] == ["conflict"]
    assert "record that cannot be read" in str(parked[0]["x-error"])
    assert process.count("conflicted") == process.count("processed") == 1
    assert process.in_hand == 0
    assert len(process.published) == 2, "the other event's"


@pytest.mark.parametrize(
    "effect",
    [
        Publish(""),
        Publish(7),  # type: ignore[arg-type]
        Publish("t", {"a": object()}),
        Publish("t", {"a": "x" * 1_100_000}),
        Publish("t", {1: "a"}),  # type: ignore[dict-item]
        Publish("t", {"a": "\ud800"}),
        Publish("t", [1]),  # type: ignore[arg-type]
    ],
)
def test_what_can_be_no_event_is_the_handlers_failure(world: World, effect: Publish) -> None:
    process = world.start(Handler(lambda _: effect))
    process.deliver(body("1"))
    assert process.counts() == {"received": 1, "retried": 1}
    assert world.store.keys("/service/") == []
