"""What becomes of each delivery of an event whose handler has an effect outside."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from random import Random

import pytest

from fakes.events import Claimed, body
from fakes.world import DEAD_LETTERS, FIRST_RETRY, OrderProcess, World
from idempotent_consumer.calls import Handler
from idempotent_consumer.event import Event, decode
from idempotent_consumer.flow import ACK_ALL_EVERY_S
from idempotent_consumer.ledger import RELEASED_S
from idempotent_consumer.records import CLAIMED, DONE, RELEASED
from idempotent_consumer.records import decode as decode_record
from idempotent_consumer.records import encode as encode_record
from idempotent_consumer.service import FINISH_WITHIN_S
from idempotent_consumer.settings import Settings
from idempotent_consumer.testing.broker import Ack
from idempotent_consumer.testing.etcd import (
    ANSWER_LOST,
    FINE,
    REQUEST_LOST,
    TIMED_OUT,
    Call,
    Fate,
    answered_late,
    applied_late,
)
from idempotent_consumer.testing.loop import Threads

TIMEOUT_S = 5.0
OTHERS_TURN_S = 2.0
RETRIED_S = 72.0
"""The retry delays together, and a second."""


@pytest.fixture
def world() -> Iterator[World]:
    """Give a world; whatever the test did, each delivery is counted once and acked when it may."""
    world = World()
    yield world
    world.close()


@pytest.fixture
def claimed() -> Claimed:
    """Give a handler whose calls end when the test says so."""
    return Claimed(waits=True)


@pytest.fixture
def process(world: World, claimed: Claimed) -> OrderProcess:
    return world.start(claimed.handler)


class Plain:
    """A plain claimed handler. ``states`` are what each event's record was in at its call."""

    def __init__(self, world: World, takes_s: float = 0.0) -> None:
        self._world, self._takes_s = world, takes_s
        self.calls, self.states = list[str](), list[str]()
        self.handler = Handler(self.call, TIMEOUT_S)

    def call(self, event: Event, _timeout_s: float) -> None:
        """Make one call, in the first process."""
        self.calls.append(event.id)
        there = self._world.store.get(f"/service/order/{event.id}") is not None
        self.states.append(self._world.record(event.id).state if there else "absent")
        self._world.processes[0].loop.spend(self._takes_s)


def threads_that_start_after(*delays_s: float) -> Callable[[int], Threads]:
    """Return what makes threads whose first jobs wait so long for one, as where all are taken."""
    left = iter(delays_s)
    return lambda threads: Threads(threads, lambda: next(left, 0.0))


# One process.


def test_an_event_is_claimed_then_called_then_done_then_acked(
    world: World, process: OrderProcess, claimed: Claimed
) -> None:
    process.etcd.script("Txn", answered_late(1.0))
    process.deliver(body("1"))
    assert (world.record().state, claimed.calls) == (CLAIMED, [])
    world.advance(1.0)
    assert (world.record().state, claimed.calls) == (CLAIMED, ["1"])
    assert process.acks == []
    claimed.end()
    assert world.record().state == DONE
    assert process.acks == [Ack(1, (1,), True)]
    assert process.counts() == {"received": 1, "processed": 1, "sent": 1}


def test_a_plain_handler_is_called_on_a_thread_under_its_claim(world: World) -> None:
    plain = Plain(world, takes_s=3.0)
    process = world.start(plain.handler)
    process.deliver(body("1"), body("2"))
    assert (plain.calls, plain.states) == (["1", "2"], [CLAIMED, CLAIMED])
    world.advance(2.9)
    assert process.acks == []
    world.advance(0.1)
    assert process.counts() == {"received": 2, "processed": 2, "sent": 2}
    assert world.record().state == DONE


def test_no_call_is_made_before_the_claim_is_known_to_be_there(
    world: World, process: OrderProcess, claimed: Claimed
) -> None:
    process.etcd.fate = lambda call: ANSWER_LOST if call.method == "Txn" else FINE
    process.deliver(body("1"))
    world.advance(60)
    assert claimed.calls == []
    process.etcd.fate = lambda _: FINE
    world.advance(6)
    assert claimed.calls == ["1"]


