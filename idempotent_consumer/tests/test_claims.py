"""What becomes of each delivery of an event whose handler has an effect outside."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fakes.events import Claimed, body
from idempotent_consumer.event import Event
from idempotent_consumer.handlers import Handler
from idempotent_consumer.ledger.records import CLAIMED, DONE, RELEASED, Record, decode
from idempotent_consumer.settings import Settings
from idempotent_consumer.testing.bus import Ack
from idempotent_consumer.testing.etcd import (
    ANSWER_LOST,
    FINE,
    REQUEST_LOST,
    TIMED_OUT,
    Fate,
    answered_late,
    applied_late,
)
from idempotent_consumer.testing.loop import ManualLoop
from idempotent_consumer.testing.process import Process
from idempotent_consumer.testing.store import Store

TIMEOUT_S = 5.0
OTHERS_TURN_S = 2.0


@pytest.fixture
def loop() -> ManualLoop:
    return ManualLoop()


@pytest.fixture
def store(loop: ManualLoop) -> Store:
    return Store(loop.now_s)


@pytest.fixture
def handler() -> Claimed:
    return Claimed()


@pytest.fixture
def process(loop: ManualLoop, store: Store, handler: Claimed) -> Iterator[Process]:
    """Give an open process; whatever the test did, each delivery is counted once."""
    process = start(loop, store, handler)
    yield process
    process.assert_all_counted()


def start(loop: ManualLoop, store: Store, handler: Claimed, name: str = "a" * 32) -> Process:
    process = Process(loop, store, {"new_order": Handler(handler, TIMEOUT_S)}, name)
    process.open()
    return process


def record_of(store: Store, event_id: str = "1") -> Record:
    kv = store.get(f"/service/order/{event_id}")
    return decode(kv.value, kv.mod_revision)


def states_of(store: Store) -> list[str]:
    """Return each state that the records have been put in, in order."""
    return [decode(c.value or b"", 0).state for c in store.puts("/service/order/")]


# One process.


def test_an_event_is_claimed_then_called_then_done_then_acked(
    store: Store, process: Process, handler: Claimed
) -> None:
    process.deliver(body("1"))
    assert (record_of(store).state, handler.calls) == (CLAIMED, [])
    process.pool.work()
    assert (record_of(store).state, handler.calls) == (CLAIMED, ["1"])
    assert process.bus.acks == []
    process.loop.run_until_idle()
    assert record_of(store).state == DONE
    assert process.bus.acks == [Ack(1, (1,), True)]
    assert process.counts() == {"received": 1, "processed": 1, "sent": 1}


def test_no_call_is_made_before_the_claim_is_known_to_be_there(
    loop: ManualLoop, process: Process, handler: Claimed
) -> None:
    process.etcd.fate = lambda method, _request: ANSWER_LOST if method == "Txn" else FINE
    process.deliver(body("1"))
    loop.advance(60)
    process.work()
    assert handler.calls == []
    process.etcd.fate = lambda _method, _request: FINE
    loop.advance(5)
    process.work()
    loop.advance(1)
    process.work()
    assert handler.calls == ["1"]


def test_a_duplicate_of_what_is_done_is_skipped_without_a_call(
    process: Process, handler: Claimed
) -> None:
    process.deliver(body("1"))
    process.work()
    process.deliver(body("1"))
    process.work()
    assert handler.calls == ["1"]
    assert process.counts() == {"received": 2, "processed": 1, "processed_skipped": 1, "sent": 1}


def test_duplicates_during_the_call_share_its_end(process: Process, handler: Claimed) -> None:
    process.deliver(body("1"), body("1"))
    process.deliver(body("1"))
    process.work()
    assert handler.calls == ["1"]
    assert process.counts() == {"received": 3, "processed": 1, "processed_skipped": 2, "sent": 1}


def test_a_slow_call_holds_up_nothing_else(process: Process) -> None:
    """Its ack is missing, so the others' are single, in a moment."""
    process.deliver(body("1"), body("2"), body("3"))
    slow, *others = process.pool.jobs
    process.pool.jobs = others
    process.work()
    process.loop.advance(0.3)
    assert process.bus.acks == [Ack(1, (2,), False), Ack(1, (3,), False)]
    process.pool.jobs = [slow]
    process.work()
    assert process.bus.acks[-1] == Ack(1, (1,), True)


