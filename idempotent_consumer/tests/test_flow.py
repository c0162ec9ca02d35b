"""What becomes of each delivery of an event with a pure handler, from its arrival to its ack."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from types import FrameType

import pika
import pytest

from fakes.events import Claimed, Pure, body
from fakes.ledger import OTHER_DIGEST
from fakes.world import DEAD_LETTERS, FIRST_RETRY, OrderProcess, World
from idempotent_consumer.bus import COMMITS_IN_FLIGHT
from idempotent_consumer.calls import Handler
from idempotent_consumer.event import Event, Publish, Put, decode
from idempotent_consumer.flow import ACK_ALL_EVERY_S, Consumer
from idempotent_consumer.records import CLAIMED, DONE, PUBLISHING, RELEASED, encode
from idempotent_consumer.service import FINISH_WITHIN_S
from idempotent_consumer.settings import Settings
from idempotent_consumer.testing.broker import Ack
from idempotent_consumer.testing.etcd import (
    ANSWER_LOST,
    FINE,
    REQUEST_LOST,
    Call,
    Fate,
    answered_late,
)
from idempotent_consumer.testing.process import SETTINGS

BODIES = 800
RETRIED_S = 72.0
"""The retry delays together, and a second."""


@pytest.fixture
def world() -> Iterator[World]:
    """Give a world; whatever the test did, each delivery is counted once and acked when it may."""
    world = World()
    yield world
    world.close()


@pytest.fixture
def handler() -> Pure:
    return Pure()


@pytest.fixture
def process(world: World, handler: Pure) -> OrderProcess:
    return world.start(Handler(handler))


class Slow:
    """A pure handler that computes for so long, in the first process."""

    def __init__(self, world: World, takes_s: float) -> None:
        self._world, self.takes_s, self.seen = world, takes_s, list[str]()

    def __call__(self, event: Event) -> None:
        self.seen.append(event.id)
        self._world.processes[0].loop.spend(self.takes_s)


def slow_commits(call: Call) -> Fate:
    """Let transactions be answered after a second."""
    return answered_late(1.0) if call.method == "Txn" else FINE


# Recorded, then acked.


def test_an_event_is_handled_recorded_and_then_acked(
    world: World, process: OrderProcess, handler: Pure
) -> None:
    process.etcd.script("Txn", answered_late(3.0))
    process.deliver(body("1", n=1))
    assert world.store.keys("/orders/") == ["/orders/1"]
    assert world.record().state == "done"
    assert process.acks == [], "it is there, but etcd has not said so yet"
    world.advance(3.0)
    assert process.acks == [Ack(1, (1,), True)]
    assert handler.seen == ["1"]
    assert process.counts() == {"received": 1, "processed": 1}


def test_nothing_is_acked_while_the_outcome_is_unknown(world: World, process: OrderProcess) -> None:
    process.etcd.fate = lambda _: ANSWER_LOST
    process.deliver(body("1"), body("2"))
    world.advance(600)
    assert (process.acks, process.forwarded) == ([], [])
    assert process.in_hand == 2
    process.etcd.fate = lambda _: FINE
    world.advance(30)
    assert process.acks == [Ack(1, (1, 2), True)]
    assert process.count("processed") == 2


def test_an_event_whose_answer_was_lost_is_processed_once(
    world: World, process: OrderProcess, handler: Pure
) -> None:
    process.etcd.script("Txn", ANSWER_LOST, ANSWER_LOST)
    process.deliver(body("1"))
    world.advance(30)
    assert process.counts() == {"received": 1, "processed": 1}
    assert handler.seen == ["1"]
    assert world.store.get("/orders/1").version == 1


def test_a_duplicate_is_skipped(process: OrderProcess, handler: Pure) -> None:
    process.deliver(body("1"))
    process.deliver(body("1"))
    assert process.counts() == {"received": 2, "processed": 1, "processed_skipped": 1}
    assert handler.seen == ["1"], "the cache knew it"
    assert len(process.acked) == 2


def test_a_duplicate_of_another_replicas_event_is_skipped(
    world: World, process: OrderProcess
) -> None:
    world.start(Handler(Pure())).deliver(body("1"))
    process.deliver(body("1"))
    assert process.counts() == {"received": 1, "processed_skipped": 1}
    assert world.store.get("/orders/1").version == 1


def test_equal_events_in_one_batch_are_one(process: OrderProcess, handler: Pure) -> None:
    """One is processed, the others are its duplicates."""
    process.deliver(*[body("1")] * 5, body("2"))
    assert process.counts() == {"received": 6, "processed": 2, "processed_skipped": 4}
    assert handler.seen == ["1", "2"]
    assert process.acks == [Ack(1, (1, 2, 3, 4, 5, 6), True)]
    assert batch_sizes(process) == [2]


def test_a_duplicate_that_arrives_during_the_commit_waits_for_it(
    world: World, process: OrderProcess, handler: Pure
) -> None:
    process.etcd.script("Txn", answered_late(1.0))
    process.deliver(body("1"))
    process.deliver(body("1"))
    assert process.acks == []
    world.advance(1.0)
    assert process.counts() == {"received": 2, "processed": 1, "processed_skipped": 1}
    assert handler.seen == ["1"]


def test_a_producers_other_way_of_writing_is_a_duplicate(process: OrderProcess) -> None:
    process.deliver(b'{"id":"1","type":"new_order","args":{"a":1,"b":2}}')
    process.deliver(b'{"args": {"b":2, "a":1}, "type":"new_order", "id":"1", "sent":"later"}')
    assert process.count("processed_skipped") == 1


def test_without_etcd_every_delivery_is_processed(world: World) -> None:
    process = world.start(Handler(Pure()), settings=Settings())
    process.deliver(body("1"), body("1"))
    process.deliver(body("1"))
    assert process.counts() == {"received": 3, "processed": 3}
    assert process.etcd.calls == []
    assert len(process.acked) == 3


def test_without_etcd_a_failing_event_is_retried_and_parked_all_the_same(world: World) -> None:
    process = world.start(Handler(Pure(fails=9)), settings=Settings())
    process.deliver(body("1"))
    world.advance(RETRIED_S)
    assert process.counts() == {"received": 4, "retried": 3, "failed": 1}
    assert len(process.sent_to(DEAD_LETTERS)) == 1


# Ignored and parked.


def test_a_type_without_a_handler_is_ignored_and_acked(process: OrderProcess) -> None:
    process.deliver(body("1", "refund"))
    assert process.counts() == {"received": 1, "ignored": 1}
    assert len(process.acked) == 1
    assert process.forwarded == []


def test_a_type_without_a_handler_is_ignored_where_a_replica_with_one_has_done_it(
    world: World, process: OrderProcess
) -> None:
    newer = world.start({"refund": Handler(Pure())})
    newer.deliver(body("1", "refund"))
    process.deliver(body("1", "refund"))
    assert process.counts() == {"received": 1, "ignored": 1}


@pytest.mark.parametrize("state", [CLAIMED, RELEASED, PUBLISHING, DONE])
@pytest.mark.parametrize("ours", [True, False])
def test_a_type_without_a_handler_is_held_while_its_record_is_short_of_done(
    world: World, process: OrderProcess, state: str, ours: bool
) -> None:
    """It counts as no attempt; a record of another body says nothing of this one."""
    event = decode(body("1", "refund"))
    held = ours and state != DONE
    digest = event.digest if ours else OTHER_DIGEST
    events = [body("1/order/0", "refunded")] if state == PUBLISHING else []
    world.store.put("/service/order/1", encode(state, digest, "b/1/1", "now", events))
    process.deliver(body("1", "refund"))
    assert process.counts() == {"received": 1, "retried" if held else "ignored": 1}
    sent = [(message.routing_key, message.headers) for message in process.forwarded]
    assert sent == ([("order.retry.60s", {"x-attempts": 0})] if held else [])
    said = [line for line in process.lines.entries if "has begun it" in str(line)]
    assert len(said) == held


def test_what_a_process_with_a_handler_has_recorded_is_published_though_it_died(
    world: World, process: OrderProcess
) -> None:
    """The broker gives its delivery to the one without; that hands it on until another has one."""
    handlers = {"refund": Handler(lambda _: Publish("refunded"))}
    died = world.start(handlers)
    died.broker.confirms = False
    died.deliver(body("1", "refund"))
    died.kill()
    process.deliver(body("1", "refund"))
    world.advance(3 * 61)
    assert process.counts() == {"received": 4, "retried": 4}
    newer = world.start(handlers)
    newer.deliver(process.forwarded[-1].body)
    world.advance(15)
    assert len(newer.published) == 1
    assert newer.counts() == {"received": 1, "processed_skipped": 1}
    world.advance(61)
    assert process.counts() == {"received": 5, "retried": 4, "ignored": 1}


def test_an_event_that_a_replica_with_a_handler_has_begun_comes_back_where_there_is_none(
    world: World, process: OrderProcess
) -> None:
    """Its holder may die with events to publish, and this delivery be the only one left."""
    newer = world.start({"refund": Handler(lambda _: Publish("refunded"))})
    newer.broker.confirms = False
    newer.deliver(body("1", "refund"))
    process.deliver(body("1", "refund"))
    assert process.counts() == {"received": 1, "retried": 1}
    (retry,) = process.forwarded
    assert (retry.routing_key, retry.headers["x-attempts"]) == ("order.retry.60s", 0)
    newer.confirm()
    world.advance(61)
    assert process.counts() == {"received": 2, "retried": 1, "ignored": 1}


def test_an_event_without_a_handler_is_not_acked_while_etcd_is_away(
    world: World, process: OrderProcess
) -> None:
    process.etcd.fate = lambda _: REQUEST_LOST
    process.deliver(body("1", "refund"))
    world.advance(60)
    assert process.acks == []
    process.etcd.fate = lambda _: FINE
    world.advance(10)
    assert process.counts() == {"received": 1, "ignored": 1}


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
    world: World, process: OrderProcess, bad: bytes
) -> None:
    process.deliver(body("1"), bad, body("2"))
    assert process.counts() == {"received": 3, "processed": 2, "invalid": 1}
    (parked,) = process.sent_to(DEAD_LETTERS)
    assert parked.body == bad
    assert parked.headers["x-reason"] == "invalid"
    assert parked.headers["x-error"]
    assert world.store.keys("/service/") == ["/service/order/1", "/service/order/2"]
    assert len(process.acked) == 3


def test_a_parked_delivery_is_acked_only_once_the_broker_has_confirmed(
    process: OrderProcess,
) -> None:
    process.broker.confirms = False
    process.deliver(b"bad")
    assert len(process.sent_to(DEAD_LETTERS)) == 1
    assert process.acks == []
    assert process.count("invalid") == 0
    process.confirm()
    assert process.acks == [Ack(1, (1,), True)]
    assert process.count("invalid") == 1


def test_the_same_id_with_another_body_is_parked_and_the_record_stays(
    world: World, process: OrderProcess
) -> None:
    process.deliver(body("1", n=1))
    before = world.store.get("/service/order/1"), world.store.get("/orders/1")
    process.deliver(body("1", n=2))
    assert process.counts() == {"received": 2, "processed": 1, "conflicted": 1}
    (parked,) = process.sent_to(DEAD_LETTERS)
    assert (parked.body, parked.headers["x-reason"]) == (body("1", n=2), "conflict")
    assert (world.store.get("/service/order/1"), world.store.get("/orders/1")) == before


def test_two_bodies_in_one_batch_first_wins(world: World, process: OrderProcess) -> None:
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
    assert [message.body for message in process.sent_to(DEAD_LETTERS)] == [
        body("1", n=2),
        body("1", n=2),
        body("1", n=3),
    ]
    assert world.store.get("/orders/1").value == b'{"n":1}'


def test_the_other_body_gets_its_turn_when_the_first_fails(
    world: World, process: OrderProcess, handler: Pure
) -> None:
    """Nothing was recorded of the first, so the second is the event; the first's retry is not."""
    handler.fails = 1
    process.deliver(body("1", n=1), body("1", n=2))
    assert process.counts() == {"received": 2, "retried": 1, "processed": 1}
    world.advance(1.0)
    assert process.count("conflicted") == 1
    assert world.store.get("/orders/1").value == b'{"n":2}'


