"""What becomes of each delivery of an event with a pure handler."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pika
import pytest

from fakes.events import Pure, body
from idempotent_consumer.bus.bus import COMMITS_IN_FLIGHT
from idempotent_consumer.bus.delivery import Delivery
from idempotent_consumer.effects import Put
from idempotent_consumer.event import Event, decode
from idempotent_consumer.handlers import Handler
from idempotent_consumer.ledger.records import DONE
from idempotent_consumer.ledger.records import decode as decode_record
from idempotent_consumer.settings import Settings
from idempotent_consumer.testing.bus import Ack
from idempotent_consumer.testing.etcd import ANSWER_LOST, FINE, REQUEST_LOST, answered_late
from idempotent_consumer.testing.loop import ManualLoop
from idempotent_consumer.testing.process import Process
from idempotent_consumer.testing.store import Change, Store

DEAD, FIRST_RETRY = "order.dead-letter", "order.retry.1s"


@pytest.fixture
def loop() -> ManualLoop:
    return ManualLoop()


@pytest.fixture
def store(loop: ManualLoop) -> Store:
    return Store(loop.now_s)


@pytest.fixture
def handler() -> Pure:
    return Pure()


@pytest.fixture
def process(loop: ManualLoop, store: Store, handler: Pure) -> Iterator[Process]:
    """Give an open process; whatever the test did, each delivery is counted once."""
    process = start(loop, store, handler)
    yield process
    process.assert_all_counted()


def start(loop: ManualLoop, store: Store, handler: Pure, name: str = "a" * 32) -> Process:
    process = Process(loop, store, {"new_order": Handler(handler)}, name)
    process.open()
    process.bus.on_ack = lambda delivery: assert_recorded(store, process, delivery)
    return process


def assert_recorded(store: Store, process: Process, delivery: Delivery) -> None:
    """Hold, at the ack, that the event is recorded, or sent on and confirmed."""
    if any(message.delivery is delivery for message in process.bus.forwarded):
        return
    event = decode(delivery.body)
    if event.type != "new_order":
        return
    kv = store.get(f"/service/order/{event.id}")
    assert kv is not None, "acked before it was recorded"
    record = decode_record(kv.value, 0)
    assert (record.state, record.digest) == (DONE, event.digest)


# Recorded, then acked.


def test_an_event_is_handled_recorded_and_then_acked(
    loop: ManualLoop, store: Store, process: Process, handler: Pure
) -> None:
    journal: list[object] = []
    store.changed = lambda change: journal.append(change.key)
    process.bus.on_ack = lambda delivery: journal.append(delivery.tag)
    process.etcd.script("Txn", answered_late(3.0))
    process.deliver(body("1", n=1))
    assert journal == [b"/service/order/1", b"/orders/1"]
    assert process.bus.acks == [], "it is there, but etcd has not said so yet"
    loop.advance(3.0)
    assert journal == [b"/service/order/1", b"/orders/1", 1]
    assert handler.seen == ["1"]
    assert process.counts() == {"received": 1, "processed": 1}


def test_nothing_is_acked_while_the_outcome_is_unknown(loop: ManualLoop, process: Process) -> None:
    process.etcd.fate = lambda _method, _request: ANSWER_LOST
    process.deliver(body("1"), body("2"))
    loop.advance(600)
    assert (process.bus.acks, process.bus.forwarded) == ([], [])
    assert process.bus.in_hand == 2
    process.etcd.fate = lambda _method, _request: FINE
    loop.advance(30)
    assert process.bus.acks == [Ack(1, (1, 2), True)]
    assert process.count("processed") == 2


def test_an_event_whose_answer_was_lost_is_processed_once(
    loop: ManualLoop, store: Store, process: Process, handler: Pure
) -> None:
    process.etcd.script("Txn", ANSWER_LOST, ANSWER_LOST)
    process.deliver(body("1"))
    loop.advance(30)
    assert process.counts() == {"received": 1, "processed": 1}
    assert handler.seen == ["1"]
    assert store.get("/orders/1").version == 1


def test_a_duplicate_is_skipped(process: Process, handler: Pure) -> None:
    process.deliver(body("1"))
    process.deliver(body("1"))
    assert process.counts() == {"received": 2, "processed": 1, "processed_skipped": 1}
    assert handler.seen == ["1"], "the cache knew it"
    assert len(process.bus.acked) == 2


def test_a_duplicate_of_another_replicas_event_is_skipped(
    loop: ManualLoop, store: Store, process: Process
) -> None:
    other = start(loop, store, Pure(), "b" * 32)
    other.deliver(body("1"))
    process.deliver(body("1"))
    assert process.counts() == {"received": 1, "processed_skipped": 1}
    assert store.get("/orders/1").version == 1


def test_equal_events_in_one_batch_are_one(process: Process, handler: Pure) -> None:
    """One is processed, the others are its duplicates."""
    process.deliver(*[body("1")] * 5, body("2"))
    assert process.counts() == {"received": 6, "processed": 2, "processed_skipped": 4}
    assert handler.seen == ["1", "2"]
    assert process.bus.acks == [Ack(1, (1, 2, 3, 4, 5, 6), True)]
    assert len(process.etcd.sent("Txn")) == 2


def test_a_duplicate_that_arrives_during_the_commit_waits_for_it(
    loop: ManualLoop, process: Process, handler: Pure
) -> None:
    process.etcd.script("Txn", answered_late(1.0))
    process.deliver(body("1"))
    process.deliver(body("1"))
    assert process.bus.acks == []
    loop.advance(1.0)
    assert process.counts() == {"received": 2, "processed": 1, "processed_skipped": 1}
    assert handler.seen == ["1"]


def test_a_producers_other_way_of_writing_is_a_duplicate(process: Process) -> None:
    process.deliver(b'{"id":"1","type":"new_order","args":{"a":1,"b":2}}')
    process.deliver(b'{"args": {"b":2, "a":1}, "type":"new_order", "id":"1", "sent":"later"}')
    assert process.count("processed_skipped") == 1


def test_without_etcd_every_delivery_is_processed(loop: ManualLoop, store: Store) -> None:
    handler = Pure()
    process = Process(loop, store, {"new_order": Handler(handler)}, settings=Settings())
    process.open()
    process.deliver(body("1"), body("1"))
    process.deliver(body("1"))
    assert process.counts() == {"received": 3, "processed": 3}
    assert process.etcd.calls == []
    assert len(process.bus.acked) == 3
    process.assert_all_counted()


def test_without_etcd_a_failing_event_is_retried_and_parked_all_the_same(
    loop: ManualLoop, store: Store
) -> None:
    process = Process(loop, store, {"new_order": Handler(Pure(fails=9))}, settings=Settings())
    process.open()
    process.deliver(body("1"))
    for _ in range(3):
        process.bus.come_back(process.bus.forwarded[-1])
        loop.run_until_idle()
    assert process.counts() == {"received": 4, "retried": 3, "failed": 1}
    assert len(process.bus.sent_to(DEAD)) == 1


# Ignored and parked.


def test_a_type_without_a_handler_is_ignored_and_acked(process: Process) -> None:
    process.deliver(body("1", "refund"))
    assert process.counts() == {"received": 1, "ignored": 1}
    assert len(process.bus.acked) == 1
    assert process.bus.forwarded == []


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"id":"","type":"new_order"}',
        b'{"id":"9","type":"new_order","args":null}',
        b"[" * 100_000,
    ],
)
def test_an_invalid_event_is_parked_as_it_came_and_its_batch_mates_go_on(
    process: Process, store: Store, bad: bytes
) -> None:
    process.deliver(body("1"), bad, body("2"))
    assert process.counts() == {"received": 3, "processed": 2, "invalid": 1}
    (parked,) = process.bus.sent_to(DEAD)
    assert parked.body == bad
    assert parked.headers["x-reason"] == "invalid"
    assert parked.headers["x-error"]
    assert store.keys("/service/") == ["/service/order/1", "/service/order/2"]
    assert len(process.bus.acked) == 3


def test_a_parked_delivery_is_acked_only_once_the_broker_has_confirmed(process: Process) -> None:
    process.bus.confirms = False
    process.deliver(b"bad")
    assert process.bus.acks == []
    assert process.count("invalid") == 0
    process.bus.confirm()
    assert process.bus.acks == [Ack(1, (1,), True)]
    assert process.count("invalid") == 1


def test_the_same_id_with_another_body_is_parked_and_the_record_stays(
    process: Process, store: Store
) -> None:
    process.deliver(body("1", n=1))
    before = store.get("/service/order/1"), store.get("/orders/1")
    process.deliver(body("1", n=2))
    assert process.counts() == {"received": 2, "processed": 1, "conflicted": 1}
    (parked,) = process.bus.sent_to(DEAD)
    assert (parked.body, parked.headers["x-reason"]) == (body("1", n=2), "conflict")
    assert (store.get("/service/order/1"), store.get("/orders/1")) == before


def test_two_bodies_in_one_batch_first_wins(process: Process, store: Store) -> None:
    """The other waits for the first's record, and is judged against it; so are its duplicates."""
    process.deliver(
        body("1", n=1), body("1", n=2), body("1", n=1), body("1", n=3), body("2"), body("1", n=2)
    )
    assert process.counts() == {
        "received": 6,
        "processed": 2,
        "processed_skipped": 1,
        "conflicted": 3,
    }
    assert [m.body for m in process.bus.sent_to(DEAD)] == [
        body("1", n=2),
        body("1", n=2),
        body("1", n=3),
    ]
    assert store.get("/orders/1").value == b'{"n":1}'