def test_a_redelivery_joins_the_call_that_still_runs(process: Process, handler: Claimed) -> None:
    """The channel went in mid-call: the process does not wait on its own claim, nor call again."""
    process.deliver(body("1"))
    process.bus.lose_channel()
    process.bus.redeliver()
    process.loop.advance(60)
    assert len(process.pool.jobs) == 1
    process.work()
    assert handler.calls == ["1"]
    assert process.bus.acks == [Ack(2, (1,), True)]
    assert process.counts() == {"received": 2, "returned": 1, "processed": 1, "sent": 1}


def test_a_call_that_raises_releases_the_claim_then_retries_then_acks(
    store: Store, process: Process, handler: Claimed
) -> None:
    handler.fails = 1
    process.bus.confirms = False
    process.deliver(body("1"))
    process.work()
    assert record_of(store).state == RELEASED
    (retry,) = process.bus.forwarded
    assert (retry.queue, retry.headers["x-error"]) == ("order.retry.1s", "ConnectionError: refused")
    assert process.bus.acks == []
    process.bus.confirm()
    assert process.counts() == {"received": 1, "retried": 1}
    process.bus.confirms = True
    process.bus.come_back(retry)
    process.loop.run_until_idle()
    process.work()
    assert handler.calls == ["1", "1"]
    assert record_of(store).state == DONE
    assert process.count("processed") == 1


def test_a_retry_is_not_published_before_the_claim_is_released(
    loop: ManualLoop, process: Process, handler: Claimed
) -> None:
    handler.fails = 1
    process.deliver(body("1"))
    process.etcd.script("Txn", answered_late(2.0))
    process.work()
    assert process.bus.forwarded == []
    loop.advance(2.0)
    assert len(process.bus.forwarded) == 1


def test_a_call_that_always_raises_is_parked_after_its_retries(
    process: Process, handler: Claimed
) -> None:
    handler.fails = 99
    process.deliver(body("1"))
    process.work()
    for _ in range(3):
        process.bus.come_back(process.bus.forwarded[-1])
        process.loop.run_until_idle()
        process.work()
    assert process.counts() == {"received": 4, "retried": 3, "failed": 1}
    assert process.bus.forwarded[-1].headers["x-attempts"] == 4
    assert len(handler.calls) == 4


def test_a_done_whose_answer_was_lost_is_not_called_again(
    loop: ManualLoop, store: Store, process: Process, handler: Claimed
) -> None:
    process.deliver(body("1"))
    process.etcd.script("Txn", ANSWER_LOST, ANSWER_LOST)
    process.work()
    loop.advance(10)
    process.work()
    assert handler.calls == ["1"]
    assert process.counts() == {"received": 1, "processed": 1, "sent": 1}
    assert states_of(store) == [CLAIMED, DONE]


def test_another_body_during_the_call_waits_and_is_parked(
    process: Process, handler: Claimed
) -> None:
    process.deliver(body("1", n=1), body("1", n=2))
    assert process.bus.forwarded == []
    process.work()
    assert handler.calls == ["1"]
    assert process.counts() == {"received": 2, "processed": 1, "conflicted": 1, "sent": 1}


def test_without_etcd_the_call_is_made_without_a_claim(loop: ManualLoop, store: Store) -> None:
    handler = Claimed()
    process = Process(loop, store, {"new_order": Handler(handler, TIMEOUT_S)}, settings=Settings())
    process.open()
    process.deliver(body("1"), body("1"))
    process.work()
    assert handler.calls == ["1", "1"]
    assert process.counts() == {"received": 2, "processed": 2, "sent": 2}


def test_without_etcd_a_call_that_raises_is_retried(loop: ManualLoop, store: Store) -> None:
    process = Process(
        loop, store, {"new_order": Handler(Claimed(fails=1), TIMEOUT_S)}, settings=Settings()
    )
    process.open()
    process.deliver(body("1"))
    process.work()
    assert process.counts() == {"received": 1, "retried": 1}


