"""The ledger: what is concluded from each thing that etcd can answer, or not answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fakes.ledger import OTHER_DIGEST, Replica, digest_of
from idempotent_consumer.event import Publish, Put, check_effects
from idempotent_consumer.ledger import GUARD_EVERY_S, RELEASED_S
from idempotent_consumer.records import CLAIMED, DONE, PUBLISHING, RELEASED, Kind, decode
from idempotent_consumer.testing.etcd import (
    ANSWER_LOST,
    FINE,
    REQUEST_LOST,
    TOO_LARGE,
    Call,
    Fate,
    Store,
    answered_late,
    applied_late,
    refused,
)
from idempotent_consumer.testing.loop import Loop

OTHER_PROCESS = "b" * 32
EFFECT = Put("/orders/1", b"placed")
KEY = b"/service/order/1"


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def store(loop: Loop) -> Store:
    return Store(loop.time)


@pytest.fixture
def replica(loop: Loop, store: Store) -> Replica:
    replica = Replica(loop, store)
    replica.open()
    return replica


@pytest.fixture
def other(loop: Loop, store: Store) -> Replica:
    """Give another replica on the same etcd."""
    other = Replica(loop, store, OTHER_PROCESS)
    other.open()
    return other


def record_of(store: Store, event_id: str) -> tuple[str, str, str]:
    kv = store.get(f"/service/order/{event_id}")
    record = decode(kv.value)
    return record.state, record.digest, record.token


# Landing.


def test_a_new_event_and_its_effects_are_recorded_in_one_transaction(
    replica: Replica, store: Store
) -> None:
    ask = replica.ask("1", effects=(EFFECT, Put("/stock/7", b"-1")))
    replica.commit(ask)
    assert replica.answer.landed
    assert record_of(store, "1") == (DONE, digest_of("1"), ask.token)
    revisions = {
        store.get(key).mod_revision for key in ("/service/order/1", "/orders/1", "/stock/7")
    }
    assert revisions == {store.revision}


def test_effects_outlive_the_window_and_the_record_does_not(replica: Replica, store: Store) -> None:
    """A record stands under a lease, an order does not."""
    replica.commit(replica.ask("1", effects=(EFFECT,)))
    replica.loop.freeze(24 * 3600 + 601)
    replica.loop.advance(24 * 3600 + 601)
    assert store.get("/service/order/1") is None
    assert store.get("/orders/1").value == b"placed"


def test_a_lost_answer_then_the_own_token_found_is_landed(replica: Replica, store: Store) -> None:
    replica.etcd.script("Txn", ANSWER_LOST)
    replica.commit(replica.ask("1", effects=(EFFECT,)))
    assert replica.answers == []
    replica.wait()
    assert replica.answer.landed
    assert len(store.puts("/orders/")) == 1


def test_a_lost_request_is_sent_again(replica: Replica, store: Store) -> None:
    replica.etcd.script("Txn", REQUEST_LOST, REQUEST_LOST)
    replica.commit(replica.ask("1"))
    replica.wait()
    assert replica.answer.landed
    assert len(store.puts("/service/order/")) == 1


def test_every_sending_of_an_ask_has_the_same_bytes(replica: Replica) -> None:
    """Time and token are written once: only so does an ask know its own write again."""
    replica.etcd.script("Txn", REQUEST_LOST, Fate(None, 3.0, refused("x").error), ANSWER_LOST)
    replica.commit(replica.ask("1"), replica.ask("2", effects=(EFFECT,)))
    replica.wait()
    sent = [
        [op.request_put.SerializeToString() for op in request.success]
        for request in replica.etcd.sent("Txn")[1:]
        if request.compare
    ]
    assert len(sent) == 4
    assert all(puts == sent[0] for puts in sent)


@pytest.mark.parametrize("delay_s", [0.001, 0.5, 3, 29])
def test_a_transaction_that_applies_after_its_error_never_puts_twice(
    replica: Replica, store: Store, delay_s: float
) -> None:
    """Whichever attempt comes first, the others find it there."""
    replica.etcd.script("Txn", applied_late(delay_s), applied_late(delay_s / 2), FINE)
    replica.commit(replica.ask("1", effects=(EFFECT,)), replica.ask("2"))
    replica.wait()
    assert [answer.landed for answer in replica.answers] == [True, True]
    assert [change.key for change in store.puts("")[1:]] == [
        b"/service/order/1",
        b"/orders/1",
        b"/service/order/2",
    ]


def test_a_late_answer_is_waited_for_and_not_asked_twice(replica: Replica) -> None:
    replica.etcd.script("Txn", answered_late(4.0))
    replica.commit(replica.ask("1"))
    replica.loop.advance(3.9)
    assert replica.answers == []
    replica.loop.advance(0.2)
    assert replica.answer.landed
    assert len(replica.etcd.sent("Txn")) == 2


# What stands in the way.


def test_a_record_with_the_same_digest_is_a_duplicate(replica: Replica, other: Replica) -> None:
    other.commit(other.ask("1"))
    replica.commit(replica.ask("1", effects=(EFFECT,)))
    assert not replica.answer.landed
    assert replica.answer.found is not None
    assert (replica.answer.found.state, replica.answer.found.digest) == (DONE, digest_of("1"))
    assert replica.store.get("/orders/1") is None


def test_a_record_with_another_digest_is_a_conflict(replica: Replica, other: Replica) -> None:
    other.commit(other.ask("1"))
    before = replica.store.get("/service/order/1")
    replica.commit(replica.ask("1", digest=OTHER_DIGEST))
    assert replica.answer.found is not None
    assert replica.answer.found.digest == digest_of("1")
    assert replica.store.get("/service/order/1") == before


def test_a_record_claimed_by_another_is_shown_with_its_owner(
    replica: Replica, other: Replica
) -> None:
    other.commit(other.ask("1", Kind.CLAIM))
    replica.commit(replica.ask("1", Kind.CLAIM))
    found = replica.answer.found
    assert found is not None
    assert found.state == CLAIMED
    assert found.token.startswith(other.process)


def test_a_record_that_nobody_here_wrote_is_nobodys_duplicate(
    replica: Replica, store: Store
) -> None:
    """An operator's own text under the prefix: what arrives with that id is parked, not acked."""
    for event_id, value in (("1", b"x"), ("2", b"[]"), ("3", b'{"state":"done"}'), ("4", b"")):
        store.put(f"/service/order/{event_id}", value)
        replica.answers.clear()
        replica.commit(replica.ask(event_id))
        found = replica.answer.found
        assert found is not None
        assert (found.state, found.digest == digest_of("1")) == (DONE, False)


