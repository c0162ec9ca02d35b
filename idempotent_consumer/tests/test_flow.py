"""What happens to each delivery of an event, from its arrival to its ack."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pika
import pytest

from fakes.events import Claimed, Pure, body
from fakes.ledger import OTHER_DIGEST
from fakes.world import DEAD_LETTERS, FIRST_RETRY, Order, World
from idempotent_consumer.bus import COMMITS_IN_FLIGHT, HELD_S
from idempotent_consumer.calls import Handler
from idempotent_consumer.event import Event, Outgoing, Publish, decode
from idempotent_consumer.flow import CATCH_UP_EVERY_S, SMALL_BATCH
from idempotent_consumer.metrics import BOUNDS_S
from idempotent_consumer.records import CLAIMED, DONE, PUBLISHING, RELEASED, encode
from idempotent_consumer.service import FINISH_WITHIN_S
from idempotent_consumer.settings import Settings
from idempotent_consumer.testing.broker import Ack
from idempotent_consumer.testing.etcd import FINE, REQUEST_LOST, Call, Fate
from idempotent_consumer.testing.process import SETTINGS

BODIES = 200
RETRIED_S = 72.0
"""The retry delays together, and a second."""


@pytest.fixture
def order() -> Iterator[Order]:
    with World() as world:
        yield world.start(Pure())


def slow_commits(call: Call) -> Fate:
    """Answer transactions after a second."""
    return Fate(answers_s=1.0) if call.method == "Txn" else FINE


def slow_reads(call: Call) -> Fate:
    """Answer transactions that only read after three seconds."""
    return Fate(answers_s=3.0) if call.method == "Txn" and not call.request.compare else FINE


# Recorded, then acked.


def test_an_event_is_handled_recorded_and_then_acked(order: Order) -> None:
    order.etcd.script("Txn", Fate(answers_s=3.0))
    order.deliver(body("1", n=1))
    assert order.store.keys("/orders/") == ["/orders/1"]
    assert order.record().state == DONE
    assert order.acks == [], "its record is there, but etcd has not answered yet"
    order.advance(3.0)
    assert order.acks == [Ack(1, (1,), True)]
    assert (order.pure.seen, batch_sizes(order)) == (["1"], [1])
    assert order.counts() == {"received": 1, "processed": 1}
    assert order.metrics.timings == {"orders_handle": [0.0], "orders_commit": [pytest.approx(3.0)]}
    order.deliver(body("1", n=1), body("1", n=2))
    ended = {"processed": 1, "processed_skipped": 1, "conflicted": 1}
    assert order.counts() == {"received": 3, **ended}
    assert [message.headers["x-reason"] for message in order.parked] == ["conflict"]
    assert order.store.get("/orders/1").value == b'{"n":1}'


def test_without_etcd_every_delivery_is_processed_or_retried_and_parked(order: Order) -> None:
    """A call is made without a claim, and events are published each time."""
    call, publish = Claimed(fails=1).handler, Handler(lambda _: Publish("shipped"))
    handlers = {"new_order": Pure(fails=4).handler, "call": call, "ship": publish}
    order = order.world.start(handlers, settings=Settings())
    order.deliver(body("1"))
    order.deliver(*(body("1", event_type) for event_type in ("call", "ship") for _ in range(2)))
    order.advance(RETRIED_S)
    ended = {"processed": 4, "retried": 4, "failed": 1}
    assert order.counts() == {"received": 9, **ended, "sent": 2}
    assert [message.body for message in order.parked] == [body("1")]
    assert len(order.published) == 2
    assert order.etcd.calls == []


def test_a_commit_does_not_wait_for_a_look_beside_it(order: Order) -> None:
    """Otherwise a delivery that arrives meanwhile shares a fate decided before its arrival."""
    order.etcd.fate = slow_reads
    order.deliver(body("1", "refund"), body("2"))
    assert order.counts() == {"received": 2, "processed": 1}
    order.advance(3.0)
    assert order.counts() == {"received": 2, "processed": 1, "ignored": 1}


# Types without a handler.


def test_looks_for_deliveries_that_went_back_do_not_pile_up(order: Order) -> None:
    """Otherwise looks pile up, with their bodies, while etcd is down and connections are lost."""
    order.etcd.fate = lambda _: REQUEST_LOST
    order.deliver(*(body(str(number), "refund") for number in range(BODIES)))
    for _ in range(10):
        order.advance(HELD_S)
        order.reconnect()
    order.etcd.fate = lambda _: FINE
    before = len(order.etcd.calls)
    order.advance(RETRIED_S)
    assert order.counts()["ignored"] == BODIES
    reads = [call.request for call in order.etcd.calls[before:] if call.method == "Txn"]
    looks = sum(len(request.success) + len(request.failure) for request in reads)
    assert looks <= 4 * BODIES, "for the commits under way, and the last redelivery"


def test_an_event_without_a_handler_is_in_conflict_with_none_in_flight(order: Order) -> None:
    order.etcd.fate = slow_commits
    order.deliver(body("1"), body("1", "refund"), body("1", "refund", n=2))
    order.advance(3.0)
    assert order.counts() == {"received": 3, "processed": 1, "ignored": 2}


@pytest.mark.parametrize("state", ["", CLAIMED, RELEASED, PUBLISHING, DONE])
@pytest.mark.parametrize("ours", [True, False])
def test_an_event_without_a_handler_waits_for_the_replica_that_has_begun_it(
    order: Order, state: str, ours: bool
) -> None:
    """That is not an attempt. A record of another body says nothing about this one."""
    event = decode(body("1", "refund"))
    held = ours and state not in ("", DONE)
    digest = event.digest if ours else OTHER_DIGEST
    events = [Outgoing(body("1/order/0", "refunded"))] if state == PUBLISHING else []
    if state:
        order.store.put("/service/order/1", encode(state, digest, "b/1/1", "now", events))
    order.deliver(body("1", "refund"))
    assert order.counts() == {"received": 1, "retried" if held else "ignored": 1}
    assert len(order.acked) == 1
    sent = [(message.routing_key, message.headers) for message in order.forwarded]
    assert sent == ([("order.retry.60s", {"x-attempts": 0})] if held else [])
    said = [line for line in order.lines.entries if "has begun it" in str(line)]
    assert len(said) == held


def test_a_look_does_not_decide_about_a_delivery_that_arrived_after_it(order: Order) -> None:
    """Otherwise it is acked, and the events that a replica has not published are lost."""
    refund = body("1", "refund")
    order.etcd.fate = slow_reads
    order.deliver(refund)
    # The replica that has its other delivery records it, and dies before it publishes.
    unpublished = [Outgoing(body("1/order/0", "refunded"))]
    value = encode(PUBLISHING, decode(refund).digest, "b/1/1", "now", unpublished)
    order.store.put("/service/order/1", value)
    order.deliver(refund, refund)
    order.advance(3.0)
    assert order.counts() == {"received": 3, "ignored": 1}
    order.advance(3.0)
    assert order.counts() == {"received": 3, "ignored": 1, "retried": 2}


# Sent on.


def test_a_failing_event_is_retried_and_then_parked_with_its_error(order: Order) -> None:
    order.pure.fails = 99
    order.deliver(body("1"))
    order.advance(RETRIED_S)
    assert [(m.routing_key, m.body, m.headers["x-attempts"]) for m in order.forwarded] == [
        (FIRST_RETRY, body("1"), 1),
        ("order.retry.10s", body("1"), 2),
        ("order.retry.60s", body("1"), 3),
        (DEAD_LETTERS, body("1"), 4),
    ]
    (parked,) = order.parked
    headers = {name: value for name, value in parked.headers.items() if name != "x-death"}
    parked_at = datetime.fromisoformat(headers.pop("x-parked-at"))
    assert parked_at == datetime.fromtimestamp(71, UTC)
    assert headers.pop("x-error").startswith("RuntimeError: out of stock (events.py:")
    assert headers == {"x-reason": "failed", "x-attempts": 4}
    assert order.counts() == {"received": 4, "retried": 3, "failed": 1}
    assert len(order.acked) == 4


def test_merged_deliveries_are_each_retried_by_their_own_count(order: Order) -> None:
    order.pure.fails = 1
    order.etcd.script("Txn", Fate(answers_s=1.0))
    order.deliver(body("1"))
    order.deliver(body("1"), properties=pika.BasicProperties(headers={"x-attempts": 2}))
    order.advance(1.0)
    assert [(m.routing_key, m.headers["x-attempts"]) for m in order.forwarded] == [
        (FIRST_RETRY, 1),
        ("order.retry.60s", 3),
    ]


@pytest.mark.parametrize("fails", [0, BODIES])
@pytest.mark.parametrize("handlers", [Pure, Claimed])
def test_many_bodies_of_one_id_are_judged_once(
    order: Order, handlers: type[Pure | Claimed], fails: int
) -> None:
    """What is recorded decides about all that wait: to handle each of them again is quadratic."""
    decoded = list[bytes]()

    def decode_and_count(message: bytes, _properties: Any) -> Event:
        decoded.append(message)
        return decode(message)

    settings = replace(SETTINGS, breaker_failures=0)
    order = order.world.start(handlers(fails), settings=settings, decode=decode_and_count)
    order.deliver(*(body("1", n=n) for n in range(BODIES)))
    assert len(decoded) == BODIES
    called = len(order.pure.seen) + len(order.claimed.calls)
    if fails:
        assert order.counts() == {"received": BODIES, "retried": BODIES}
        assert called == BODIES
    else:
        assert order.count("conflicted") == BODIES - order.count("processed") == BODIES - 1
        # Those that waited are judged without asking etcd, those that came later in batches.
        assert len(order.etcd.sent("Txn")) < BODIES / 8


# What handlers return, and how long they take.


@pytest.mark.parametrize(
    ("warning", "takes_s", "warned"),
    [
        ("a pure handler took long", [0.09, 0.1, 0.19, 0.2, 0.3, 3.0], [1, 3, 5]),
        ("the event loop was blocked", [0.9, 2.0, 2.0, 5.0], [1, 3]),
    ],
)
def test_what_took_long_is_warned_about(
    order: Order, warning: str, takes_s: list[float], warned: list[int]
) -> None:
    warned_of = list[int]()
    for number, seconds in enumerate(takes_s):
        order.pure.takes_s = seconds
        order.deliver(body(str(number)))
        order.advance(seconds + 1)
        warned_of += [number] * (len(order.logged(warning)) - len(warned_of))
    assert warned_of == warned
    for line, number in zip(order.logged(warning), warned, strict=True):
        assert line.get("event_id", str(number)) == str(number)
        assert line["seconds"] <= takes_s[number] <= line["seconds"] + 0.5
    assert order.count("processed") == len(takes_s)


# Turns and batches.


def batch_sizes(order: Order) -> list[int]:
    """Return how many records each transaction would put, without those that put none."""
    sizes = [
        sum(operation.request_put.key.startswith(b"/service/") for operation in request.success)
        for request in order.etcd.sent("Txn")
    ]
    return [size for size in sizes if size]


def test_if_no_commit_is_under_way_the_batch_is_sent_at_once(order: Order) -> None:
    """Otherwise a batch is sent in the next pass of the loop, which may add to it."""
    order = order.world.start({"new_order": Pure().handler, "call": Claimed().handler})
    order.etcd.fate = slow_commits
    many = int(SMALL_BATCH * SETTINGS.batch_size)
    # A claimed event's ask comes a pass later than those of the pure events beside it.
    for batch in range(2):
        order.deliver(*(body(f"{batch}-{n}") for n in range(many)), body(f"call-{batch}", "call"))
    assert batch_sizes(order) == [many, many + 2]


def test_a_turn_is_bounded_and_recorded_before_the_next_one(order: Order) -> None:
    """Otherwise nothing is recorded, and no heartbeat sent, until the whole backlog is handled."""
    order.pure.takes_s = 0.1
    unacked = []
    order.deliver(*(body(str(n)) for n in range(100)))
    while len(order.pure.seen) < 100:
        order.advance(0.1)
        unacked.append(len(order.pure.seen) - len(order.acked))
    assert max(unacked, default=100) < 3
    order.advance(1.0)
    assert order.count("processed") == 100


def test_commits_in_flight_are_bounded_and_the_next_batch_fills_meanwhile(order: Order) -> None:
    """Up to the batch size: 128 operations, two per event."""
    order.etcd.fate = slow_commits
    for number in range(200):
        order.deliver(body(str(number)))
    sent = [1] + [int(SMALL_BATCH * SETTINGS.batch_size)] * (COMMITS_IN_FLIGHT - 1)
    assert batch_sizes(order) == sent
    order.advance(1.0)
    assert batch_sizes(order) == [*sent, 64, 200 - sum(sent) - 64]
    order.advance(1.0)
    assert order.count("processed") == 200


def test_a_commit_that_etcd_refuses_holds_up_no_small_batch_and_no_log_line(
    order: Order,
) -> None:
    def refuse(call: Call) -> Fate:
        return REQUEST_LOST if b"/refused" in call.request.SerializeToString() else FINE

    order.etcd.fate = refuse
    order.deliver(body("refused"))
    order.deliver(body("1"))
    order.advance(CATCH_UP_EVERY_S)
    assert order.counts() == {"received": 2, "processed": 1}
    assert order.logged("processed") == []
    order.advance(CATCH_UP_EVERY_S)
    assert [line["event_id"] for line in order.logged("processed")] == ["1"]
    order.etcd.fate = lambda _: FINE
    order.advance(60.0)
    assert order.counts() == {"received": 2, "processed": 2}


def test_under_load_each_failure_has_a_line_of_its_own(order: Order) -> None:
    order.etcd.fate = lambda _: Fate(answers_s=0.02)
    for second in range(5):
        for number in range(20):
            if number == 10:
                order.pure.fails = 1
            order.deliver(*(body(f"{second}-{number}-{n}") for n in range(10)))
            order.advance(0.01)
    assert len(order.logged("it comes back later")) == 5


def test_a_commit_that_is_sent_again_still_counts_as_one_in_flight(order: Order) -> None:
    order.world.start().deliver(body("0"))
    # It does not apply, is read, and what is left is sent again.
    order.etcd.script("Txn", FINE, FINE, Fate(answers_s=2.0))
    order.deliver(*(body(str(n)) for n in range(3)))
    order.etcd.fate = slow_commits
    before = len(batch_sizes(order))
    for number in range(10, 210):
        order.deliver(body(str(number)))
    assert len(batch_sizes(order)) - before == COMMITS_IN_FLIGHT - 1
    order.advance(10)
    assert order.counts() == {"received": 203, "processed": 202, "processed_skipped": 1}


# The stop.


@pytest.mark.parametrize("handlers", [Pure(), Claimed(waits=True, timeout_s=60.0)])
def test_a_stop_requeues_what_is_left(order: Order, handlers: Pure | Claimed) -> None:
    """An event may be waiting for etcd, or for its call."""
    order = order.world.start(handlers)
    if isinstance(handlers, Pure):
        order.etcd.fate = lambda _: REQUEST_LOST
    order.deliver(body("1"))
    order.stop()
    order.deliver(body("later"))
    order.advance(FINISH_WITHIN_S - 0.1)
    assert not order.task.done()
    order.advance(1.5)
    assert order.task.done()
    assert order.counts() == {"received": 1, "returned": 1}
    assert sorted(order.broker.queues["order"].bodies) == [body("1"), body("later")]


def test_the_stop_waits_for_the_commit_of_an_event_without_a_handler(order: Order) -> None:
    order.etcd.fate = slow_commits
    order.deliver(body("1", "refund"))
    order.stop()
    order.advance(FINISH_WITHIN_S)
    assert order.counts() == {"received": 1, "ignored": 1}


def test_the_stop_waits_for_deliveries_that_have_not_had_their_turn(order: Order) -> None:
    order.pure.takes_s = 0.1
    order.deliver(*(body(str(n)) for n in range(3)))
    order.world.agenda.run(enough=lambda: len(order.acked) == 1)
    order.stop()
    order.advance(FINISH_WITHIN_S)
    assert order.counts() == {"received": 3, "processed": 3}


# An etcd that is not the one seen before.


def test_nothing_is_settled_once_etcd_is_not_the_same(order: Order) -> None:
    """Not deliveries past a gap, nor what the cache knows, nor what needs no record."""
    order.deliver(body("1"))
    order.etcd.script("Txn", Fate(answers_s=5.0))
    order.deliver(body("the gap"))
    order.deliver(body("past the gap"))
    order.broker.confirms = False
    order.deliver(b"parked before, confirmed after")
    order.store.wipe()
    order.deliver(body("2"))
    order.deliver(body("1"), body("3"))
    order.advance(6)
    order.confirm()
    order.deliver(body("1"), b"not JSON", body("4", "a type without a handler"))
    order.advance(600)
    assert order.acks == [Ack(1, (1,), True)]
    assert (order.in_hand, len(order.forwarded)) == (8, 1)
    assert "etcd" in order.running.health.missing


# How long after its record a duplicate came.


def record(order: Order, event_id: str, time: str) -> None:
    """Write the record of an event as another process would."""
    value = encode(DONE, decode(body(event_id)).digest, "b" * 32 + "/1/1", time)
    order.store.put(f"/service/order/{event_id}", value)


def at(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def ages(order: Order) -> tuple[int, float]:
    """Return how many ages of duplicates were read, and the highest."""
    document = order.running.duplicates.document
    assert len(order.metrics.timings["orders_duplicate_age"]) == document["read"]
    return document["read"], document["oldest_s"]


@pytest.mark.parametrize(
    ("time", "read", "age_s"),
    [
        (at(-93), 1, 93.0),
        (at(60), 1, 0.0),  # Clocks differ.
        ("", 0, 0.0),
        ("yesterday", 0, 0.0),
        ("9999-99-99T00:00:00+00:00", 0, 0.0),
    ],
)
def test_a_duplicate_is_as_old_as_its_record_says(
    order: Order, time: str, read: int, age_s: float
) -> None:
    record(order, "1", time)
    order.deliver(body("1"))
    assert ages(order) == (read, age_s)
    assert order.running.duplicates.document["within"] == {
        name: int(read and bound_s >= age_s) for name, bound_s in BOUNDS_S.items()
    }
    assert order.count("processed_skipped") == 1


def test_of_the_duplicates_that_the_cache_knows_one_a_second_is_read(order: Order) -> None:
    order.deliver(body("1"), body("2"))
    order.world.skip(7200)
    for _ in range(3):
        order.deliver(body("1"), body("2"), body("1"))
    assert ages(order) == (1, 7200.0)
    assert len(order.etcd.sent("Txn")) == 2, "the incarnation, and the batch"
    order.advance(1.0)
    order.deliver(body("2"), body("2"))
    assert ages(order) == (2, 7201.0)
    assert order.count("processed_skipped") == 11
    record(order, "3", at(7200))
    order.deliver(body("3"))
    assert ages(order) == (3, 7201.0)


@pytest.mark.parametrize("gone", [True, False])
def test_a_read_that_fails_or_finds_nothing_delays_nothing(order: Order, gone: bool) -> None:
    order.deliver(body("1"))
    if gone:
        order.store.delete("/service/order/1")
    else:
        order.etcd.script("Range", REQUEST_LOST)
    order.deliver(body("1"))
    assert ages(order) == (0, 0.0)
    assert (order.count("processed_skipped"), order.in_hand) == (1, 0)
    order.advance(10)
    assert "etcd" not in order.running.health.missing, "the guard's next reading has cleared it"


@pytest.mark.parametrize("enable_etcd", [True, False])
def test_what_is_no_duplicate_has_no_age(order: Order, enable_etcd: bool) -> None:
    """Such as an event whose commit is sent again, or a second delivery without etcd."""
    order = order.world.start(settings=Settings(enable_etcd=enable_etcd))
    order.etcd.script("Txn", REQUEST_LOST)
    order.deliver(body("1"), *([] if enable_etcd else [body("1")]))
    order.advance(10)
    assert order.count("processed") == 2 - enable_etcd
    assert ages(order) == (0, 0.0)
