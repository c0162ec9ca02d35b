"""The ledger: what it concludes from etcd's replies, and from their absence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from grpc import StatusCode

from fakes.ledger import LONGER_THAN_ANY_BACKOFF_S, OTHER_DIGEST, Replica, digest_of
from idempotent_consumer.event import Publish, Put
from idempotent_consumer.ledger import GUARD_EVERY_S, RELEASED_S
from idempotent_consumer.records import DONE, PUBLISHING, RELEASED, Kind
from idempotent_consumer.settings import Settings
from idempotent_consumer.testing import etcd

EFFECT = Put("/orders/1", b"placed")


@pytest.fixture
def replica() -> Replica:
    return Replica().open()


@pytest.fixture
def other(replica: Replica) -> Replica:
    """Return another replica on the same etcd."""
    return Replica(replica, "b" * 32).open()


def test_an_effect_outlives_the_window_and_its_record_does_not(replica: Replica) -> None:
    replica.commit(replica.ask("1", effects=(EFFECT,)))
    replica.loop.freeze(24 * 3600 + 601)
    replica.loop.advance(24 * 3600 + 601)
    assert replica.store.get("/service/order/1") is None
    assert replica.store.get("/orders/1").value == b"placed"


@pytest.mark.parametrize(
    "fates",
    [
        [etcd.ANSWER_LOST],
        [etcd.REQUEST_LOST, etcd.REQUEST_LOST],
        [*(etcd.Fate(late_s, error=etcd.TIMED_OUT) for late_s in (29, 3)), etcd.FINE],
    ],
)
def test_what_is_sent_several_times_is_put_once(replica: Replica, fates: list[etcd.Fate]) -> None:
    """Whichever attempt applies first, the others recognise it by its token."""
    replica.etcd.script("Txn", *fates)
    replica.commit(replica.ask("1", effects=(EFFECT,)), replica.ask("2"))
    assert replica.answers == []
    replica.wait()
    assert [answer.landed for answer in replica.answers] == [True, True]
    puts = [change.key for change in replica.store.puts("")[1:]]
    assert puts == [b"/service/order/1", b"/orders/1", b"/service/order/2"]


# Replies that are too large for gRPC.


def room_for_reads(number: int) -> Callable[[etcd.Call], etcd.Fate]:
    """Let a reply have room for this many reads. A transaction with more applies all the same."""

    def fate(call: etcd.Call) -> etcd.Fate:
        reads = call.method == "Txn" and sum(
            operation.HasField("request_range") for operation in call.request.success
        )
        return etcd.FINE if reads <= number else etcd.Fate(error=etcd.TOO_LARGE)

    return fate


@pytest.mark.parametrize("kind", [Kind.RECORD, Kind.LOOK])
@pytest.mark.parametrize("order", [1, -1], ids=["large first", "large last"])
def test_large_records_are_read_in_several_replies(
    replica: Replica, other: Replica, kind: Kind, order: int
) -> None:
    """Asking again for all of them would fail for ever."""
    events = [Publish("t", {"a": "x" * 100})]
    publish = partial(other.ask, kind=Kind.PUBLISH, digest=OTHER_DIGEST, effects=events)
    other.commit(*(publish(str(n)) for n in range(20)))
    replica.etcd.fate = room_for_reads(3)
    replica.commit(*(replica.ask(str(n), kind) for n in range(25)[::order]))
    found = {answer.ask.key: answer.found for answer in replica.answers}
    assert len(found) == 25
    assert sum(record is not None and record.state == PUBLISHING for record in found.values()) == 20
    assert not replica.has_logged("warning", "")
    assert replica.health.missing == {}


@pytest.mark.parametrize("kind", [Kind.RECORD, Kind.LOOK])
def test_a_record_that_no_reply_has_room_for_is_held(replica: Replica, kind: Kind) -> None:
    """It cannot be split. If the process ended, it would meet the record again at each start."""
    replica.store.put("/service/order/1", b"an operator's")
    replica.etcd.fate = room_for_reads(1)
    replica.commit(replica.ask("1", kind))
    replica.loop.advance(60)
    assert replica.answers == []
    assert "larger than max" in replica.health.missing.get("etcd", "")
    replica.etcd.fate = lambda _: etcd.FINE
    replica.wait()
    assert [answer.landed for answer in replica.answers] == [False]
    assert replica.health.missing == {}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("request is too large", StatusCode.UNKNOWN),
        # etcd's gRPC says this of a request, and ours of a reply.
        ("grpc: received message larger than max (2 vs. 1)", StatusCode.RESOURCE_EXHAUSTED),
        ("mvcc: database space exceeded", StatusCode.RESOURCE_EXHAUSTED),
    ],
)
def test_etcd_is_missing_while_it_refuses_one_write_whatever_else_it_answers(
    replica: Replica, text: str, code: StatusCode
) -> None:
    def fate(call: etcd.Call) -> etcd.Fate:
        is_refused = call.method == "Txn" and b"/refused" in call.request.SerializeToString()
        return etcd.refused(text, code) if is_refused else etcd.FINE

    replica.etcd.fate = fate
    replica.commit(replica.ask("refused"))
    kinds = [Kind.RECORD, Kind.LOOK] * 10
    for number, kind in enumerate(kinds):
        replica.commit(replica.ask(str(number), kind))
        assert text in replica.health.missing.get("etcd", "")
        replica.loop.advance(1)
    assert [answer.ask.kind for answer in replica.answers] == kinds
    replica.etcd.fate = lambda _: etcd.FINE
    replica.wait()
    assert replica.answers[-1].landed
    assert replica.health.missing == {}
    lines = [line["event"] for line in replica.lines.entries if "answer" in line["event"]]
    assert [event.partition(":")[0] for event in lines] == [
        "etcd does not answer",
        "etcd answers again",
    ]


# Leases.


def release(replica: Replica, event_id: str) -> None:
    (claimed,) = replica.commit(replica.ask(event_id, Kind.CLAIM))
    replica.commit(replica.ask(event_id, Kind.RELEASE, expect=claimed.ask.value))
    replica.wait()
    assert replica.record(event_id).state == RELEASED


def test_a_released_record_expires_while_its_process_goes_on(replica: Replica) -> None:
    """Under the lease of the claims, which is kept alive, it would never expire.

    When etcd has ended the lease of released records, the next record gets a new one.
    """
    release(replica, "1")
    replica.loop.advance(RELEASED_S - LONGER_THAN_ANY_BACKOFF_S)
    assert replica.record("1").state == RELEASED
    replica.loop.advance(RELEASED_S / 5)
    assert replica.store.get("/service/order/1") is None
    release(replica, "2")
    replica.store.revoke(replica.store.get("/service/order/2").lease)
    release(replica, "3")


def test_a_window_lease_that_has_ended_is_replaced_and_the_same_values_are_put(
    replica: Replica,
) -> None:
    replica.commit(replica.ask("0"))
    first = replica.store.get("/service/order/0").lease
    replica.store.revoke(first)
    ask = replica.ask("1", effects=(EFFECT,))
    replica.commit(ask)
    assert replica.health.missing == {}, "etcd has answered"
    replica.wait()
    assert replica.answers[-1].landed
    kv = replica.store.get("/service/order/1")
    assert kv.lease not in (0, first)
    assert kv.value == ask.value
    attempts = [r for r in replica.etcd.sent("Txn") if r.success[0].request_put.key == ask.key]
    assert len({r.success[0].request_put.value for r in attempts}) == 1
    assert [r.success[0].request_put.lease for r in attempts] == [first, kv.lease]


# Errors after which the outcome is unknown.


@pytest.mark.parametrize(
    "error",
    [
        etcd.refused("mvcc: database space exceeded"),
        etcd.refused("permission denied"),
        etcd.REQUEST_LOST,
    ],
)
def test_an_error_holds_the_batch_until_it_is_over(replica: Replica, error: etcd.Fate) -> None:
    """No status parks, splits or settles: the same transaction is sent until etcd answers."""
    replica.etcd.fate = lambda _: error
    replica.commit(replica.ask("1"), replica.ask("2"))
    replica.loop.advance(600)
    assert replica.answers == []
    assert error.error is not None
    why = f"etcd at localhost:2379: {error.error.details()}"
    assert replica.health.missing == {"etcd": why}
    warnings = [line for line in replica.lines.entries if line["log_level"] == "warning"]
    assert [line["error"] for line in warnings] == [why], "one for all attempts"
    assert 300 < len(replica.etcd.sent("LeaseGrant")) < 1500, "about one a second, with jitter"
    replica.etcd.fate = lambda _: etcd.FINE
    replica.wait()
    assert [answer.landed for answer in replica.answers] == [True, True]
    assert replica.health.missing == {}
    replica.store.wipe()
    replica.loop.advance(GUARD_EVERY_S + 1)
    assert "etcd" in replica.health.missing, "the incarnation is still checked"


# An etcd that is not the one seen before: wiped, or restored from an older state.


def assert_halted(replica: Replica, why: str) -> None:
    """Assert that for an hour nothing is answered or written, and that it says why."""
    answers, sent = len(replica.answers), len(replica.etcd.sent("Txn"))
    assert why in replica.health.missing["etcd"]
    assert replica.has_logged("critical", why)
    replica.commit(replica.ask("new"))
    replica.loop.advance(3600)
    assert len(replica.answers) == answers
    assert len(replica.etcd.sent("Txn")) == sent
    assert why in replica.health.missing["etcd"]
    assert not replica.ledger.is_done(digest_of("1"))


def wipe(replica: Replica) -> None:
    """The revision is higher than before, so only the missing incarnation key tells."""
    replica.store.wipe(100)


def wipe_and_start_another(replica: Replica) -> None:
    """Another replica has written an incarnation key into the new data."""
    wipe(replica)
    Replica(replica, "b" * 32).open()


def restore(replica: Replica) -> None:
    """Only the latest records are missing; the others are still true."""
    older = replica.store.snapshot()
    for number in range(2, 7):
        replica.commit(replica.ask(str(number)))
    replica.store.restore(older)


REVISION = "restored from an older state: revision"
INCARNATION = "wiped: its incarnation key is not the one seen at the start"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda replica: replica.store.wipe(), f"{REVISION} 1, 3 seen before"),
        (wipe, INCARNATION),
        (wipe_and_start_another, INCARNATION),
        (restore, REVISION),
    ],
)
@pytest.mark.parametrize("asked", ["new event", "duplicate", ""])
def test_nothing_is_settled_after_etcd_was_wiped_or_restored(
    replica: Replica, change: Callable[[Replica], None], why: str, asked: str
) -> None:
    """Not even a duplicate whose record is still there: another record may be missing.

    If every delivery is a known duplicate, etcd is not asked; the check of the incarnation notices.
    """
    replica.commit(replica.ask("1"))
    replica.loop.advance(GUARD_EVERY_S)
    assert replica.health.missing == {}
    change(replica)
    answers, puts = len(replica.answers), len(replica.store.puts("/service/"))
    if asked:
        event_id = "1" if asked == "duplicate" else "7"
        replica.commit(replica.ask("2", Kind.LOOK), replica.ask(event_id))
    replica.loop.advance(GUARD_EVERY_S + 0.1)
    assert_halted(replica, why)
    assert len(replica.answers) == answers
    # An older state accepts a new event, but nothing is concluded from it.
    written = change is restore and asked == "new event"
    assert len(replica.store.puts("/service/")) == puts + written


def test_a_record_without_a_lease_does_not_land_in_another_etcd() -> None:
    """With a window, the other etcd refuses it anyway, because it does not know the lease."""
    replica = Replica(settings=Settings(enable_etcd=True, dedup_window_s=0)).open()
    wipe(replica)
    replica.commit(replica.ask("1"))
    assert replica.store.puts("/service/") == []
    assert_halted(replica, INCARNATION)


def test_a_restore_after_the_import_is_noticed(replica: Replica, other: Replica) -> None:
    """A process that has recorded nothing yet has seen etcd's revision only in the import."""
    older = replica.store.snapshot()
    other.commit(other.ask("1"), other.ask("2"))
    other.commit(other.ask("3"))
    replica.loop.advance(1.0)
    replica.store.restore(older)
    replica.commit(replica.ask("4"))
    assert replica.answers == []
    assert_halted(replica, REVISION)