def test_what_stands_in_nobodys_way_is_committed_again(
    replica: Replica, other: Replica, store: Store
) -> None:
    """One duplicate in a batch costs the others a second transaction, and nothing else."""
    other.commit(other.ask("2"))
    replica.commit(*(replica.ask(str(n), effects=(Put(f"/orders/{n}", b"x"),)) for n in range(5)))
    landed = {answer.ask.key[-1:]: answer.landed for answer in replica.answers}
    assert landed == {b"0": True, b"1": True, b"2": False, b"3": True, b"4": True}
    assert store.keys("/orders/") == ["/orders/0", "/orders/1", "/orders/3", "/orders/4"]
    assert all(store.get(key).version == 1 for key in store.keys("/orders/"))


def test_a_remaining_batch_whose_answer_is_lost_is_not_recorded_twice(
    replica: Replica, other: Replica, store: Store
) -> None:
    other.commit(other.ask("2"))
    replica.etcd.script("Txn", FINE, ANSWER_LOST, FINE)
    replica.commit(*(replica.ask(str(n)) for n in range(4)))
    replica.wait()
    assert sorted(a.ask.key[-1:] for a in replica.answers if a.landed) == [b"0", b"1", b"3"]
    assert len(store.puts("/service/order/")) == 4


def test_two_replicas_at_the_same_instant_one_wins(
    replica: Replica, other: Replica, store: Store
) -> None:
    """Both transactions are on their way; only the first can land."""
    mine, theirs = replica.ask("1", effects=(EFFECT,)), other.ask("1", effects=(EFFECT,))
    for each, ask in ((replica, mine), (other, theirs)):
        each.etcd.script("Txn", Fate(applies_s=1.0))
        each.commit(ask)
    replica.loop.advance(1.0)
    assert [replica.answer.landed, other.answer.landed] == [True, False]
    assert store.get("/orders/1").version == 1


