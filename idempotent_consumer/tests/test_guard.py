"""An etcd that is not the one seen before: wiped, or restored from an older state."""

from __future__ import annotations

import pytest

from fakes.desk import OTHER_DIGEST, Desk, digest_of
from idempotent_consumer.ledger.ledger import GUARD_EVERY_S
from idempotent_consumer.ledger.records import Kind
from idempotent_consumer.testing.etcd import ANSWER_LOST, FINE, REQUEST_LOST, answered_late
from idempotent_consumer.testing.loop import ManualLoop
from idempotent_consumer.testing.store import Store

KEY = b"/service/order/1"


@pytest.fixture
def loop() -> ManualLoop:
    return ManualLoop()


@pytest.fixture
def store(loop: ManualLoop) -> Store:
    return Store(loop.now_s)


@pytest.fixture
def desk(loop: ManualLoop, store: Store) -> Desk:
    desk = Desk(loop, store)
    desk.open()
    return desk


def assert_halted(desk: Desk, why: str) -> None:
    """Nothing is answered any more, in an hour of good weather, and the service says why."""
    answers = len(desk.answers)
    assert why in desk.health.missing["etcd"]
    assert desk.has_said("critical", why)
    desk.submit(desk.ask("new"))
    desk.loop.advance(3600)
    assert len(desk.answers) == answers
    assert why in desk.health.missing["etcd"]
    assert not desk.ledger.is_done(digest_of("1"))


def test_the_first_start_and_a_later_one_say_what_they_found(
    loop: ManualLoop, store: Store
) -> None:
    first, second = Desk(loop, store), Desk(loop, store, "b" * 32)
    first.open()
    second.open()
    assert first.has_said("info", "new, or was wiped")
    assert second.has_said("info", "it holds this service's history")
    assert len(store.puts("/incarnation/order")) == 1


def test_a_commit_notices_a_wiped_etcd(desk: Desk, store: Store) -> None:
    desk.submit(desk.ask("1"))
    store.wipe()
    desk.submit(desk.ask("1"))
    desk.wait()
    assert len(desk.answers) == 1
    assert store.get("/service/order/1") is None
    assert_halted(desk, "restored from an older state: revision 1, 3 seen before")


def test_a_wiped_etcd_that_another_service_filled_is_noticed_by_its_incarnation(
    desk: Desk, store: Store
) -> None:
    """Its revision has passed the one seen before; only the key tells."""
    desk.submit(desk.ask("1"))
    store.wipe()
    for number in range(100):
        store.put("/elsewhere", b"%d" % number)
    desk.submit(desk.ask("2", Kind.LOOK), desk.ask("3"))
    desk.wait()
    assert len(desk.answers) == 1
    assert_halted(desk, "wiped")


def test_a_start_that_spans_a_wipe_does_not_bring_the_old_incarnation_back(
    loop: ManualLoop, store: Store
) -> None:
    """Its first attempt applied, unseen, and gave the old data their name."""
    starting, running = Desk(loop, store, "a" * 32), Desk(loop, store, "b" * 32)
    starting.etcd.script("Txn", ANSWER_LOST, REQUEST_LOST, REQUEST_LOST, REQUEST_LOST)
    starting.open()
    running.open()
    store.wipe()
    for number in range(50):  # Others have data there, too: the revision tells nothing.
        store.put(f"/elsewhere/{number}", b"")
    starting.wait()
    running.submit(running.ask("1"))
    running.wait()
    assert running.ledger.halted
    assert running.answers == []


def test_a_wiped_etcd_that_another_replica_has_begun_anew_is_noticed(
    loop: ManualLoop, desk: Desk, store: Store
) -> None:
    desk.submit(desk.ask("1"))
    store.wipe()
    other = Desk(loop, store, "b" * 32)
    other.open()
    for number in range(100):
        store.put("/elsewhere", b"%d" % number)
    desk.submit(desk.ask("2"))
    desk.wait()
    assert_halted(desk, "wiped")
    assert [change.key for change in store.puts("/service/")] == [KEY]