def test_a_duplicate_of_what_is_done_is_skipped_without_a_call(
    process: OrderProcess, claimed: Claimed
) -> None:
    process.deliver(body("1"))
    claimed.end()
    process.deliver(body("1"))
    assert claimed.calls == ["1"]
    assert process.counts() == {"received": 2, "processed": 1, "processed_skipped": 1, "sent": 1}


def test_duplicates_during_the_call_share_its_end(process: OrderProcess, claimed: Claimed) -> None:
    process.deliver(body("1"), body("1"))
    process.deliver(body("1"))
    claimed.end()
    assert claimed.calls == ["1"]
    assert process.counts() == {"received": 3, "processed": 1, "processed_skipped": 2, "sent": 1}


def test_a_slow_call_holds_up_nothing_else(
    world: World, process: OrderProcess, claimed: Claimed
) -> None:
    """Its ack is missing, so the others' are single, in a moment."""
    process.deliver(body("1"), body("2"), body("3"))
    claimed.end("2", "3")
    world.advance(ACK_ALL_EVERY_S)
    assert process.acks == [Ack(1, (2,), False), Ack(1, (3,), False)]
    claimed.end("1")
    assert process.acks[-1] == Ack(1, (1,), True)


def test_a_redelivery_joins_the_call_that_is_in_flight(
    world: World, process: OrderProcess, claimed: Claimed
) -> None:
    """The channel went in mid-call: the process does not wait on its own claim, nor call again."""
    process.deliver(body("1"))
    process.reconnect()
    world.advance(3)
    claimed.end()
    assert claimed.calls == ["1"]
    assert process.acks == [Ack(2, (1,), True)]
    assert process.counts() == {"received": 2, "returned": 1, "processed": 1, "sent": 1}


def test_a_call_that_raises_releases_the_claim_then_retries_then_acks(
    world: World, process: OrderProcess, claimed: Claimed
) -> None:
    claimed.fails = 1
    process.broker.confirms = False
    process.deliver(body("1"))
    claimed.end()
    assert world.record().state == RELEASED
    (retry,) = process.forwarded
    assert (retry.routing_key, retry.headers["x-error"]) == (
        FIRST_RETRY,
        "ConnectionError: refused",
    )
    assert process.acks == []
    process.confirm()
    assert process.counts() == {"received": 1, "retried": 1}
    process.broker.confirms = True
    world.advance(1.0)
    claimed.end()
    assert claimed.calls == ["1", "1"]
    assert world.record().state == DONE
    assert process.count("processed") == 1


def test_a_retry_is_not_published_before_the_claim_is_released(
    world: World, process: OrderProcess, claimed: Claimed
) -> None:
    claimed.fails = 1
    process.deliver(body("1"))
    process.etcd.script("Txn", answered_late(2.0))
    claimed.end()
    assert process.forwarded == []
    world.advance(2.0)
    assert len(process.forwarded) == 1


def test_a_call_that_always_raises_is_parked_after_its_retries(world: World) -> None:
    claimed = Claimed(fails=99)
    process = world.start(claimed.handler)
    process.deliver(body("1"))
    world.advance(RETRIED_S)
    assert process.counts() == {"received": 4, "retried": 3, "failed": 1}
    (parked,) = process.sent_to(DEAD_LETTERS)
    assert parked.headers["x-attempts"] == 4
    assert len(claimed.calls) == 4


def test_a_done_whose_answer_was_lost_is_not_called_again(
    world: World, process: OrderProcess, claimed: Claimed
) -> None:
    process.deliver(body("1"))
    process.etcd.script("Txn", ANSWER_LOST, ANSWER_LOST)
    claimed.end()
    world.advance(10)
    assert claimed.calls == ["1"]
    assert process.counts() == {"received": 1, "processed": 1, "sent": 1}
    assert world.states() == [CLAIMED, DONE]