def test_a_look_reads_and_changes_nothing(replica: Replica, other: Replica, store: Store) -> None:
    other.commit(other.ask("1"))
    before = store.revision
    replica.commit(replica.ask("1", Kind.LOOK), replica.ask("2", Kind.LOOK))
    found, absent = replica.answers
    assert found.found is not None
    assert found.found.state == DONE
    assert (absent.landed, absent.found) == (False, None)
    assert store.revision == before


def test_a_look_beside_a_failing_transaction_is_answered_too(
    replica: Replica, other: Replica
) -> None:
    other.commit(other.ask("1"))
    replica.commit(replica.ask("1"), replica.ask("1x", Kind.LOOK), replica.ask("2"))
    assert {(a.ask.key[15:], a.landed) for a in replica.answers} == {
        (b"1", False),
        (b"1x", False),
        (b"2", True),
    }


# Replies that are larger than gRPC receives.


def room_for_reads(number: int) -> Callable[[Call], Fate]:
    """Let a transaction's reply have room for so many reads; a larger one has applied as well."""

    def fate(call: Call) -> Fate:
        reads = call.method == "Txn" and sum(
            operation.HasField("request_range") for operation in call.request.success
        )
        return FINE if reads <= number else Fate(error=TOO_LARGE)

    return fate


@pytest.mark.parametrize("kind", [Kind.RECORD, Kind.LOOK, Kind.CLAIM])
def test_records_that_are_too_large_for_one_reply_are_read_in_several(
    replica: Replica, other: Replica, kind: Kind
) -> None:
    """Asking for all of them again would fail again, for ever."""
    events = [Publish("t", {"a": "x" * 100})]
    asks = [other.ask(str(n), Kind.PUBLISH, digest=OTHER_DIGEST) for n in range(20)]
    for ask in asks:
        ask.effects = check_effects(events, "order", "1")
    other.commit(*asks)
    replica.etcd.fate = room_for_reads(3)
    replica.commit(*(replica.ask(str(n), kind) for n in range(25)))
    found = {answer.ask.key: answer.found for answer in replica.answers}
    assert len(found) == 25
    assert sum(record is not None and record.state == PUBLISHING for record in found.values()) == 20
    assert not replica.has_logged("warning", "")
    assert replica.health.missing == {}


def test_looks_beside_what_has_landed_are_read_in_several_replies_too(
    replica: Replica, store: Store
) -> None:
    replica.etcd.fate = room_for_reads(3)
    replica.commit(replica.ask("1"), *(replica.ask(f"x{n}", Kind.LOOK) for n in range(10)))
    assert [answer.landed for answer in replica.answers] == [True, *[False] * 10]
    assert len(store.puts("/service/order/")) == 1


# Claims.


def test_only_the_claim_that_is_expected_becomes_done(replica: Replica, store: Store) -> None:
    replica.commit(replica.ask("1", Kind.CLAIM))
    assert record_of(store, "1")[0] == CLAIMED
    claim = replica.answer.ask.value
    replica.answers.clear()
    replica.commit(replica.ask("1", expect=claim + b" "))
    assert not replica.answer.landed
    replica.answers.clear()
    replica.commit(replica.ask("1", expect=claim, effects=(EFFECT,)))
    assert replica.answer.landed
    assert record_of(store, "1")[0] == DONE


def test_a_done_record_outlives_the_claims_lease(replica: Replica, store: Store) -> None:
    """It is put under the window's lease, so the end of the process does not take it along."""
    replica.commit(replica.ask("1", Kind.CLAIM))
    replica.commit(replica.ask("1", expect=replica.answer.ask.value))
    replica.end()
    replica.loop.advance(3600)
    assert record_of(store, "1")[0] == DONE