# Two processes.


def test_a_claim_of_another_is_waited_for_then_skipped_when_it_is_done(
    loop: ManualLoop, store: Store, process: Process, handler: Claimed
) -> None:
    other = start(loop, store, Claimed(), "b" * 32)
    other.deliver(body("1"))
    process.deliver(body("1"))
    loop.advance(30)
    process.work()
    assert (process.bus.acks, process.bus.forwarded, handler.calls) == ([], [], [])
    other.work()
    loop.advance(OTHERS_TURN_S)
    assert handler.calls == []
    assert process.counts() == {"received": 1, "processed_skipped": 1}


def test_a_claim_whose_process_went_is_taken_over_when_its_lease_ends(
    loop: ManualLoop, store: Store, process: Process, handler: Claimed
) -> None:
    other = start(loop, store, Claimed(), "b" * 32)
    other.deliver(body("1"))
    other.ledger.close()
    process.deliver(body("1"))
    loop.advance(14.0)
    process.work()
    assert handler.calls == []
    loop.advance(1.0 + OTHERS_TURN_S)
    process.work()
    assert handler.calls == ["1"]
    assert process.counts() == {"received": 1, "processed": 1, "sent": 1}


def test_a_claim_that_another_released_is_taken_over_soon(
    loop: ManualLoop, store: Store, process: Process, handler: Claimed
) -> None:
    other = start(loop, store, Claimed(fails=1), "b" * 32)
    other.deliver(body("1"))
    process.deliver(body("1"))
    other.work()
    loop.advance(OTHERS_TURN_S)
    process.work()
    assert handler.calls == ["1"]
    assert record_of(store).token.startswith("a")


def test_waiting_for_another_asks_at_most_a_few_times_a_second(
    loop: ManualLoop, store: Store, process: Process
) -> None:
    start(loop, store, Claimed(), "b" * 32).deliver(body("1"))
    process.deliver(body("1"))
    before = len(process.etcd.sent("Txn"))
    loop.advance(60)
    assert 60 < len(process.etcd.sent("Txn")) - before < 60 * 8


def test_an_event_that_waits_for_another_for_long_is_named_once(
    loop: ManualLoop, store: Store, process: Process
) -> None:
    def named() -> list[str]:
        return [
            line["event_id"]
            for line in process.lines.entries
            if "waits for another process that does not end it" in line["event"]
        ]

    start(loop, store, Claimed(), "b" * 32).deliver(body("1"))
    process.deliver(body("1"))
    loop.advance(5)
    assert named() == []
    loop.advance(300)
    assert named() == ["1"]


def test_two_processes_that_claim_at_once_call_once(
    loop: ManualLoop, store: Store, process: Process, handler: Claimed
) -> None:
    theirs = Claimed()
    other = start(loop, store, theirs, "b" * 32)
    for each in (process, other):
        each.etcd.script("Txn", Fate(applies_s=1.0))
        each.deliver(body("1"))
    for _ in range(20):
        loop.advance(1.0)
        process.work()
        other.work()
    assert len(handler.calls) + len(theirs.calls) == 1
    assert states_of(store) == [CLAIMED, DONE]
    assert process.count("processed") + other.count("processed") == 1


# Claims that are nobody's.


def test_an_own_claim_that_nobody_runs_is_taken_over_at_once(
    loop: ManualLoop, store: Store, process: Process, handler: Claimed
) -> None:
    """Else the process would wait for ever on a claim that it keeps alive itself."""
    process.deliver(body("0"))
    lease = store.get("/service/order/0").lease
    digest = record_of(store, "0").digest
    orphan = (
        f'{{"state":"claimed","digest":"{digest}","token":"{process.name}/1/77",'
        '"time":"2026-01-01T00:00:00.000+00:00"}'
    )
    process.work()
    store.delete("/service/order/0")
    store.put("/service/order/0", orphan.encode(), lease)
    fresh = Process(loop, store, {"new_order": Handler(handler, TIMEOUT_S)}, process.name)
    fresh.open()
    fresh.deliver(body("0"))
    fresh.work()
    assert handler.calls == ["0", "0"]
    assert record_of(store, "0").state == DONE
    assert fresh.counts() == {"received": 1, "processed": 1, "sent": 1}


