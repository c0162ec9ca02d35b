"""Events that a handler publishes: recorded with their event, published, and done after that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from fakes.events import body
from idempotent_consumer.effects import Publish, Put, check_effects
from idempotent_consumer.event import Event
from idempotent_consumer.handlers import Handler
from idempotent_consumer.ledger.records import DONE, PUBLISHING, Record, decode, encode
from idempotent_consumer.settings import Settings
from idempotent_consumer.testing.bus import Ack
from idempotent_consumer.testing.etcd import ANSWER_LOST, FINE
from idempotent_consumer.testing.loop import ManualLoop
from idempotent_consumer.testing.process import Process
from idempotent_consumer.testing.store import Store

PATIENCE_S = 10.0
"""More than WAITS_FOR_ITS_EVENTS waits of a second at the most add up to."""

SHIPPED = b'{"id":"1/order/0","type":"shipped","args":{"n":1}}'
BILLED = b'{"id":"1/order/1","type":"billed","args":{}}'


def ship(event: Event) -> list[Put | Publish]:
    return [Publish("shipped", event.args), Put(f"/parcels/{event.id}", b"x"), Publish("billed")]


def call(event: Event, _timeout_s: float) -> list[Put | Publish]:
    return ship(event)


@pytest.fixture
def loop() -> ManualLoop:
    return ManualLoop()


@pytest.fixture
def store(loop: ManualLoop) -> Store:
    return Store(loop.now_s)


@pytest.fixture
def process(loop: ManualLoop, store: Store) -> Iterator[Process]:
    process = start(loop, store)
    yield process
    process.assert_all_counted()


def start(loop: ManualLoop, store: Store, name: str = "a" * 32, **more: Any) -> Process:
    handlers = {"new_order": Handler(ship), "call": Handler(call, 5.0)}
    process = Process(loop, store, handlers, name, **more)
    process.open()
    return process


def record(store: Store) -> Record:
    kv = store.get("/service/order/1")
    return decode(kv.value, kv.mod_revision)


def states(store: Store) -> list[str]:
    return [decode(change.value or b"", 0).state for change in store.puts("/service/order/")]


def test_events_are_recorded_then_published_then_done_then_acked(
    store: Store, process: Process
) -> None:
    process.bus.confirms = False
    process.deliver(body("1", n=1))
    assert record(store).state == PUBLISHING
    assert record(store).events == (SHIPPED, BILLED)
    assert store.get("/parcels/1").mod_revision == record(store).mod_revision
    assert process.bus.published == [SHIPPED, BILLED]
    assert process.bus.acks == []
    process.bus.confirm()
    process.loop.run_until_idle()
    assert (record(store).state, record(store).events) == (DONE, ())
    assert process.bus.acks == [Ack(1, (1,), True)]
    assert process.counts() == {"received": 1, "processed": 1}


def test_nothing_is_published_before_it_is_known_to_be_recorded(
    loop: ManualLoop, process: Process
) -> None:
    process.etcd.script("Txn", ANSWER_LOST)
    process.deliver(body("1", n=1))
    assert process.bus.published == []
    loop.advance(30)
    assert process.bus.published == [SHIPPED, BILLED]
    assert process.count("processed") == 1


def test_one_event_of_two_confirmed_is_not_all(process: Process, store: Store) -> None:
    process.bus.confirms = False
    process.deliver(body("1", n=1))
    (first, _second) = process.bus._unconfirmed
    first()
    process.loop.run_until_idle()
    assert record(store).state == PUBLISHING


def test_who_finds_events_unpublished_goes_on_with_them(
    loop: ManualLoop, store: Store, process: Process
) -> None:
    """The process that recorded them died: what it recorded counts, not what is handled now."""
    died = start(loop, store, "b" * 32)
    died.bus.confirms = False
    died.deliver(body("1", n=1))
    process.deliver(body("1", n=1))
    loop.advance(PATIENCE_S)
    assert process.bus.published == [SHIPPED, BILLED]
    assert states(store) == [PUBLISHING, DONE]
    assert record(store).token.startswith("b" * 32), "it was the other one that processed it"
    assert process.counts() == {"received": 1, "processed_skipped": 1}


def test_a_duplicate_that_comes_meanwhile_publishes_nothing_again(
    loop: ManualLoop, store: Store, process: Process
) -> None:
    process.bus.confirms = False
    process.deliver(body("1", n=1))
    other = start(loop, store, "b" * 32)
    other.deliver(body("1", n=1))
    loop.advance(0.2)
    process.bus.confirm()
    loop.advance(PATIENCE_S)
    assert other.counts() == {"received": 1, "processed_skipped": 1}
    assert other.bus.published == []


def test_who_waited_for_a_long_call_leaves_its_events_to_the_caller_all_the_same(
    loop: ManualLoop, store: Store, process: Process
) -> None:
    """How long its claim was waited for says nothing of how long its events have been."""
    process.bus.confirms = False
    process.deliver(body("1", "call", n=1))
    other = start(loop, store, "b" * 32)
    other.deliver(body("1", "call", n=1))
    loop.advance(PATIENCE_S)
    process.work()
    loop.advance(1)
    process.bus.confirm()
    loop.advance(PATIENCE_S)
    assert (process.bus.published, other.bus.published) == ([SHIPPED, BILLED], [])


def test_its_writer_counts_it_though_another_has_completed_it(
    loop: ManualLoop, store: Store, process: Process
) -> None:
    process.bus.confirms = False
    process.deliver(body("1", n=1))
    other = start(loop, store, "b" * 32)
    other.deliver(body("1", n=1))
    loop.advance(PATIENCE_S)
    assert other.counts() == {"received": 1, "processed_skipped": 1}
    process.bus.confirm()
    process.loop.run_until_idle()
    assert process.counts() == {"received": 1, "processed": 1}
    assert states(store) == [PUBLISHING, DONE]


def test_another_body_under_its_id_is_a_conflict_before_it_is_done(
    loop: ManualLoop, store: Store, process: Process
) -> None:
    other = start(loop, store, "b" * 32)
    other.bus.confirms = False
    other.deliver(body("1", n=1))
    process.deliver(body("1", n=2))
    assert process.counts() == {"received": 1, "conflicted": 1}
    assert process.bus.published == []


def test_what_is_not_done_is_not_known_as_a_duplicate(process: Process) -> None:
    process.bus.confirms = False
    process.deliver(body("1", n=1))
    process.deliver(body("1", n=1))
    assert process.bus.acks == []
    process.bus.confirm()
    process.loop.run_until_idle()
    process.deliver(body("1", n=1))
    assert process.counts() == {"received": 3, "processed": 1, "processed_skipped": 2}
    assert process.bus.published == [SHIPPED, BILLED]


def test_a_channel_lost_meanwhile_changes_nothing(store: Store, process: Process) -> None:
    process.bus.confirms = False
    process.deliver(body("1", n=1))
    process.bus.lose_channel()
    process.bus.redeliver()
    process.loop.run_until_idle()
    process.bus.confirm()
    process.loop.run_until_idle()
    assert process.bus.published == [SHIPPED, BILLED]
    assert states(store) == [PUBLISHING, DONE]
    assert process.bus.in_hand == 0


def test_a_claimed_handlers_events_go_the_same_way(store: Store, process: Process) -> None:
    process.deliver(body("1", "call", n=1))
    process.work()
    assert states(store) == ["claimed", PUBLISHING, DONE]
    assert process.bus.published == [SHIPPED, BILLED]
    assert process.counts() == {"received": 1, "processed": 1, "sent": 1}


def test_a_claim_is_not_lost_where_another_completed_its_event(
    loop: ManualLoop, store: Store, process: Process
) -> None:
    """The record is there, and its answers lost: another replica finds it and goes on with it."""
    process.deliver(body("1", "call", n=1))
    process.etcd.fate = lambda method, _request: ANSWER_LOST if method == "Txn" else FINE
    process.work()
    other = start(loop, store, "b" * 32)
    other.deliver(body("1", "call", n=1))
    loop.advance(PATIENCE_S)
    process.etcd.fate = lambda _method, _request: FINE
    loop.advance(30)
    assert states(store) == ["claimed", PUBLISHING, DONE]
    assert process.counts() == {"received": 1, "processed": 1, "sent": 1}
    assert process.bus.published == [], "the other one has"


def test_a_record_that_has_gone_before_its_last_step_is_made_anew_with_its_effects(
    store: Store, process: Process
) -> None:
    """An operator has deleted it, or etcd is another: done without the effects would be a lie."""
    process.bus.confirms = False
    process.deliver(body("1", n=1))
    store.delete("/service/order/1")
    store.delete("/parcels/1")
    process.bus.confirm()
    process.loop.run_until_idle()
    assert record(store).state == PUBLISHING
    assert store.get("/parcels/1").value == b"x"
    process.bus.confirm()
    process.loop.run_until_idle()
    assert record(store).state == DONE
    assert process.count("processed") == 1


def test_without_etcd_events_are_published_for_each_delivery(
    loop: ManualLoop, store: Store
) -> None:
    process = start(loop, store, settings=Settings())
    process.deliver(body("1", n=1), body("1", n=1))
    assert process.bus.published == [SHIPPED, BILLED] * 2
    assert process.counts() == {"received": 2, "processed": 2}


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
def test_what_can_be_no_event_is_the_handlers_failure(
    loop: ManualLoop, store: Store, effect: Publish
) -> None:
    process = Process(loop, store, {"new_order": Handler(lambda _: effect)})
    process.open()
    process.deliver(body("1"))
    assert process.counts() == {"received": 1, "retried": 1}
    assert store.keys("/service/") == []


def test_events_that_fit_into_no_transaction_are_the_handlers_failure(process: Process) -> None:
    events = check_effects([Publish("t", {"a": "x" * 900_000})] * 2, "order", "1")
    assert "bytes" in (process.ledger.why_never(events) or "")


def test_a_record_with_events_is_read_as_it_was_written() -> None:
    written = encode(PUBLISHING, "1:" + "0" * 32, "t", "now", (SHIPPED, BILLED))
    assert decode(written, 7) == Record(
        PUBLISHING, "1:" + "0" * 32, "t", "now", 7, (SHIPPED, BILLED)
    )
    assert orjson.loads(written)["events"][0]["type"] == "shipped"