def test_the_other_body_gets_its_turn_when_the_first_fails(
    process: Process, handler: Pure, store: Store
) -> None:
    """Nothing was recorded of the first, so the second is the event; the first's retry is not."""
    handler.fails = 1
    process.deliver(body("1", n=1), body("1", n=2))
    assert process.counts() == {"received": 2, "retried": 1, "processed": 1}
    process.bus.come_back(process.bus.sent_to(FIRST_RETRY)[0])
    process.loop.run_until_idle()
    assert process.count("conflicted") == 1
    assert store.get("/orders/1").value == b'{"n":2}'


# A handler that raises.


def test_a_failing_event_is_retried_on_the_broker_and_its_batch_mates_go_on(
    process: Process, handler: Pure, store: Store
) -> None:
    handler.fails = 1
    process.deliver(body("1"), body("2"))
    assert process.counts() == {"received": 2, "retried": 1, "processed": 1}
    (retry,) = process.bus.forwarded
    assert (retry.queue, retry.body) == (FIRST_RETRY, body("1"))
    assert retry.headers["x-attempts"] == 1
    assert store.keys("/service/") == ["/service/order/2"]
    process.bus.come_back(retry)
    process.loop.run_until_idle()
    assert process.count("processed") == 2
    assert handler.seen == ["1", "2", "1"]