def test_a_claim_that_landed_twice_over_is_still_one(
    loop: ManualLoop, store: Store, process: Process, handler: Claimed
) -> None:
    """An attempt whose answer was lost, found by the next, and put under the lease in use."""
    process.etcd.script("Txn", ANSWER_LOST, REQUEST_LOST)
    process.deliver(body("1"))
    loop.advance(10)
    process.work()
    loop.advance(1)
    process.work()
    assert handler.calls == ["1"]
    assert states_of(store) == [CLAIMED, CLAIMED, DONE]


def test_an_attempt_to_claim_that_applies_when_its_event_is_settled_ends_by_itself(
    loop: ManualLoop, store: Store, process: Process, handler: Claimed
) -> None:
    """Its lease is not kept alive, so what it holds up is held up for one lease at the most."""
    process.etcd.script("Txn", applied_late(12))
    handler.fails = 1
    process.deliver(body("1"))
    loop.advance(1)
    process.work()
    assert record_of(store).state == RELEASED
    store.delete("/service/order/1")  # as when another process had claimed it next, and died
    loop.advance(11.5)
    assert record_of(store).state == CLAIMED, "nobody is at it"
    loop.advance(15)
    assert store.keys("/service/") == []


# The lease and the call.


def test_a_call_that_the_lease_does_not_cover_is_not_made_and_claimed_anew(
    loop: ManualLoop, process: Process, handler: Claimed
) -> None:
    """etcd has been away for so long that the claim might end during the call."""
    process.deliver(body("1"))
    process.etcd.fate = lambda _method, _request: REQUEST_LOST
    loop.advance(10.5)
    process.work()
    assert handler.calls == []
    process.etcd.fate = lambda _method, _request: FINE
    loop.advance(5)
    process.work()
    loop.advance(1)
    process.work()
    assert handler.calls == ["1"]
    assert process.counts() == {"received": 1, "processed": 1, "sent": 1}


def test_a_call_that_waited_for_a_thread_is_not_made_under_a_claim_that_is_gone(
    loop: ManualLoop, store: Store, process: Process, handler: Claimed
) -> None:
    """The process has a fresh lease by then, but this claim was under the one before.

    Without the difference it would call while the other process does.
    """
    process.deliver(body("1"))
    store.revoke(store.get("/service/order/1").lease)
    theirs = Claimed()
    other = start(loop, store, theirs, "b" * 32)
    other.deliver(body("1"))
    loop.advance(6)
    waiting, process.pool.jobs = process.pool.jobs, []
    process.deliver(body("2"))
    process.work()
    process.pool.jobs = waiting
    process.work()
    assert handler.calls == ["2"]
    other.work()
    loop.advance(OTHERS_TURN_S)
    process.work()
    assert theirs.calls == ["1"]
    assert handler.calls == ["2"]
    assert process.count("processed_skipped") == 1


def test_a_process_that_ends_starts_no_call_that_its_end_would_cut_off(
    loop: ManualLoop, process: Process, handler: Claimed
) -> None:
    """The others go on: what has time left is done, and needs nobody else."""
    process.deliver(body("1"), body("2"))
    first, second = process.pool.jobs
    process.consumer.end_by(loop.now_s() + TIMEOUT_S + 2)
    process.pool.jobs = [first]
    process.work()
    loop.advance(2.1)
    process.pool.jobs = [second]
    process.work()
    assert handler.calls == ["1"]
    assert process.bus.in_hand == 1