def test_another_body_during_the_call_waits_and_is_parked(
    process: OrderProcess, claimed: Claimed
) -> None:
    process.deliver(body("1", n=1), body("1", n=2))
    assert process.forwarded == []
    claimed.end()
    assert claimed.calls == ["1"]
    assert process.counts() == {"received": 2, "processed": 1, "conflicted": 1, "sent": 1}


def test_without_etcd_the_call_is_made_without_a_claim(world: World) -> None:
    claimed = Claimed()
    process = world.start(claimed.handler, settings=Settings())
    process.deliver(body("1"), body("1"))
    assert claimed.calls == ["1", "1"]
    assert process.counts() == {"received": 2, "processed": 2, "sent": 2}


def test_without_etcd_a_call_that_raises_is_retried(world: World) -> None:
    process = world.start(Claimed(fails=1).handler, settings=Settings())
    process.deliver(body("1"))
    assert process.counts() == {"received": 1, "retried": 1}


# Slots.


@pytest.mark.parametrize("is_coroutine", [True, False])
def test_no_more_is_claimed_than_can_be_called(world: World, is_coroutine: bool) -> None:
    """A slot is taken before the claim: a process that dies leaves two claims behind, not fifty."""
    claimed, plain = Claimed(waits=True), Plain(world, takes_s=1.0)
    handler, calls = (
        (claimed.handler, claimed.calls) if is_coroutine else (plain.handler, plain.calls)
    )
    process = world.start(handler, settings=Settings(enable_etcd=True, calls_at_once=2))
    process.deliver(*(body(str(n)) for n in range(50)))
    assert (len(calls), world.claims()) == (2, 2)
    most = 0
    while process.count("processed") < 50:
        claimed.end(*calls[-2:])
        world.advance(0.1)
        most = max(most, world.claims())
    assert most == 2
    assert len(calls) == 50


def test_no_more_is_claimed_while_records_of_finished_calls_are_not_there(world: World) -> None:
    """etcd loses requests: each such claim would stay behind for a lease if the process died."""
    claimed, chance, most = Claimed(), Random(1), 0

    def fate(call: Call) -> Fate:
        if call.method != "Txn":
            return FINE
        late_s = chance.random()
        return REQUEST_LOST if chance.random() < 0.3 else Fate(late_s, late_s)

    process = world.start(claimed.handler, settings=Settings(enable_etcd=True, calls_at_once=2))
    process.etcd.fate = fate
    process.deliver(*(body(str(n)) for n in range(50)))
    while process.count("processed") < 50:
        world.advance(0.05)
        most = max(most, world.claims())
    assert most == 2


def test_a_slot_is_free_again_after_each_end_of_a_call(world: World) -> None:
    """However the one before has ended: done, failed, or not made at all."""
    claimed = Claimed(fails=3)
    process = world.start(claimed.handler, settings=Settings(enable_etcd=True, calls_at_once=1))
    other = world.start(Claimed().handler)
    other.deliver(body("done by another"))
    process.deliver(*map(body, ("1", "2", "3", "done by another", "4", "5")))
    assert process.counts() == {
        "received": 6,
        "retried": 3,
        "processed": 2,
        "processed_skipped": 1,
        "sent": 2,
    }


# A coroutine's time-out.


def test_a_coroutine_is_cancelled_at_its_time_out_and_retried(
    world: World, process: OrderProcess, claimed: Claimed
) -> None:
    process.deliver(body("1"))
    world.advance(TIMEOUT_S - 0.1)
    assert (world.record().state, process.forwarded) == (CLAIMED, [])
    world.advance(0.1)
    assert world.record().state == RELEASED
    (retry,) = process.sent_to(FIRST_RETRY)
    assert retry.headers["x-error"] == "TimeoutError: it took longer than 5 s"
    assert process.counts() == {"received": 1, "retried": 1}
    world.advance(1.0)
    assert claimed.calls == ["1", "1"]
    claimed.end()
    assert process.count("processed") == 1