def test_after_the_last_delay_it_is_parked_with_its_error_and_attempts(
    process: Process, handler: Pure
) -> None:
    handler.fails = 99
    process.deliver(body("1"))
    for _ in range(3):
        process.bus.come_back(process.bus.forwarded[-1])
        process.loop.run_until_idle()
    assert [m.queue for m in process.bus.forwarded] == [
        "order.retry.1s",
        "order.retry.10s",
        "order.retry.60s",
        DEAD,
    ]
    parked = process.bus.forwarded[-1]
    assert parked.body == body("1")
    parked_at = datetime.fromisoformat(str(parked.headers.pop("x-parked-at")))
    assert abs(datetime.now(UTC) - parked_at) < timedelta(minutes=1)
    assert parked.headers == {
        "x-reason": "failed",
        "x-error": "RuntimeError: out of stock",
        "x-attempts": 4,
    }
    assert process.counts() == {"received": 4, "retried": 3, "failed": 1}
    assert len(process.bus.acked) == 4


def test_a_retry_is_acked_only_once_the_broker_has_confirmed_it(
    process: Process, handler: Pure
) -> None:
    handler.fails = 1
    process.bus.confirms = False
    process.deliver(body("1"))
    assert len(process.bus.forwarded) == 1
    assert process.bus.acks == []
    process.bus.confirm()
    assert len(process.bus.acks) == 1