def test_a_claim_goes_with_a_process_that_ends(replica: Replica, store: Store) -> None:
    replica.commit(replica.ask("1", Kind.CLAIM))
    replica.end()
    replica.loop.advance(14.9)
    assert record_of(store, "1")[0] == CLAIMED
    replica.loop.advance(0.2)
    assert store.get("/service/order/1") is None


def test_a_released_claim_is_put_as_released_and_can_be_claimed(
    replica: Replica, other: Replica, store: Store
) -> None:
    replica.commit(replica.ask("1", Kind.CLAIM))
    replica.commit(replica.ask("1", Kind.RELEASE, expect=replica.answers[0].ask.value))
    assert replica.answers[1].landed
    assert record_of(store, "1")[0] == RELEASED
    other.commit(other.ask("1", Kind.CLAIM))
    found = other.answer.found
    assert found is not None
    assert found.state == RELEASED
    other.commit(other.ask("1", Kind.CLAIM, expect=found.value))
    assert other.answers[1].landed


def test_a_released_record_ends_by_itself_though_its_process_goes_on(
    replica: Replica, store: Store
) -> None:
    """Under the claims' lease, which is kept alive, each failure would stay for good."""
    replica.commit(replica.ask("1", Kind.CLAIM))
    replica.commit(replica.ask("1", Kind.RELEASE, expect=replica.answer.ask.value))
    replica.loop.advance(RELEASED_S)
    assert record_of(store, "1")[0] == RELEASED
    replica.loop.advance(RELEASED_S / 5)
    assert store.get("/service/order/1") is None


def test_a_lost_lease_of_released_records_is_replaced(replica: Replica, store: Store) -> None:
    for event_id in "12":
        replica.commit(replica.ask(event_id, Kind.CLAIM))
    for answer in list(replica.answers):
        event_id = answer.ask.key[-1:].decode()
        replica.commit(replica.ask(event_id, Kind.RELEASE, expect=answer.ask.value))
        replica.wait()
        assert record_of(store, event_id)[0] == RELEASED
        store.revoke(store.get(f"/service/order/{event_id}").lease)


def test_a_claim_that_applies_late_does_not_come_back_after_its_release(
    replica: Replica, store: Store
) -> None:
    """Had the release deleted the record, the late attempt would find it absent and land."""
    replica.etcd.script("Txn", applied_late(10.0), FINE)
    replica.commit(replica.ask("1", Kind.CLAIM))
    replica.loop.advance(5.0)
    replica.commit(replica.ask("1", Kind.RELEASE, expect=replica.answer.ask.value))
    replica.loop.advance(5.1)
    assert record_of(store, "1")[0] == RELEASED


# Leases that etcd does not know.


def test_a_lost_window_lease_is_replaced_and_the_same_values_are_put(
    replica: Replica, store: Store
) -> None:
    replica.commit(replica.ask("0"))
    first = store.get("/service/order/0").lease
    store.revoke(first)
    ask = replica.ask("1", effects=(EFFECT,))
    replica.commit(ask)
    replica.wait()
    assert replica.answers[-1].landed
    kv = store.get("/service/order/1")
    assert kv.lease not in (0, first)
    assert kv.value == ask.value
    attempts = [r for r in replica.etcd.sent("Txn") if r.success[0].request_put.key == ask.key]
    assert len({r.success[0].request_put.value for r in attempts}) == 1
    assert [r.success[0].request_put.lease for r in attempts] == [first, kv.lease]


def test_a_lost_lease_of_released_records_is_replaced_too(replica: Replica, store: Store) -> None:
    for event_id in "12":
        replica.commit(replica.ask(event_id, Kind.CLAIM))
        replica.commit(replica.ask(event_id, Kind.RELEASE, expect=replica.answers[-1].ask.value))
        replica.wait()
        assert record_of(store, event_id)[0] == RELEASED
        store.revoke(store.get(f"/service/order/{event_id}").lease)