def test_each_other_body_gets_its_turn_until_one_is_recorded(
    world: World, process: OrderProcess, handler: Pure
) -> None:
    handler.fails = 2
    process.deliver(*(body("1", n=n) for n in (1, 2, 3, 4, 3)))
    assert process.counts() == {
        "received": 5,
        "retried": 2,
        "processed": 1,
        "processed_skipped": 1,
        "conflicted": 1,
    }
    assert world.store.get("/orders/1").value == b'{"n":3}'


def decodings(work: Callable[[], object]) -> int:
    """Return how many bodies are decoded by the way of an event while some work is done."""
    calls = 0

    def look(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        if event == "call" and frame.f_code is decode.__code__ and frame.f_back:
            calls += frame.f_back.f_globals["__name__"] == Consumer.__module__

    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("claimed", [False, True])
def test_many_bodies_of_one_id_are_each_decoded_and_judged_once(
    world: World, claimed: bool
) -> None:
    """What is recorded decides about all that wait: going over them after each is quadratic."""
    process = world.start(Claimed().handler if claimed else Handler(Pure()))
    bodies = [body("1", n=n) for n in range(BODIES)]
    for n in range(BODIES // 8):
        bodies.insert(n * 9, body(f"good {n}"))
    assert decodings(lambda: process.deliver(*bodies)) == len(bodies)
    assert process.count("processed") == 1 + BODIES // 8
    assert process.count("conflicted") == BODIES - 1
    # Those that waited are judged without another question, those that came later in batches.
    assert len(process.etcd.sent("Txn")) < BODIES / 8


def test_bodies_of_one_id_that_wait_are_judged_by_what_another_replica_has_recorded(
    world: World, process: OrderProcess
) -> None:
    """One that is the recorded one is its duplicate, whatever it waited for."""
    world.start(Handler(Pure())).deliver(body("1", n=3))
    process.deliver(*(body("1", n=n) for n in (1, 2, 3, 4, 3, 2)))
    assert process.counts() == {"received": 6, "processed_skipped": 2, "conflicted": 4}
    parked = sorted(message.body for message in process.sent_to(DEAD_LETTERS))
    assert parked == [body("1", n=n) for n in (1, 2, 2, 4)]


@pytest.mark.parametrize("claimed", [False, True])
def test_bodies_of_one_id_that_all_fail_are_each_tried(world: World, claimed: bool) -> None:
    pure, call = Pure(fails=200), Claimed(fails=200)
    settings = replace(SETTINGS, breaker_failures=0)
    process = world.start(call.handler if claimed else Handler(pure), settings=settings)
    assert decodings(lambda: process.deliver(*(body("1", n=n) for n in range(200)))) == 200
    assert len(pure.seen) + len(call.calls) == 200
    assert process.counts() == {"received": 200, "retried": 200}


# A handler that raises.


def test_a_failing_event_is_retried_on_the_broker_and_its_batch_mates_go_on(
    world: World, process: OrderProcess, handler: Pure
) -> None:
    handler.fails = 1
    process.deliver(body("1"), body("2"))
    assert process.counts() == {"received": 2, "retried": 1, "processed": 1}
    (retry,) = process.forwarded
    assert (retry.routing_key, retry.body) == (FIRST_RETRY, body("1"))
    assert retry.headers["x-attempts"] == 1
    assert world.store.keys("/service/") == ["/service/order/2"]
    world.advance(1.0)
    assert process.count("processed") == 2
    assert handler.seen == ["1", "2", "1"]


def test_after_the_last_delay_it_is_parked_with_its_error_and_attempts(
    world: World, process: OrderProcess, handler: Pure
) -> None:
    handler.fails = 99
    process.deliver(body("1"))
    world.advance(RETRIED_S)
    assert [message.routing_key for message in process.forwarded] == [
        "order.retry.1s",
        "order.retry.10s",
        "order.retry.60s",
        DEAD_LETTERS,
    ]
    parked = process.forwarded[-1]
    assert parked.body == body("1")
    headers = {name: value for name, value in parked.headers.items() if name != "x-death"}
    parked_at = datetime.fromisoformat(headers.pop("x-parked-at"))
    assert parked_at == datetime.fromtimestamp(71, UTC)
    assert headers == {
        "x-reason": "failed",
        "x-error": "RuntimeError: out of stock",
        "x-attempts": 4,
    }
    assert process.counts() == {"received": 4, "retried": 3, "failed": 1}
    assert len(process.acked) == 4


def test_a_retry_is_acked_only_once_the_broker_has_confirmed_it(
    process: OrderProcess, handler: Pure
) -> None:
    handler.fails = 1
    process.broker.confirms = False
    process.deliver(body("1"))
    assert len(process.forwarded) == 1
    assert process.acks == []
    process.confirm()
    assert len(process.acks) == 1


def test_a_handler_that_raises_on_what_is_done_skips_it(
    world: World, handler: Pure, process: OrderProcess
) -> None:
    """The record is looked at first: its ack was lost, and a retry would process it again."""
    world.start(Handler(Pure())).deliver(body("1"))
    handler.fails = 1
    process.deliver(body("1"))
    assert process.counts() == {"received": 1, "processed_skipped": 1}
    assert process.forwarded == []


def test_a_handler_that_raises_on_another_body_of_what_is_done_is_a_conflict(
    world: World, handler: Pure, process: OrderProcess
) -> None:
    world.start(Handler(Pure())).deliver(body("1", n=1))
    handler.fails = 1
    process.deliver(body("1", n=2))
    assert process.counts() == {"received": 1, "conflicted": 1}


def test_a_failing_event_is_not_sent_on_while_etcd_is_away(
    world: World, handler: Pure, process: OrderProcess
) -> None:
    """Whether it is a duplicate is not known yet."""
    handler.fails = 1
    process.etcd.fate = lambda _: REQUEST_LOST
    process.deliver(body("1"))
    world.advance(60)
    assert process.forwarded == []
    process.etcd.fate = lambda _: FINE
    world.advance(30)
    assert process.count("retried") == 1


def test_merged_deliveries_of_a_failing_event_are_each_retried_by_their_own_count(
    process: OrderProcess, handler: Pure
) -> None:
    handler.fails = 1
    process.etcd.script("Txn", answered_late(1.0))
    process.deliver(body("1"))
    process.deliver(body("1"), properties=pika.BasicProperties(headers={"x-attempts": 2}))
    process.loop.advance(1.0)
    assert [(m.routing_key, m.headers["x-attempts"]) for m in process.forwarded] == [
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
    world: World, returned: object
) -> None:
    """Retried, and never sent to etcd; its batch mates are recorded."""

    def handler(event: Event) -> object:
        return returned if event.id == "bad" else None

    process = world.start(Handler(handler))
    process.deliver(body("1"), body("bad"), body("2"))
    assert process.counts() == {"received": 3, "processed": 2, "retried": 1}
    assert world.store.keys("/service/") == ["/service/order/1", "/service/order/2"]


def test_effects_may_be_none_one_or_many(world: World) -> None:
    returned = {
        "none": None,
        "one": Put("/one", b"1"),
        "list": [Put("/l", b"1")],
        "generator": (Put(f"/g{n}", b"") for n in range(2)),
    }
    process = world.start(Handler(lambda event: returned[event.id]))
    process.deliver(*map(body, returned))
    assert process.count("processed") == 4
    assert world.store.keys("/") == [
        "/g0",
        "/g1",
        "/incarnation/order",
        "/l",
        "/one",
        *sorted(f"/service/order/{name}" for name in returned),
    ]


def test_a_handler_that_took_long_is_named_and_again_when_it_takes_twice_as_long(
    world: World,
) -> None:
    """Heartbeats have waited for it, and so have all other events."""
    slow = Slow(world, 0.0)
    process = world.start(Handler(slow))
    for number, takes_s in enumerate([0.09, 0.1, 0.19, 0.2, 0.3, 3.0]):
        slow.takes_s = takes_s
        process.deliver(body(str(number)))
        world.advance(takes_s)
    named = [
        (line["event_id"], line["seconds"]) for line in process.logged("a pure handler took long")
    ]
    assert named == [("1", 0.1), ("3", 0.2), ("5", 3.0)]
    world.advance(1)
    assert process.count("processed") == 6


def test_a_loop_that_was_blocked_is_reported_and_again_when_it_is_twice_as_long(
    world: World,
) -> None:
    slow = Slow(world, 0.0)
    process = world.start(Handler(slow))
    reported = list[int]()
    for number, takes_s in enumerate([0.9, 2.0, 2.0, 5.0]):
        slow.takes_s = takes_s
        process.deliver(body(str(number)))
        world.advance(takes_s + 1)
        reported.append(len(process.logged("the event loop was blocked")))
    assert reported == [0, 1, 1, 2]


# The channel goes.


def test_a_redelivery_joins_the_event_that_is_still_in_flight(
    world: World, process: OrderProcess, handler: Pure
) -> None:
    """The commit was under way when the channel went; its answer settles the new delivery."""
    process.etcd.script("Txn", answered_late(2.0))
    process.deliver(body("1"))
    process.reconnect()
    assert process.count("received") == 2
    world.advance(2.0)
    assert handler.seen == ["1"]
    assert world.store.get("/orders/1").version == 1
    assert process.acks == [Ack(2, (1,), True)]
    assert process.counts() == {"received": 2, "returned": 1, "processed": 1}


def test_what_is_recorded_after_its_channel_went_is_not_acked_on_the_next(
    world: World, process: OrderProcess
) -> None:
    """A tag of the old channel would ack another message on the new one."""
    process.etcd.script("Txn", answered_late(2.0), answered_late(9.0))
    process.deliver(body("1"))
    consuming = process.broker.queues["order"].consumers[0].channel
    (_, requeued) = consuming.unacked[1]
    process.lose_channel()
    process.broker.queues["order"].ready.remove(requeued)
    process.deliver(body("2"))
    world.advance(3.0)
    assert world.record("1").state == "done"
    assert (process.acks, process.in_hand) == ([], 1)
    world.advance(7.0)
    assert process.acked == [body("2")]
    assert process.counts() == {"received": 2, "returned": 1, "processed": 1}


def test_a_parking_that_is_confirmed_after_its_channel_went_settles_nothing(
    process: OrderProcess,
) -> None:
    process.broker.confirms = False
    process.deliver(b"bad")
    process.lose_channel()
    process.confirm()
    assert process.counts() == {"received": 1, "returned": 1}
    process.broker.confirms = True
    process.loop.advance(1.0)
    assert process.counts() == {"received": 2, "returned": 1, "invalid": 1}
    assert len(process.sent_to(DEAD_LETTERS)) == 2, "parked at least once"


def test_a_delivery_that_went_back_before_it_was_looked_at_is_not_handled(world: World) -> None:
    """The turns before it took so long that its channel had gone by then."""
    slow = Slow(world, 1.0)
    process = world.start(Handler(slow))
    process.deliver(*(body(str(n)) for n in range(10)))
    assert slow.seen == ["0"]
    process.broker.away = True
    process.lose_channel()
    world.advance(20.0)
    assert len(slow.seen) < 5, "a few have their turn before the loss is read"
    assert process.counts() == {"received": 10, "returned": 10}


def test_a_duplicate_in_flight_from_a_dead_channel_does_not_take_the_processed_count(
    world: World, process: OrderProcess
) -> None:
    process.etcd.script("Txn", answered_late(2.0))
    process.deliver(body("1"), body("1"))
    process.reconnect()
    world.advance(2.0)
    assert process.counts() == {
        "received": 4,
        "returned": 2,
        "processed": 1,
        "processed_skipped": 1,
    }


# Turns and batches.


def batch_sizes(process: OrderProcess) -> list[int]:
    """Return how many records each transaction would put, without those that put none."""
    sizes = [
        sum(operation.request_put.key.startswith(b"/service/") for operation in request.success)
        for request in process.etcd.sent("Txn")
    ]
    return [size for size in sizes if size]


def test_one_waiting_event_is_committed_at_once(world: World, process: OrderProcess) -> None:
    """No timer is waited for: with an etcd that answers, not a moment passes."""
    before_s = world.agenda.now_s
    process.deliver(body("1"))
    assert world.agenda.now_s == before_s
    assert len(process.acked) == 1


def test_where_no_commit_is_under_way_the_next_is_sent_in_the_same_turn(
    process: OrderProcess,
) -> None:
    """While one is, what waits gets the loop's next turn, which may bring more for its batch."""
    process.deliver(body("0"))
    process.etcd.fate = slow_commits
    steps = steps_until_sent(process, body("1"), 2)
    assert steps_until_sent(process, body("2"), 3) > steps


def steps_until_sent(process: OrderProcess, event: bytes, batches: int) -> int:
    """Deliver an event, and return how many steps there are until so many batches are sent."""
    before = process.world.agenda.happened
    process.broker.publish("", "order", event)
    process.world.agenda.run(enough=lambda: len(batch_sizes(process)) == batches)
    return process.world.agenda.happened - before


def test_what_arrived_together_is_one_transaction_up_to_the_batch_size(
    process: OrderProcess,
) -> None:
    process.deliver(*(body(str(n)) for n in range(100)))
    assert batch_sizes(process) == [64, 36], "128 operations, two an event"


def test_a_turn_is_bounded_and_what_it_has_handled_is_recorded_before_the_next(
    world: World,
) -> None:
    """Else nothing is recorded, and no heartbeat sent, before the whole backlog is handled."""
    slow, unacked = Slow(world, 0.1), list[int]()
    process = world.start(Handler(slow))
    process.deliver(*(body(str(n)) for n in range(100)))
    while len(slow.seen) < 100:
        world.advance(0.1)
        unacked.append(len(slow.seen) - len(process.acked))
    assert max(unacked) < 10
    world.advance(1.0)
    assert process.count("processed") == 100


def test_other_tasks_have_their_turn_between_slow_handlers(world: World) -> None:
    """What is counted is sent every half second, and that the loop turns is said."""
    process = world.start(Handler(Slow(world, 0.1)))
    beats = list[float]()
    process.running.health.beat = lambda: beats.append(world.agenda.now_s)  # type: ignore[method-assign]
    process.deliver(*(body(str(n)) for n in range(100)))
    world.advance(5.0)
    assert len(beats) >= 5


def test_commits_in_flight_are_bounded_and_the_next_batch_fills_meanwhile(
    world: World, process: OrderProcess
) -> None:
    process.etcd.fate = slow_commits
    for number in range(20):
        process.deliver(body(str(number)))
    assert batch_sizes(process) == [1] * COMMITS_IN_FLIGHT
    world.advance(1.0)
    assert batch_sizes(process) == [1] * COMMITS_IN_FLIGHT + [20 - COMMITS_IN_FLIGHT]
    world.advance(1.0)
    assert process.count("processed") == 20


def test_commits_that_end_out_of_order_ack_only_what_they_recorded(
    world: World, process: OrderProcess
) -> None:
    """The first is late: the second's ack is single, past the gap, once it is seen to stay."""
    process.etcd.script("Txn", answered_late(5.0))
    process.deliver(body("1"), body("2"))
    process.deliver(body("3"))
    assert process.acks == []
    world.advance(ACK_ALL_EVERY_S)
    assert process.acks == [Ack(1, (3,), False)]
    world.advance(5.0)
    assert process.acks[1:] == [Ack(1, (1, 2), True)]


def test_a_commit_that_is_sent_again_still_counts_as_one_in_flight(
    world: World, process: OrderProcess
) -> None:
    world.start(Handler(Pure())).deliver(body("0"))
    # It does not apply, is read, and what is left is sent again.
    process.etcd.script("Txn", FINE, FINE, answered_late(2.0))
    process.deliver(*(body(str(n)) for n in range(3)))
    process.etcd.fate = slow_commits
    before = len(batch_sizes(process))
    for number in range(10, 30):
        process.deliver(body(str(number)))
    assert len(batch_sizes(process)) - before == COMMITS_IN_FLIGHT - 1
    world.advance(10)
    assert process.counts() == {"received": 23, "processed": 22, "processed_skipped": 1}


# The stop.


def test_the_stop_settles_what_has_arrived_and_takes_no_more(world: World) -> None:
    process = world.start(Handler(Slow(world, 0.1)))
    process.deliver(*(body(str(n)) for n in range(20)))
    process.stop()
    world.advance(1.0)
    process.deliver(body("later"))
    assert not process.task.done()
    world.advance(5.0)
    assert process.task.done()
    assert process.counts() == {"received": 20, "processed": 20}
    assert process.broker.queues["order"].bodies == [body("later")]
    assert process.broker.connections == []


def test_the_stop_waits_no_longer_than_its_time_and_hands_back_what_is_left(
    world: World, process: OrderProcess
) -> None:
    process.etcd.fate = lambda _: REQUEST_LOST
    process.deliver(body("1"))
    process.stop()
    world.advance(FINISH_WITHIN_S - 0.1)
    assert not process.task.done()
    world.advance(1.5)
    assert process.task.done()
    assert process.counts() == {"received": 1, "returned": 1}
    assert process.broker.queues["order"].bodies == [body("1")]


def test_a_process_that_has_not_reached_etcd_can_be_stopped(world: World) -> None:
    process = world.start(Handler(Pure()), reaches_etcd=False)
    world.advance(60)
    process.stop()
    world.advance(2)
    assert process.task.done()


# An etcd that is not the one seen before.


def test_what_is_settled_past_a_gap_is_not_acked_once_etcd_is_another(
    world: World, process: OrderProcess
) -> None:
    """It was judged by records that are gone."""
    process.etcd.script("Txn", answered_late(5.0))
    process.deliver(body("1"), body("2"))
    process.deliver(body("3"))
    world.store.wipe()
    process.deliver(body("4"))
    assert process.ledger.halted
    world.advance(60)
    assert process.acks == []


def test_when_etcd_is_another_nothing_is_settled_any_more(
    world: World, process: OrderProcess
) -> None:
    """Not even what the cache knew, nor what rests on no record: all of it is held."""
    process.deliver(body("1"))
    process.broker.confirms = False
    process.deliver(b"parked before, confirmed after")
    world.store.wipe()
    process.deliver(body("2"))
    process.deliver(body("1"), body("3"))
    world.advance(5)
    process.confirm()
    process.deliver(body("1"), b"not JSON", body("4", "a type without a handler"))
    world.advance(600)
    assert process.acks == [Ack(1, (1,), True)]
    assert (process.in_hand, len(process.forwarded)) == (7, 1)
    assert "etcd" in process.health.missing


def test_each_key_is_put_once(world: World, process: OrderProcess) -> None:
    for _ in range(3):
        process.deliver(*(body(str(n % 7)) for n in range(30)))
    keys = [change.key for change in world.store.history if change.key != b"/incarnation/order"]
    assert len(keys) == len(set(keys)) == 14


# A cache that is smaller than what is done.

EVENTS = 200
ENTRIES = 20


def shuffled_ids(seed: int) -> list[str]:
    ids = [str(number) for number in range(EVENTS)]
    random.Random(seed).shuffle(ids)
    return ids


@pytest.mark.parametrize("seed", range(3))
def test_what_is_forgotten_is_asked_for_and_skipped(world: World, handler: Pure, seed: int) -> None:
    process = world.start(Handler(handler), cache_entries=ENTRIES)
    for event_id in (*map(str, range(EVENTS)), *shuffled_ids(seed), *shuffled_ids(seed + 100)):
        process.deliver(body(event_id))
    assert process.count("processed") == EVENTS
    assert process.count("processed_skipped") == 2 * EVENTS
    assert set(Counter(change.key for change in world.store.puts("/")).values()) == {1}
    assert len(handler.seen) > EVENTS, "some were forgotten, else this proves nothing"


def test_the_other_body_of_a_forgotten_event_is_a_conflict(world: World, handler: Pure) -> None:
    process = world.start(Handler(handler), cache_entries=ENTRIES)
    process.deliver(*(body(str(number)) for number in range(EVENTS)))
    process.deliver(*(body(str(number), other=True) for number in range(EVENTS)))
    assert process.count("conflicted") == EVENTS
    assert len(world.store.puts("/service/")) == EVENTS


def test_a_forgotten_call_is_not_made_again(world: World) -> None:
    claimed = Claimed()
    process = world.start(claimed.handler, cache_entries=ENTRIES)
    for event_id in (*map(str, range(EVENTS)), *shuffled_ids(0)):
        process.deliver(body(event_id))
    assert Counter(claimed.calls) == dict.fromkeys(map(str, range(EVENTS)), 1)
    assert process.count("processed_skipped") == EVENTS