def test_a_handler_that_raises_on_what_is_done_skips_it(
    loop: ManualLoop, store: Store, handler: Pure, process: Process
) -> None:
    """The record is looked at first: its ack was lost, and a retry would process it again."""
    other = start(loop, store, Pure(), "b" * 32)
    other.deliver(body("1"))
    handler.fails = 1
    process.deliver(body("1"))
    assert process.counts() == {"received": 1, "processed_skipped": 1}
    assert process.bus.forwarded == []


def test_a_handler_that_raises_on_another_body_of_what_is_done_is_a_conflict(
    loop: ManualLoop, store: Store, handler: Pure, process: Process
) -> None:
    start(loop, store, Pure(), "b" * 32).deliver(body("1", n=1))
    handler.fails = 1
    process.deliver(body("1", n=2))
    assert process.counts() == {"received": 1, "conflicted": 1}


def test_a_failing_event_is_not_sent_on_while_etcd_is_away(
    loop: ManualLoop, handler: Pure, process: Process
) -> None:
    """Whether it is a duplicate is not known yet."""
    handler.fails = 1
    process.etcd.fate = lambda _method, _request: REQUEST_LOST
    process.deliver(body("1"))
    loop.advance(60)
    assert process.bus.forwarded == []
    process.etcd.fate = lambda _method, _request: FINE
    loop.advance(30)
    assert process.count("retried") == 1


def test_merged_deliveries_of_a_failing_event_are_each_retried_by_their_own_count(
    process: Process, handler: Pure
) -> None:
    handler.fails = 1
    process.bus.take = lambda _: None
    first = process.bus.deliver(body("1"))
    second = process.bus.deliver(
        body("1"), properties=pika.BasicProperties(headers={"x-attempts": 2})
    )
    process.consumer.take([*first, *second])
    process.loop.run_until_idle()
    assert [(m.queue, m.headers["x-attempts"]) for m in process.bus.forwarded] == [
        (FIRST_RETRY, 1),
        ("order.retry.60s", 3),
    ]


@pytest.mark.parametrize(
    "returned",
    [
        "text",
        7,
        [b"x"],
        [Put("/a", "text")],  # type: ignore[arg-type]
        [Put("", b"")],
        [Put("/service/order/2", b"x")],
        [Put("/incarnation/order", b"x")],
        [Put("/a", b"1"), Put("/a", b"2")],
        [Put("/a", b"x" * 2_000_000)],
        [Put(f"/a/{n}", b"") for n in range(200)],
        [Put("\ud800", b"")],
        [Put(None, b"")],  # type: ignore[arg-type]
        [Put(b"/a", b"")],  # type: ignore[arg-type]
    ],
)
def test_effects_that_etcd_cannot_take_are_the_handlers_failure(
    loop: ManualLoop, store: Store, returned: object
) -> None:
    """Parked unsent after its retries; its batch mates are recorded."""

    def handler(event: Event) -> object:
        return returned if event.id == "bad" else None

    process = Process(loop, store, {"new_order": Handler(handler)})  # type: ignore[arg-type]
    process.open()
    process.deliver(body("1"), body("bad"), body("2"))
    assert process.counts() == {"received": 3, "processed": 2, "retried": 1}
    assert store.keys("/service/") == ["/service/order/1", "/service/order/2"]
    process.assert_all_counted()


def test_effects_may_be_none_one_or_many(loop: ManualLoop, store: Store) -> None:
    returned = {
        "none": None,
        "one": Put("/one", b"1"),
        "list": [Put("/l", b"1")],
        "generator": (Put(f"/g{n}", b"") for n in range(2)),
    }
    process = Process(loop, store, {"new_order": Handler(lambda event: returned[event.id])})
    process.open()
    process.deliver(*map(body, returned))
    assert process.count("processed") == 4
    assert store.keys("/") == [
        "/g0",
        "/g1",
        "/incarnation/order",
        "/l",
        "/one",
        *sorted(f"/service/order/{name}" for name in returned),
    ]