def test_a_restored_etcd_is_noticed_by_its_revision(desk: Desk, store: Store) -> None:
    desk.submit(desk.ask("1"))
    older = store.snapshot()
    for number in range(2, 7):
        desk.submit(desk.ask(str(number)))
    answers = len(desk.answers)
    store.restore(older)
    desk.submit(desk.ask("7"))
    desk.wait()
    assert len(desk.answers) == answers
    assert_halted(desk, "restored from an older state")


def test_a_duplicate_is_not_confirmed_by_a_restored_etcd(desk: Desk, store: Store) -> None:
    """The record it finds is older, and true; the one beside it may be missing. All is held."""
    desk.submit(desk.ask("1"))
    older = store.snapshot()
    desk.submit(desk.ask("2"))
    store.restore(older)
    desk.submit(desk.ask("1"))
    desk.wait()
    assert len(desk.answers) == 2
    assert_halted(desk, "restored")


@pytest.mark.parametrize("wiped", [True, False])
def test_without_any_commit_the_guard_notices(desk: Desk, store: Store, wiped: bool) -> None:
    """Traffic that is all duplicates sends no transaction."""
    desk.submit(desk.ask("1"))
    older = store.snapshot()
    desk.submit(desk.ask("2"))
    desk.loop.advance(GUARD_EVERY_S)
    assert desk.health.missing == {}
    if wiped:
        store.wipe()
        for _ in range(100):
            store.put("/elsewhere", b"")
    else:
        store.restore(older)
    desk.loop.advance(GUARD_EVERY_S + 0.1)
    assert_halted(desk, "wiped" if wiped else "restored")


def test_the_guard_goes_on_after_an_outage(desk: Desk, store: Store) -> None:
    desk.etcd.fate = lambda _method, _request: REQUEST_LOST
    desk.loop.advance(300)
    desk.etcd.fate = lambda _method, _request: FINE
    desk.wait()
    assert desk.health.missing == {}
    store.wipe()
    desk.loop.advance(GUARD_EVERY_S + 1)
    assert "etcd" in desk.health.missing


def test_an_answer_that_was_overtaken_is_no_older_state(desk: Desk) -> None:
    """Held against what was seen before its request was sent, not before it came."""
    desk.etcd.script("Txn", answered_late(2.0))
    desk.submit(desk.ask("1"))
    for number in range(2, 9):
        desk.submit(desk.ask(str(number)))
    desk.loop.advance(2.1)
    assert len(desk.answers) == 8
    assert desk.health.missing == {}


def test_an_answer_on_its_way_when_etcd_was_wiped_settles_nothing_after_the_halt(
    desk: Desk, store: Store
) -> None:
    desk.submit(desk.ask("0"))
    desk.etcd.script("Txn", answered_late(4.0))
    desk.submit(desk.ask("1"))
    store.wipe()
    desk.submit(desk.ask("2"))
    desk.loop.advance(10)
    assert len(desk.answers) == 1


def test_a_restart_accepts_the_etcd_there_is(loop: ManualLoop, desk: Desk, store: Store) -> None:
    store.wipe()
    desk.loop.advance(GUARD_EVERY_S + 0.1)
    assert "etcd" in desk.health.missing
    again = Desk(loop, store, "c" * 32)
    again.open()
    again.submit(again.ask("1"))
    assert again.answer.landed
    assert again.has_said("info", "new, or was wiped")


def test_a_closed_ledger_answers_nothing(desk: Desk) -> None:
    desk.etcd.script("Txn", answered_late(1.0))
    desk.submit(desk.ask("1"))
    desk.ledger.close()
    desk.loop.advance(60)
    assert desk.answers == []


def test_what_was_committed_or_found_done_is_known_afterwards(
    loop: ManualLoop, desk: Desk, store: Store
) -> None:
    """The next duplicate asks nobody; another body does."""
    other = Desk(loop, store, "b" * 32)
    other.open()
    other.submit(other.ask("2"))
    other.submit(other.ask("3", Kind.CLAIM))
    desk.submit(desk.ask("1"), desk.ask("2"), desk.ask("3"))
    known = [desk.ledger.is_done(digest_of(each)) for each in "123"]
    assert known == [True, True, False]
    assert not desk.ledger.is_done(OTHER_DIGEST)