def test_a_process_that_ends_lets_go_of_what_it_has_not_called(
    loop: ManualLoop, store: Store, handler: Claimed
) -> None:
    """Else the others would wait for its lease's end, three times the longest call, with each."""
    process = start(loop, store, handler)
    process.deliver(body("1"))
    process.consumer.end_by(loop.now_s() + TIMEOUT_S)
    process.work()
    assert (record_of(store).state, handler.calls) == (RELEASED, [])
    assert (process.bus.forwarded, process.bus.in_hand) == ([], 1)
    process.bus.close()
    process.ledger.close()
    theirs = Claimed()
    other = start(loop, store, theirs, "b" * 32)
    other.deliver(body("1"))
    other.work()
    assert theirs.calls == ["1"]
    assert other.counts() == {"received": 1, "processed": 1, "sent": 1}


def test_a_frozen_process_does_not_call_under_a_lease_that_has_ended(
    loop: ManualLoop, process: Process, handler: Claimed
) -> None:
    process.deliver(body("1"))
    loop.freeze(60)
    process.pool.work()
    assert handler.calls == []
    loop.run_until_idle()
    loop.advance(OTHERS_TURN_S)
    process.work()
    assert handler.calls == ["1"]


def test_a_claim_lost_during_the_call_is_counted_and_done_is_put_where_it_is_absent(
    loop: ManualLoop, store: Store, process: Process, handler: Claimed
) -> None:
    process.deliver(body("1"))
    store.revoke(store.get("/service/order/1").lease)
    process.pool.work()
    loop.run_until_idle()
    assert handler.calls == ["1"]
    assert record_of(store).state == DONE
    assert process.counts() == {"received": 1, "processed": 1, "sent": 1, "claim_lost": 1}
    assert any("twice" in line["event"] for line in process.lines.entries)


def test_a_claim_that_another_took_during_the_call_is_waited_for_and_counted(
    loop: ManualLoop, store: Store, process: Process, handler: Claimed
) -> None:
    process.deliver(body("1"))
    store.revoke(store.get("/service/order/1").lease)
    other = start(loop, store, Claimed(), "b" * 32)
    other.deliver(body("1"))
    process.work()
    loop.advance(30)
    assert process.bus.acks == []
    assert process.count("claim_lost") == 1
    other.work()
    loop.advance(OTHERS_TURN_S)
    assert process.counts() == {"received": 1, "processed_skipped": 1, "sent": 1, "claim_lost": 1}
    assert handler.calls == ["1"]


def test_a_claim_lost_to_another_body_is_counted_and_parked(
    loop: ManualLoop, store: Store, process: Process
) -> None:
    """The call was made, and now the record is another event's: the operator is to know both."""
    process.deliver(body("1", n=1))
    store.revoke(store.get("/service/order/1").lease)
    other = start(loop, store, Claimed(), "b" * 32)
    other.deliver(body("1", n=2))
    other.work()
    process.work()
    assert process.counts() == {"received": 1, "conflicted": 1, "sent": 1, "claim_lost": 1}


def test_a_release_of_a_claim_that_is_gone_retries_all_the_same(
    store: Store, process: Process, handler: Claimed
) -> None:
    handler.fails = 1
    process.deliver(body("1"))
    store.revoke(store.get("/service/order/1").lease)
    process.work()
    assert process.counts() == {"received": 1, "retried": 1}
    assert process.count("claim_lost") == 0, "no finished call was lost"


def test_a_release_that_finds_another_at_it_waits_for_that_one(
    loop: ManualLoop, store: Store, process: Process, handler: Claimed
) -> None:
    """Its retry would only wait, too; and what that one finishes is not to be retried."""
    handler.fails = 1
    process.deliver(body("1"))
    store.revoke(store.get("/service/order/1").lease)
    other = start(loop, store, Claimed(), "b" * 32)
    other.deliver(body("1"))
    process.work()
    loop.advance(5)
    assert process.bus.forwarded == []
    other.work()
    loop.advance(OTHERS_TURN_S)
    assert process.counts() == {"received": 1, "processed_skipped": 1}


def test_what_waits_for_a_claim_whose_delivery_went_back_settles_nothing(
    loop: ManualLoop, store: Store, process: Process
) -> None:
    other = start(loop, store, Claimed(), "b" * 32)
    other.deliver(body("1"))
    process.deliver(body("1"))
    process.bus.lose_channel()
    other.work()
    loop.advance(OTHERS_TURN_S)
    assert process.bus.acks == []
    assert process.counts() == {"received": 1, "returned": 1}
    process.bus.redeliver()
    assert process.counts() == {"received": 2, "returned": 1, "processed_skipped": 1}