@pytest.mark.parametrize(("takes_s", "slow"), [(0.9, []), (1.5, [("1", 1.5)])])
def test_a_handler_that_took_long_is_named(
    loop: ManualLoop,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    takes_s: float,
    slow: list[tuple[str, float]],
) -> None:
    """Heartbeats have waited for it, and so have all other events."""
    monkeypatch.setattr(time, "perf_counter", loop.now_s)
    process = Process(loop, store, {"new_order": Handler(lambda _: loop.freeze(takes_s))})
    process.open()
    process.deliver(body("1"))
    assert [
        (line["event_id"], line["seconds"])
        for line in process.lines.entries
        if "a pure handler took long" in line["event"]
    ] == slow
    assert process.count("processed") == 1


# The channel goes.


def test_a_redelivery_joins_the_task_that_still_runs(
    loop: ManualLoop, process: Process, handler: Pure, store: Store
) -> None:
    """The commit was under way when the channel went; its answer settles the new delivery."""
    process.etcd.script("Txn", answered_late(2.0))
    process.deliver(body("1"))
    process.bus.lose_channel()
    process.bus.redeliver()
    loop.advance(2.0)
    assert handler.seen == ["1"]
    assert store.get("/orders/1").version == 1
    assert process.bus.acks == [Ack(2, (1,), True)]
    assert process.counts() == {"received": 2, "returned": 1, "processed": 1}


def test_what_is_recorded_after_its_channel_went_is_not_acked_on_the_next(
    loop: ManualLoop, process: Process
) -> None:
    """A tag of the old channel would ack another message on the new one."""
    process.etcd.script("Txn", answered_late(2.0))
    process.deliver(body("1"))
    process.bus.lose_channel()
    process.bus.ready.clear()
    process.bus.deliver(b'{"id":"2","type":"new_order"}')
    process.etcd.script("Txn", answered_late(9.0))
    loop.advance(3.0)
    assert [delivery.body for delivery in process.bus.acked] == [b'{"id":"2","type":"new_order"}']
    assert process.counts() == {"received": 2, "returned": 1, "processed": 1}


def test_a_parking_that_is_confirmed_after_its_channel_went_settles_nothing(
    process: Process,
) -> None:
    process.bus.confirms = False
    process.deliver(b"bad")
    process.bus.lose_channel()
    process.bus.confirm()
    assert process.counts() == {"received": 1, "returned": 1}
    process.bus.confirms = True
    process.bus.redeliver()
    process.loop.run_until_idle()
    assert process.counts() == {"received": 2, "returned": 1, "invalid": 1}
    assert len(process.bus.sent_to(DEAD)) == 2, "parked at least once"


def test_a_delivery_that_went_back_before_it_was_looked_at_is_not_handled(
    process: Process, handler: Pure
) -> None:
    process.bus.take = lambda _: None
    arrived = process.bus.deliver(body("1"))
    process.bus.lose_channel()
    process.consumer.take(arrived)
    process.loop.run_until_idle()
    assert handler.seen == []
    assert process.counts() == {"received": 1, "returned": 1}


def test_a_duplicate_in_hand_from_a_dead_channel_does_not_take_the_processed_count(
    loop: ManualLoop, process: Process
) -> None:
    process.etcd.script("Txn", answered_late(2.0))
    process.deliver(body("1"), body("1"))
    process.bus.lose_channel()
    process.bus.redeliver()
    loop.advance(2.0)
    assert process.counts() == {
        "received": 4,
        "returned": 2,
        "processed": 1,
        "processed_skipped": 1,
    }


# Batches.


def batch_sizes(process: Process) -> list[int]:
    """Return how many records each transaction would put."""
    return [
        sum(op.request_put.key.startswith(b"/service/") for op in request.success)
        for request in process.etcd.sent("Txn")[1:]
    ]


def test_one_waiting_event_is_committed_at_once(loop: ManualLoop, process: Process) -> None:
    """No timer is waited for: with an etcd that answers, not a moment passes."""
    before_s = loop.now_s()
    process.deliver(body("1"))
    assert loop.now_s() == before_s
    assert len(process.bus.acked) == 1