def test_a_lost_lease_does_not_make_the_service_unready(replica: Replica, store: Store) -> None:
    replica.commit(replica.ask("0"))
    store.revoke(store.get("/service/order/0").lease)
    replica.commit(replica.ask("1"))
    assert replica.health.missing == {}


# Errors that say nothing.


@pytest.mark.parametrize(
    "error",
    [
        refused("mvcc: database space exceeded"),
        refused("request timed out"),
        refused("leader changed"),
        refused("no leader"),
        refused("too many requests"),
        refused("request is too large"),
        refused("user name is empty"),
        refused("invalid auth token"),
        refused("permission denied"),
        REQUEST_LOST,
    ],
)
def test_an_error_holds_the_batch_and_makes_the_service_unready_until_it_is_over(
    replica: Replica, error: Fate
) -> None:
    """No status parks, splits or settles: the same transaction is sent until it is answered."""
    replica.etcd.fate = lambda _: error
    replica.commit(replica.ask("1"), replica.ask("2"))
    replica.loop.advance(600)
    assert replica.answers == []
    assert error.error is not None
    assert replica.health.missing == {"etcd": error.error.details()}
    assert replica.has_logged("warning", error.error.details())
    replica.etcd.fate = lambda _: FINE
    replica.wait()
    assert [answer.landed for answer in replica.answers] == [True, True]
    assert replica.health.missing == {}


def test_a_long_outage_is_one_warning_and_a_bounded_number_of_attempts(replica: Replica) -> None:
    replica.commit(replica.ask("0"))
    before = len(replica.etcd.sent("Txn"))
    replica.etcd.fate = lambda _: REQUEST_LOST
    replica.commit(replica.ask("1"))
    replica.loop.advance(600)
    warnings = [line for line in replica.lines.entries if line["log_level"] == "warning"]
    assert len(warnings) == 1
    attempts = len(replica.etcd.sent("Txn")) - before
    assert 300 < attempts < 1500, "about one a second, with jitter"


def test_a_full_etcd_keeps_nothing_and_loses_nothing(replica: Replica, store: Store) -> None:
    """NOSPACE as etcd itself has it, on the lease as on the transaction."""
    store.out_of_space = True
    replica.commit(replica.ask("1"))
    replica.loop.advance(60)
    assert replica.answers == []
    store.out_of_space = False
    replica.wait()
    assert replica.answer.landed


def test_a_full_etcd_is_not_back_because_it_answers_a_look(replica: Replica, store: Store) -> None:
    replica.commit(replica.ask("0"))
    store.out_of_space = True
    replica.commit(replica.ask("1"))
    replica.commit(replica.ask("2", Kind.LOOK))
    assert list(replica.health.missing) == ["etcd"]
    assert not replica.has_logged("info", "answers again")
    store.out_of_space = False
    replica.wait()
    assert replica.health.missing == {}


def test_an_outage_at_the_start_is_waited_out(loop: Loop, store: Store) -> None:
    replica = Replica(loop, store)
    replica.etcd.fate = lambda _: REQUEST_LOST
    replica.open()
    loop.advance(300)
    assert (replica.opened, list(replica.health.missing)) == (False, ["etcd"])
    replica.etcd.fate = lambda _: FINE
    replica.wait()
    assert (replica.opened, replica.health.missing) == (True, {})


# An etcd that is not the one seen before: wiped, or restored from an older state.


def assert_halted(replica: Replica, why: str) -> None:
    """Nothing is answered or written any more, in an hour of good weather, and it says why.

    The other etcd's revisions begin again: a record expected at one of them may be there.
    """
    answers, sent = len(replica.answers), len(replica.etcd.sent("Txn"))
    assert why in replica.health.missing["etcd"]
    assert replica.has_logged("critical", why)
    replica.commit(replica.ask("new"))
    replica.loop.advance(3600)
    assert len(replica.answers) == answers
    assert len(replica.etcd.sent("Txn")) == sent
    assert why in replica.health.missing["etcd"]
    assert not replica.ledger.is_done(digest_of("1"))