def test_a_coroutine_that_swallows_its_cancellation_is_reported_and_has_failed(
    world: World,
) -> None:
    async def swallow(_event: Event, _timeout_s: float) -> None:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            await asyncio.sleep(2)

    process = world.start(Handler(swallow, TIMEOUT_S))
    process.deliver(body("1"))
    world.advance(TIMEOUT_S + 2)
    (line,) = process.logged("caught its own cancellation")
    assert (line["log_level"], line["event_id"], line["seconds"]) == ("warning", "1", 7.0)
    assert process.counts() == {"received": 1, "retried": 1}


def test_a_coroutine_that_raises_cancelled_error_itself_has_failed_and_the_process_goes_on(
    world: World,
) -> None:
    async def raise_it(event: Event, _timeout_s: float) -> None:
        if event.id == "bad":
            raise asyncio.CancelledError("by itself")

    process = world.start(Handler(raise_it, TIMEOUT_S))
    process.deliver(body("bad"))
    process.deliver(body("1"))
    assert process.counts() == {"received": 2, "retried": 1, "processed": 1, "sent": 1}
    assert process.forwarded[0].headers["x-error"] == "CancelledError: by itself"


# Two processes.


def test_a_claim_of_another_is_waited_for_then_skipped_when_it_is_done(
    world: World, process: OrderProcess, claimed: Claimed
) -> None:
    theirs = Claimed(waits=True, timeout_s=60.0)
    other = world.start(theirs.handler)
    other.deliver(body("1"))
    process.deliver(body("1"))
    world.advance(30)
    assert (process.acks, process.forwarded, claimed.calls) == ([], [], [])
    theirs.end()
    world.advance(OTHERS_TURN_S)
    assert claimed.calls == []
    assert process.counts() == {"received": 1, "processed_skipped": 1}


def test_a_claim_whose_process_went_is_taken_over_when_its_lease_ends(
    world: World, process: OrderProcess, claimed: Claimed
) -> None:
    other = world.start(Claimed(waits=True).handler)
    other.deliver(body("1"))
    other.kill()
    process.deliver(body("1"))
    world.advance(14.0)
    assert claimed.calls == []
    world.advance(1.0 + OTHERS_TURN_S)
    claimed.end()
    assert claimed.calls == ["1"]
    assert process.counts() == {"received": 1, "processed": 1, "sent": 1}


def test_a_claim_that_another_released_is_taken_over_soon(
    world: World, process: OrderProcess, claimed: Claimed
) -> None:
    theirs = Claimed(fails=1, waits=True)
    other = world.start(
        theirs.handler, settings=Settings(enable_etcd=True, retry_delays=(("1h", 3600),))
    )
    other.deliver(body("1"))
    process.deliver(body("1"))
    theirs.end()
    world.advance(OTHERS_TURN_S)
    assert claimed.calls == ["1"]
    assert world.record().token.startswith(process.running.process)


def test_waiting_for_another_asks_at_most_a_few_times_a_second(
    world: World, process: OrderProcess
) -> None:
    world.start(Claimed(waits=True, timeout_s=600.0).handler).deliver(body("1"))
    process.deliver(body("1"))
    before = len(process.etcd.sent("Txn"))
    world.advance(60)
    assert 60 < len(process.etcd.sent("Txn")) - before < 60 * 8


def test_an_event_that_waits_for_another_for_long_is_named_once(
    world: World, process: OrderProcess
) -> None:
    world.start(Claimed(waits=True, timeout_s=600.0).handler).deliver(body("1"))
    process.deliver(body("1"))
    world.advance(5)
    assert process.logged("waits for another process that does not end it") == []
    world.advance(300)
    (line,) = process.logged("waits for another process that does not end it")
    assert line["event_id"] == "1"


def test_two_processes_that_claim_at_once_call_once(world: World) -> None:
    mine, theirs = Claimed(), Claimed()
    processes = [world.start(mine.handler), world.start(theirs.handler)]
    for process in processes:
        process.etcd.script("Txn", Fate(applies_s=1.0))
        process.deliver(body("1"))
    world.advance(20)
    assert len(mine.calls) + len(theirs.calls) == 1
    assert world.states() == [CLAIMED, DONE]
    assert sum(process.count("processed") for process in processes) == 1