def test_the_log_says_whether_etcd_holds_a_history_whatever_reply_is_lost() -> None:
    """For a service that starts on a wiped etcd, this line is the only sign of it."""
    first = Replica()
    first.etcd.script("Txn", etcd.ANSWER_LOST)
    first.open().wait()
    assert first.has_logged("info", "no history of this service")
    assert not first.has_logged("info", "it holds")
    second = Replica(first, "b" * 32)
    second.etcd.script("Txn", etcd.ANSWER_LOST)
    second.open().wait()
    assert second.has_logged("info", "it holds this service's history")


def test_a_start_that_spans_a_wipe_does_not_bring_the_old_incarnation_back() -> None:
    """Its first attempt, whose reply was lost, has written the incarnation of the old data."""
    starting = Replica()
    starting.etcd.script("Txn", etcd.ANSWER_LOST, *[etcd.REQUEST_LOST] * 3)
    starting.open()
    running = Replica(starting, "b" * 32).open()
    wipe(running)
    starting.wait()
    running.commit(running.ask("1"))
    running.wait()
    assert running.ledger.halted
    assert running.answers == []


def test_a_claim_is_not_taken_for_another_record_at_its_revision(
    replica: Replica, other: Replica
) -> None:
    """A restore goes unnoticed by a replica that is frozen until the revision is higher again."""
    older = other.store.snapshot()
    (claimed,) = replica.commit(replica.ask("1", Kind.CLAIM))
    revision = replica.store.get("/service/order/1").mod_revision
    replica.store.restore(older)
    while replica.store.revision < revision - 1:
        replica.store.put("/elsewhere", b"")
    later = Replica(replica, "c" * 32).open()
    later.commit(later.ask("1", effects=(EFFECT,)))
    assert replica.store.get("/service/order/1").mod_revision == revision
    replica.store.put("/elsewhere", b"")
    (answer,) = replica.commit(replica.ask("1", expect=claimed.ask.value, effects=(EFFECT,)))
    assert answer.found is not None
    assert answer.found.state == DONE
    assert len(replica.store.puts("/orders/")) == 1