def test_the_first_start_and_a_later_one_say_what_they_found(loop: Loop, store: Store) -> None:
    first, second = Replica(loop, store), Replica(loop, store, "b" * 32)
    first.open()
    second.open()
    assert first.has_logged("info", "new, or was wiped")
    assert second.has_logged("info", "it holds this service's history")
    assert len(store.puts("/incarnation/order")) == 1


def test_a_commit_notices_a_wiped_etcd(replica: Replica, store: Store) -> None:
    replica.commit(replica.ask("1"))
    store.wipe()
    replica.commit(replica.ask("1"))
    replica.wait()
    assert len(replica.answers) == 1
    assert store.get("/service/order/1") is None
    assert_halted(replica, "restored from an older state: revision 1, 3 seen before")


def test_a_wiped_etcd_that_another_service_filled_is_noticed_by_its_incarnation(
    replica: Replica, store: Store
) -> None:
    """Its revision has passed the one seen before; only the key tells."""
    replica.commit(replica.ask("1"))
    store.wipe()
    for number in range(100):
        store.put("/elsewhere", b"%d" % number)
    replica.commit(replica.ask("2", Kind.LOOK), replica.ask("3"))
    replica.wait()
    assert len(replica.answers) == 1
    assert_halted(replica, "wiped")


def test_a_start_that_spans_a_wipe_does_not_bring_the_old_incarnation_back(
    loop: Loop, store: Store
) -> None:
    """Its first attempt applied, unseen, and gave the old data their name."""
    starting, running = Replica(loop, store, "a" * 32), Replica(loop, store, "b" * 32)
    starting.etcd.script("Txn", ANSWER_LOST, REQUEST_LOST, REQUEST_LOST, REQUEST_LOST)
    starting.open()
    running.open()
    store.wipe()
    for number in range(50):  # Others have data there, too: the revision tells nothing.
        store.put(f"/elsewhere/{number}", b"")
    starting.wait()
    running.commit(running.ask("1"))
    running.wait()
    assert running.ledger.halted
    assert running.answers == []


def test_a_wiped_etcd_that_another_replica_has_begun_anew_is_noticed(
    loop: Loop, replica: Replica, store: Store
) -> None:
    replica.commit(replica.ask("1"))
    store.wipe()
    other = Replica(loop, store, "b" * 32)
    other.open()
    for number in range(100):
        store.put("/elsewhere", b"%d" % number)
    replica.commit(replica.ask("2"))
    replica.wait()
    assert_halted(replica, "wiped")
    assert [change.key for change in store.puts("/service/")] == [KEY]


def test_a_restored_etcd_is_noticed_by_its_revision(replica: Replica, store: Store) -> None:
    replica.commit(replica.ask("1"))
    older = store.snapshot()
    for number in range(2, 7):
        replica.commit(replica.ask(str(number)))
    answers = len(replica.answers)
    store.restore(older)
    replica.commit(replica.ask("7"))
    replica.wait()
    assert len(replica.answers) == answers
    assert_halted(replica, "restored from an older state")


def test_a_claim_from_before_a_restore_is_no_other_record_at_its_revision(
    loop: Loop, store: Store
) -> None:
    """What a frozen replica does not notice when etcd's revision has passed what it has seen."""
    frozen, other = Replica(loop, store), Replica(loop, store, OTHER_PROCESS)
    frozen.open()
    other.open()
    older = store.snapshot()
    frozen.commit(frozen.ask("1", Kind.CLAIM))
    claim, revision = frozen.answer.ask.value, store.get("/service/order/1").mod_revision
    store.restore(older)
    while store.revision < revision - 1:
        store.put("/elsewhere", b"")
    later = Replica(loop, store, "c" * 32)
    later.open()
    later.commit(later.ask("1", effects=(EFFECT,)))
    assert store.get("/service/order/1").mod_revision == revision
    store.put("/elsewhere", b"")
    frozen.answers.clear()
    frozen.commit(frozen.ask("1", expect=claim, effects=(EFFECT,)))
    assert frozen.answer.found is not None
    assert frozen.answer.found.state == DONE
    assert len(store.puts("/orders/")) == 1