def test_what_arrived_together_is_one_transaction_up_to_the_batch_size(process: Process) -> None:
    process.deliver(*(body(str(n)) for n in range(100)))
    sizes = batch_sizes(process)
    assert sizes == [64, 36], "128 operations, two an event"


def test_commits_in_flight_are_bounded_and_the_next_batch_fills_meanwhile(
    loop: ManualLoop, process: Process
) -> None:
    process.etcd.fate = lambda method, _request: answered_late(1.0 if method == "Txn" else 0.0)
    for number in range(20):
        process.deliver(body(str(number)))
    assert len(process.etcd.sent("Txn")) - 1 == COMMITS_IN_FLIGHT
    loop.advance(1.0)
    sizes = batch_sizes(process)
    assert sizes == [1] * COMMITS_IN_FLIGHT + [20 - COMMITS_IN_FLIGHT]
    loop.advance(1.0)
    assert process.count("processed") == 20


def test_commits_that_end_out_of_order_ack_only_what_they_recorded(
    loop: ManualLoop, process: Process
) -> None:
    """The first is late: the second's ack is single, past the gap, once it is seen to stay."""
    process.etcd.script("Txn", answered_late(5.0))
    process.deliver(body("1"), body("2"))
    process.deliver(body("3"))
    loop.advance(0.3)
    assert process.bus.acks == [Ack(1, (3,), False)]
    loop.advance(5.0)
    assert process.bus.acks[1:] == [Ack(1, (1, 2), True)]


def test_what_is_settled_past_a_gap_is_not_acked_once_etcd_is_another(
    loop: ManualLoop, store: Store, process: Process
) -> None:
    """It was judged by records that are gone."""
    process.etcd.script("Txn", answered_late(5.0))
    process.deliver(body("1"), body("2"))
    process.deliver(body("3"))
    store.wipe()
    process.deliver(body("4"))
    assert process.ledger.halted
    loop.advance(60)
    assert process.bus.acks == []


def test_a_partly_answered_commit_still_counts_as_one_in_flight(
    loop: ManualLoop, store: Store, process: Process
) -> None:
    start(loop, store, Pure(), "b" * 32).deliver(body("0"))
    process.etcd.script("Txn", FINE, FINE, *[REQUEST_LOST] * 3)  # It fails, is read, is sent anew.
    process.deliver(*(body(str(n)) for n in range(3)))
    assert process.counts()["processed_skipped"] == 1
    assert process.bus.in_hand == 2
    loop.advance(60)
    process.etcd.fate = lambda method, _request: answered_late(1.0 if method == "Txn" else 0.0)
    before = len(process.etcd.sent("Txn"))
    for number in range(10, 30):
        process.deliver(body(str(number)))
    assert len(process.etcd.sent("Txn")) - before == COMMITS_IN_FLIGHT
    loop.advance(10)


def test_when_etcd_is_another_nothing_is_settled_any_more(
    loop: ManualLoop, process: Process, store: Store
) -> None:
    """Not even what the cache knew, nor what rests on no record: all of it is held."""
    process.deliver(body("1"))
    process.bus.confirms = False
    process.deliver(b"parked before, confirmed after")
    store.wipe()
    process.deliver(body("2"))
    process.deliver(body("1"), body("3"))
    loop.advance(600)
    process.bus.confirm()
    process.deliver(body("1"), b"not JSON", body("4", "a type without a handler"))
    assert process.bus.acks == [Ack(1, (1,), True)]
    assert (process.bus.in_hand, len(process.bus.forwarded)) == (7, 1)
    assert "etcd" in process.health.missing


def test_a_history_of_changes_has_one_put_a_key(process: Process, store: Store) -> None:
    changes: list[Change] = store.history
    for _ in range(3):
        process.deliver(*(body(str(n % 7)) for n in range(30)))
    keys = [change.key for change in changes if change.key != b"/incarnation/order"]
    assert len(keys) == len(set(keys)) == 14