def test_a_claim_of_another_body_decides_nothing(
    world: World, process: OrderProcess, claimed: Claimed
) -> None:
    """Its holder may die: only what is done is in the way of another body."""
    other = world.start(Claimed(waits=True).handler)
    other.deliver(body("1", item="other"))
    process.deliver(body("1"))
    world.advance(4)
    assert (process.forwarded, process.acks) == ([], [])
    other.kill()
    world.advance(11 + OTHERS_TURN_S)
    claimed.end()
    assert claimed.calls == ["1"]
    assert world.record().state == DONE
    assert process.counts() == {"received": 1, "processed": 1, "sent": 1}


# Claims that are nobody's.


def test_an_own_claim_that_nobody_runs_is_taken_over_at_once(
    world: World, process: OrderProcess, claimed: Claimed
) -> None:
    """Else the process would wait for ever on a claim that it keeps alive itself."""
    process.deliver(body("0"))
    lease = world.store.get("/service/order/0").lease
    token = f"{process.running.process}/1/77"
    orphan = encode_record(
        CLAIMED, decode(body("1")).digest, token, "2026-01-01T00:00:00.000+00:00"
    )
    world.store.put("/service/order/1", orphan, lease)
    process.deliver(body("1"))
    assert claimed.calls == ["0", "1"]
    claimed.end()
    assert world.record("1").state == DONE
    assert process.counts() == {"received": 2, "processed": 2, "sent": 2}


def test_a_claim_that_landed_twice_over_is_still_one(
    world: World, process: OrderProcess, claimed: Claimed
) -> None:
    """An attempt whose answer was lost, found by the next, and put under the lease in use."""
    process.etcd.script("Txn", ANSWER_LOST, REQUEST_LOST)
    process.deliver(body("1"))
    world.advance(4)
    claimed.end()
    assert claimed.calls == ["1"]
    assert world.states() == [CLAIMED, CLAIMED, DONE]


def test_an_attempt_to_claim_that_applies_when_its_event_is_settled_ends_by_itself(
    world: World,
) -> None:
    """Its lease is not kept alive, so what it holds up is held up for one lease at the most."""
    process = world.start(
        Claimed(fails=1).handler,
        settings=Settings(enable_etcd=True, retry_delays=(("1h", 3600),)),
    )
    process.etcd.script("Txn", applied_late(12))
    process.deliver(body("1"))
    world.advance(1)
    assert world.record().state == RELEASED
    world.store.delete("/service/order/1")  # as when another process had claimed it next, and died
    world.advance(11.5)
    assert world.record().state == CLAIMED, "nobody is at it"
    world.advance(15)
    assert world.store.keys("/service/") == []


def test_what_is_parked_leaves_records_that_end_soon_though_the_process_goes_on(
    world: World,
) -> None:
    """Under the process's own lease they would stay for as long as it runs, without a bound."""
    process = world.start(
        Claimed(fails=200).handler,
        settings=Settings(enable_etcd=True, retry_delays=(("1s", 1),), breaker_failures=0),
    )
    process.deliver(*(body(str(n)) for n in range(100)))
    world.advance(2)
    assert process.count("failed") == 100
    records = [world.store.get(key) for key in world.store.keys("/service/order/")]
    assert {decode_record(kv.value).state for kv in records} == {RELEASED}
    ends_s = {world.store.leases[kv.lease] for kv in records}
    assert len(records) == 100
    assert world.agenda.now_s + RELEASED_S <= min(ends_s)
    assert max(ends_s) <= world.agenda.now_s + RELEASED_S + 60
    world.advance(RELEASED_S + 61)
    assert world.store.keys("/service/") == []


# The lease and the call.


def test_a_call_that_the_lease_does_not_cover_is_not_made_and_claimed_anew(world: World) -> None:
    """etcd has been away for so long that the claim might end during the call."""
    plain = Plain(world)
    process = world.start(plain.handler, threads=threads_that_start_after(10.5))
    process.deliver(body("1"))
    process.etcd.fate = lambda _: REQUEST_LOST
    world.advance(10.5)
    assert plain.calls == []
    process.etcd.fate = lambda _: FINE
    world.advance(6)
    assert plain.calls == ["1"]
    assert process.counts() == {"received": 1, "processed": 1, "sent": 1}