# What hangs, ends oddly, or is away for long.


def test_no_claim_is_ever_put_without_a_lease(
    loop: ManualLoop, store: Store, process: Process
) -> None:
    """A lease of 0 is none to etcd: such a claim of a dead process would never end."""
    process.deliver(body("1"))
    process.work()
    loop.advance(601)  # The window's bucket is over; the claims' lease is kept alive.
    process.etcd.fate = lambda _method, _request: Fate(None, 5.0, TIMED_OUT)
    process.deliver(body("2"))  # The claims' lease is there, the window's is waited for.
    loop.advance(40)
    process.etcd.fate = lambda _method, _request: FINE
    for _ in range(30):
        loop.advance(1)
        process.work()
    claims = [
        change
        for change in store.puts("/service/order/")
        if decode(change.value or b"", 0).state == CLAIMED
    ]
    assert {change.key for change in claims} == {b"/service/order/1", b"/service/order/2"}
    assert all(change.lease for change in claims)


def test_an_exit_in_a_handler_is_a_failure_like_others(store: Store, loop: ManualLoop) -> None:
    """It would end a thread of the pool, and the event would stay in hand."""

    def leave(_event: object, _timeout_s: float) -> None:
        raise SystemExit(1)

    process = Process(loop, store, {"new_order": Handler(leave, TIMEOUT_S)})
    process.open()
    process.deliver(body("1"))
    process.work()
    assert record_of(store).state == RELEASED
    assert [message.queue for message in process.bus.sent_to("order.retry.1s")] == [
        "order.retry.1s"
    ]


def test_a_call_that_does_not_return_is_overdue_until_it_does(
    loop: ManualLoop, store: Store
) -> None:
    overdue: list[int] = []

    def hang(_event: Event, _timeout_s: float) -> None:
        loop.freeze(2 * TIMEOUT_S)
        overdue.append(hanging.consumer.overdue_calls())
        loop.freeze(2 * TIMEOUT_S)
        overdue.append(hanging.consumer.overdue_calls())

    hanging = Process(loop, store, {"new_order": Handler(hang, TIMEOUT_S)})
    hanging.open()
    hanging.deliver(body("1"))
    hanging.work()
    assert overdue == [0, 1]
    loop.advance(30)
    assert (hanging.consumer.overdue_calls(), hanging.consumer.busy) == (0, False)


def test_a_call_that_waits_for_a_thread_is_not_overdue(loop: ManualLoop, process: Process) -> None:
    """A restart would free no thread: it would only repeat the calls under way."""
    process.deliver(body("1"))
    loop.advance(10 * TIMEOUT_S)
    assert process.consumer.overdue_calls() == 0
    process.work()
    assert process.count("processed") == 1


def test_deliveries_that_went_back_are_not_kept(loop: ManualLoop, process: Process) -> None:
    """While etcd is away each lost channel brings the same events again."""
    process.etcd.fate = lambda method, _request: REQUEST_LOST if method == "Txn" else FINE
    process.deliver(body("1"), body("1", item="other"))
    for _ in range(20):
        process.bus.lose_channel()
        process.bus.redeliver()
        loop.run_until_idle()
    (task,) = process.consumer._tasks.values()
    assert (len(task.deliveries), len(task.others)) == (1, 1)


def test_a_claim_of_another_body_decides_nothing(
    loop: ManualLoop, store: Store, process: Process, handler: Claimed
) -> None:
    """Its holder may die: only what is done is in the way of another body."""
    other = start(loop, store, Claimed(), "b" * 32)
    other.deliver(body("1", item="other"))
    process.deliver(body("1"))
    loop.advance(5)
    assert (process.bus.forwarded, process.bus.acks) == ([], [])
    other.ledger.close()
    loop.advance(60)
    process.work()
    assert handler.calls == ["1"]
    assert record_of(store).state == DONE
    assert process.counts() == {"received": 1, "processed": 1, "sent": 1}