def test_a_duplicate_is_not_confirmed_by_a_restored_etcd(replica: Replica, store: Store) -> None:
    """The record it finds is older, and true; the one beside it may be missing. All is held."""
    replica.commit(replica.ask("1"))
    older = store.snapshot()
    replica.commit(replica.ask("2"))
    store.restore(older)
    replica.commit(replica.ask("1"))
    replica.wait()
    assert len(replica.answers) == 2
    assert_halted(replica, "restored")


@pytest.mark.parametrize("wiped", [True, False])
def test_without_any_commit_the_guard_notices(replica: Replica, store: Store, wiped: bool) -> None:
    """Traffic that is all duplicates sends no transaction."""
    replica.commit(replica.ask("1"))
    older = store.snapshot()
    replica.commit(replica.ask("2"))
    replica.loop.advance(GUARD_EVERY_S)
    assert replica.health.missing == {}
    if wiped:
        store.wipe()
        for _ in range(100):
            store.put("/elsewhere", b"")
    else:
        store.restore(older)
    replica.loop.advance(GUARD_EVERY_S + 0.1)
    assert_halted(replica, "wiped" if wiped else "restored")


def test_the_guard_goes_on_after_an_outage(replica: Replica, store: Store) -> None:
    replica.etcd.fate = lambda _: REQUEST_LOST
    replica.loop.advance(300)
    replica.etcd.fate = lambda _: FINE
    replica.wait()
    assert replica.health.missing == {}
    store.wipe()
    replica.loop.advance(GUARD_EVERY_S + 1)
    assert "etcd" in replica.health.missing


def test_an_answer_that_was_overtaken_is_no_older_state(replica: Replica) -> None:
    """Held against what was seen before its request was sent, not before it came."""
    replica.etcd.script("Txn", answered_late(2.0))
    replica.commit(replica.ask("1"))
    for number in range(2, 9):
        replica.commit(replica.ask(str(number)))
    replica.loop.advance(2.1)
    assert len(replica.answers) == 8
    assert replica.health.missing == {}


def test_an_answer_on_its_way_when_etcd_was_wiped_settles_nothing_after_the_halt(
    replica: Replica, store: Store
) -> None:
    replica.commit(replica.ask("0"))
    replica.etcd.script("Txn", answered_late(4.0))
    replica.commit(replica.ask("1"))
    store.wipe()
    replica.commit(replica.ask("2"))
    replica.loop.advance(10)
    assert len(replica.answers) == 1


def test_a_restart_accepts_the_etcd_there_is(loop: Loop, replica: Replica, store: Store) -> None:
    store.wipe()
    replica.loop.advance(GUARD_EVERY_S + 0.1)
    assert "etcd" in replica.health.missing
    again = Replica(loop, store, "c" * 32)
    again.open()
    again.commit(again.ask("1"))
    assert again.answer.landed
    assert again.has_logged("info", "new, or was wiped")


@pytest.mark.parametrize("fate", [answered_late(1.0), REQUEST_LOST])
def test_a_process_that_ends_takes_no_answer_and_asks_nothing_more(
    replica: Replica, fate: Fate
) -> None:
    replica.etcd.script("Txn", fate)
    replica.commit(replica.ask("1"))
    sent = len(replica.etcd.calls)
    replica.end()
    replica.loop.run_until_complete(replica.ledger.close())
    replica.loop.advance(60)
    assert replica.answers == []
    assert len(replica.etcd.calls) == sent


def test_what_was_committed_or_found_done_is_known_afterwards(
    loop: Loop, replica: Replica, store: Store
) -> None:
    """The next duplicate asks nobody; another body does."""
    other = Replica(loop, store, "b" * 32)
    other.open()
    other.commit(other.ask("2"))
    other.commit(other.ask("3", Kind.CLAIM))
    replica.commit(replica.ask("1"), replica.ask("2"), replica.ask("3"))
    known = [replica.ledger.is_done(digest_of(each)) for each in "123"]
    assert known == [True, True, False]
    assert not replica.ledger.is_done(OTHER_DIGEST)