def test_a_call_that_waited_for_a_thread_is_not_made_under_a_claim_that_is_gone(
    world: World,
) -> None:
    """The process has a fresh lease by then, but this claim was under the one before.

    Without the difference it would call while the other process does.
    """
    plain = Plain(world)
    process = world.start(plain.handler, threads=threads_that_start_after(7.0))
    process.deliver(body("1"))
    world.store.revoke(world.store.get("/service/order/1").lease)
    theirs = Claimed(waits=True, timeout_s=60.0)
    world.start(theirs.handler).deliver(body("1"))
    world.advance(6)
    process.deliver(body("2"))
    assert plain.calls == ["2"]
    world.advance(10)
    assert plain.calls == ["2"]
    theirs.end()
    world.advance(OTHERS_TURN_S)
    assert (theirs.calls, plain.calls) == (["1"], ["2"])
    assert process.count("processed_skipped") == 1


def test_a_frozen_process_does_not_call_under_a_lease_that_has_ended(world: World) -> None:
    plain = Plain(world)
    process = world.start(plain.handler, threads=threads_that_start_after(1.0))
    process.deliver(body("1"))
    world.skip(60)
    world.advance(OTHERS_TURN_S)
    assert plain.states == [CLAIMED]
    assert process.counts() == {"received": 1, "processed": 1, "sent": 1}


def test_a_machine_that_was_suspended_does_not_call_under_a_lease_that_has_ended(
    world: World,
) -> None:
    """The loop's clock has stood still meanwhile, etcd's has not."""
    plain = Plain(world)
    process = world.start(plain.handler, threads=threads_that_start_after(1.0))
    process.deliver(body("1"))
    world.suspend(3600)
    world.advance(1 + OTHERS_TURN_S)
    assert plain.states == [CLAIMED]
    assert process.counts() == {"received": 1, "processed": 1, "sent": 1}


def test_a_coroutine_is_not_called_under_a_claim_whose_answer_came_when_it_had_ended(
    world: World, process: OrderProcess, claimed: Claimed
) -> None:
    process.etcd.script("Txn", answered_late(1.0))
    process.deliver(body("1"))
    world.skip(60)
    assert claimed.calls == []
    world.advance(OTHERS_TURN_S)
    assert (claimed.calls, world.record().state) == (["1"], CLAIMED)


def test_a_claim_lost_during_the_call_is_counted_and_done_is_put_where_it_is_absent(
    world: World, process: OrderProcess, claimed: Claimed
) -> None:
    process.deliver(body("1"))
    world.store.revoke(world.store.get("/service/order/1").lease)
    claimed.end()
    assert claimed.calls == ["1"]
    assert world.record().state == DONE
    assert process.counts() == {"received": 1, "processed": 1, "sent": 1, "claim_lost": 1}
    assert process.logged("twice")


def test_a_claim_that_another_took_during_the_call_is_waited_for_and_counted(
    world: World, process: OrderProcess, claimed: Claimed
) -> None:
    process.deliver(body("1"))
    world.store.revoke(world.store.get("/service/order/1").lease)
    theirs = Claimed(waits=True, timeout_s=60.0)
    world.start(theirs.handler).deliver(body("1"))
    claimed.end()
    world.advance(30)
    assert process.acks == []
    assert process.count("claim_lost") == 1
    theirs.end()
    world.advance(OTHERS_TURN_S)
    assert process.counts() == {"received": 1, "processed_skipped": 1, "sent": 1, "claim_lost": 1}
    assert claimed.calls == ["1"]


def test_a_claim_lost_to_another_body_is_counted_and_parked(
    world: World, process: OrderProcess, claimed: Claimed
) -> None:
    """The call was made, and now the record is another event's: the operator is to know both."""
    process.deliver(body("1", n=1))
    world.store.revoke(world.store.get("/service/order/1").lease)
    world.start(Claimed().handler).deliver(body("1", n=2))
    claimed.end()
    assert process.counts() == {"received": 1, "conflicted": 1, "sent": 1, "claim_lost": 1}


def test_a_release_of_a_claim_that_is_gone_retries_all_the_same(
    world: World, process: OrderProcess, claimed: Claimed
) -> None:
    claimed.fails = 1
    process.deliver(body("1"))
    world.store.revoke(world.store.get("/service/order/1").lease)
    claimed.end()
    assert process.counts() == {"received": 1, "retried": 1}
    assert process.count("claim_lost") == 0, "no finished call was lost"


def test_a_release_that_finds_another_at_it_waits_for_that_one(
    world: World, process: OrderProcess, claimed: Claimed
) -> None:
    """Its retry would only wait, too; and what that one finishes is not to be retried."""
    claimed.fails = 1
    process.deliver(body("1"))
    world.store.revoke(world.store.get("/service/order/1").lease)
    theirs = Claimed(waits=True, timeout_s=60.0)
    world.start(theirs.handler).deliver(body("1"))
    claimed.end()
    world.advance(5)
    assert process.forwarded == []
    theirs.end()
    world.advance(OTHERS_TURN_S)
    assert process.counts() == {"received": 1, "processed_skipped": 1}


def test_what_waits_for_a_claim_whose_delivery_went_back_settles_nothing(
    world: World, process: OrderProcess
) -> None:
    theirs = Claimed(waits=True)
    world.start(theirs.handler).deliver(body("1"))
    process.deliver(body("1"))
    process.broker.away = True
    process.lose_channel()
    theirs.end()
    world.advance(OTHERS_TURN_S)
    assert process.acks == []
    assert process.counts() == {"received": 1, "returned": 1}
    process.broker.away = False
    world.advance(6)
    assert process.counts() == {"received": 2, "returned": 1, "processed_skipped": 1}


# The stop.


def test_a_process_that_ends_starts_no_call_that_its_end_would_cut_off(world: World) -> None:
    """The others go on: what has time left is done, and needs nobody else."""
    plain = Plain(world)
    process = world.start(plain.handler, threads=threads_that_start_after(1.9, 2.1))
    process.deliver(body("1"), body("2"))
    process.stop()
    world.advance(FINISH_WITHIN_S + 3)
    assert plain.calls == ["1"]
    assert [world.record(event_id).state for event_id in "12"] == [DONE, RELEASED]
    assert process.task.done()
    assert process.broker.queues["order"].bodies == [body("2")]


def test_a_process_that_ends_claims_nothing_that_it_has_no_time_to_call(world: World) -> None:
    claimed = Claimed(waits=True)
    process = world.start(claimed.handler, settings=Settings(enable_etcd=True, calls_at_once=1))
    process.deliver(body("1"), body("2"))
    process.stop()
    world.advance(FINISH_WITHIN_S - TIMEOUT_S)
    claimed.end()
    world.advance(3)
    assert claimed.calls == ["1"]
    assert world.states() == [CLAIMED, DONE]
    assert process.task.done()


def test_a_process_that_ends_lets_go_of_what_it_has_not_called(world: World) -> None:
    """Else the others would wait for its lease's end, three times the longest call, with each."""
    plain = Plain(world)
    process = world.start(plain.handler, threads=threads_that_start_after(3.0))
    process.deliver(body("1"))
    process.stop()
    world.advance(FINISH_WITHIN_S + 3)
    assert (world.record().state, plain.calls) == (RELEASED, [])
    assert process.forwarded == []
    assert process.broker.queues["order"].bodies == [body("1")]
    theirs = Claimed()
    other = world.start(theirs.handler)
    other.deliver(body("1"))
    assert theirs.calls == ["1"]
    assert other.counts() == {"received": 1, "processed": 1, "sent": 1}


def test_the_stop_waits_for_a_call_whose_delivery_has_gone_back(
    world: World, process: OrderProcess, claimed: Claimed
) -> None:
    """Its record is not there yet: who takes the delivery next would call again."""
    process.deliver(body("1"))
    process.broker.away = True
    process.lose_channel()
    assert process.in_hand == 0
    process.stop()
    world.advance(3)
    assert not process.task.done()
    claimed.end()
    world.advance(3)
    assert process.task.done()
    assert world.record().state == DONE


def test_the_stop_waits_no_longer_than_its_time_for_a_call(world: World) -> None:
    claimed = Claimed(waits=True, timeout_s=60.0)
    process = world.start(claimed.handler)
    process.deliver(body("1"))
    process.stop()
    world.advance(FINISH_WITHIN_S - 0.1)
    assert not process.task.done()
    world.advance(1.5)
    assert process.task.done()
    assert process.broker.queues["order"].bodies == [body("1")]


# A defect.


@pytest.mark.parametrize("method", ["LeaseKeepAlive", "LeaseGrant", "Txn", "Range"])
def test_a_defect_in_any_task_ends_the_run(
    world: World, process: OrderProcess, method: str
) -> None:
    """Keeping a lease alive, granting it, a commit, the guard: else it would be missing unseen."""

    def fate(call: object) -> Fate:
        if getattr(call, "method", "") == method:
            raise RuntimeError("a defect")
        return FINE

    process.etcd.fate = fate
    process.broker.publish("", "order", body("1"))
    with pytest.raises(ExceptionGroup) as raised:
        world.advance(10)
    assert raised.group_contains(RuntimeError, match="a defect")
    assert process.task.done()


# What hangs, ends oddly, or is away for long.


def test_no_claim_is_ever_put_without_a_lease(world: World) -> None:
    """A lease of 0 is none to etcd: such a claim of a dead process would never end."""
    process = world.start(Claimed().handler)
    process.deliver(body("1"))
    world.advance(601)  # The window's bucket is over; the claims' lease is kept alive.
    process.etcd.fate = lambda _: Fate(None, 5.0, TIMED_OUT)
    process.deliver(body("2"))  # The claims' lease is there, the window's is waited for.
    world.advance(40)
    process.etcd.fate = lambda _: FINE
    world.advance(30)
    claims = [
        change
        for change in world.store.puts("/service/order/")
        if decode_record(change.value or b"").state == CLAIMED
    ]
    assert {change.key for change in claims} == {b"/service/order/1", b"/service/order/2"}
    assert all(change.lease for change in claims)


def test_an_exit_in_a_handler_is_a_failure_like_others(world: World) -> None:
    """It would end a thread, and the event would stay in flight."""

    def leave(_event: object, _timeout_s: float) -> None:
        raise SystemExit(1)

    process = world.start(Handler(leave, TIMEOUT_S))
    process.deliver(body("1"))
    assert world.record().state == RELEASED
    assert len(process.sent_to(FIRST_RETRY)) == 1


def test_a_call_that_does_not_return_is_told_once_and_not_alive_until_it_does(
    world: World,
) -> None:
    process = world.start(Plain(world, takes_s=5 * TIMEOUT_S).handler)
    process.deliver(body("1"))
    world.advance(3 * TIMEOUT_S)
    assert process.health.stuck == {}
    world.advance(TIMEOUT_S)
    assert list(process.health.stuck) == ["calls"]
    (line,) = process.logged("calls do not return")
    assert (line["log_level"], line["calls"]) == ("error", 1)
    world.advance(TIMEOUT_S + 1)
    assert process.health.stuck == {}
    assert not process.running.consumer.busy


def test_deliveries_that_went_back_are_not_kept(world: World, process: OrderProcess) -> None:
    """While etcd is away each lost channel brings the same events again."""
    process.etcd.fate = lambda call: REQUEST_LOST if call.method == "Txn" else FINE
    process.deliver(body("1"), body("1", item="other"))
    for _ in range(20):
        process.lose_channel()
        world.advance(10)
    (flight,) = process.running.consumer._in_flight.values()
    (other,) = flight.others.values()
    assert (len(flight.deliveries), len(other.deliveries)) == (1, 1)
