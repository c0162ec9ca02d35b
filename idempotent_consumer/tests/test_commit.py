"""The commit protocol: what is concluded from each thing that etcd can answer, or not answer."""

from __future__ import annotations

import pytest

from fakes.desk import OTHER_DIGEST, Desk, digest_of
from idempotent_consumer.effects import Put
from idempotent_consumer.ledger.commit import Batch
from idempotent_consumer.ledger.etcd import Failure
from idempotent_consumer.ledger.records import CLAIMED, DONE, RELEASED, Ask, Kind, decode
from idempotent_consumer.settings import Settings
from idempotent_consumer.testing.etcd import (
    ANSWER_LOST,
    FINE,
    REQUEST_LOST,
    Fate,
    answered_late,
    applied_late,
    refused,
)
from idempotent_consumer.testing.loop import ManualLoop
from idempotent_consumer.testing.store import Store

OTHER_PROCESS = "b" * 32
EFFECT = Put("/orders/1", b"placed")


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


@pytest.fixture
def other(loop: ManualLoop, store: Store) -> Desk:
    """Give another replica on the same etcd."""
    other = Desk(loop, store, OTHER_PROCESS)
    other.open()
    return other


def record_of(store: Store, event_id: str) -> tuple[str, str, str]:
    kv = store.get(f"/service/order/{event_id}")
    record = decode(kv.value, kv.mod_revision)
    return record.state, record.digest, record.token


# Landing.


def test_a_new_event_and_its_effects_are_recorded_in_one_transaction(
    desk: Desk, store: Store
) -> None:
    ask = desk.ask("1", effects=(EFFECT, Put("/stock/7", b"-1")))
    desk.submit(ask)
    assert desk.answer.landed
    assert record_of(store, "1") == (DONE, digest_of("1"), ask.token)
    revisions = {
        store.get(key).mod_revision for key in ("/service/order/1", "/orders/1", "/stock/7")
    }
    assert revisions == {desk.answer.revision}


def test_effects_outlive_the_window_and_the_record_does_not(desk: Desk, store: Store) -> None:
    """A record stands under a lease, an order does not."""
    desk.submit(desk.ask("1", effects=(EFFECT,)))
    desk.loop.freeze(24 * 3600 + 601)
    assert store.get("/service/order/1") is None
    assert store.get("/orders/1").value == b"placed"


def test_a_lost_answer_then_the_own_token_found_is_landed(desk: Desk, store: Store) -> None:
    desk.etcd.script("Txn", ANSWER_LOST)
    desk.submit(desk.ask("1", effects=(EFFECT,)))
    assert desk.answers == []
    desk.wait()
    assert desk.answer.landed
    assert desk.answer.revision == store.get("/service/order/1").mod_revision
    assert len(store.puts("/orders/")) == 1


def test_a_lost_request_is_sent_again(desk: Desk, store: Store) -> None:
    desk.etcd.script("Txn", REQUEST_LOST, REQUEST_LOST)
    desk.submit(desk.ask("1"))
    desk.wait()
    assert desk.answer.landed
    assert len(store.puts("/service/order/")) == 1


def test_every_sending_of_an_ask_has_the_same_bytes(desk: Desk) -> None:
    """Time and token are written once: only so does an ask know its own write again."""
    desk.etcd.script("Txn", REQUEST_LOST, Fate(None, 3.0, refused("x").error), ANSWER_LOST)
    desk.submit(desk.ask("1"), desk.ask("2", effects=(EFFECT,)))
    desk.wait()
    sent = [
        [op.request_put.SerializeToString() for op in request.success]
        for request in desk.etcd.sent("Txn")[1:]
        if request.compare
    ]
    assert len(sent) == 4
    assert all(puts == sent[0] for puts in sent)


@pytest.mark.parametrize("delay_s", [0.001, 0.5, 3, 29])
def test_a_transaction_that_applies_after_its_error_never_puts_twice(
    desk: Desk, store: Store, delay_s: float
) -> None:
    """Whichever attempt comes first, the others find it there."""
    desk.etcd.script("Txn", applied_late(delay_s), applied_late(delay_s / 2), FINE)
    desk.submit(desk.ask("1", effects=(EFFECT,)), desk.ask("2"))
    desk.wait()
    assert [answer.landed for answer in desk.answers] == [True, True]
    assert [change.key for change in store.puts("")[1:]] == [
        b"/service/order/1",
        b"/orders/1",
        b"/service/order/2",
    ]


def test_a_late_answer_is_waited_for_and_not_asked_twice(desk: Desk) -> None:
    desk.etcd.script("Txn", answered_late(4.0))
    desk.submit(desk.ask("1"))
    desk.loop.advance(3.9)
    assert desk.answers == []
    desk.loop.advance(0.2)
    assert desk.answer.landed
    assert len(desk.etcd.sent("Txn")) == 2


# What stands in the way.


def test_a_record_with_the_same_digest_is_a_duplicate(desk: Desk, other: Desk) -> None:
    other.submit(other.ask("1"))
    desk.submit(desk.ask("1", effects=(EFFECT,)))
    assert not desk.answer.landed
    assert desk.answer.found is not None
    assert (desk.answer.found.state, desk.answer.found.digest) == (DONE, digest_of("1"))
    assert desk.store.get("/orders/1") is None


def test_a_record_with_another_digest_is_a_conflict(desk: Desk, other: Desk) -> None:
    other.submit(other.ask("1"))
    before = desk.store.get("/service/order/1")
    desk.submit(desk.ask("1", digest=OTHER_DIGEST))
    assert desk.answer.found is not None
    assert desk.answer.found.digest == digest_of("1")
    assert desk.store.get("/service/order/1") == before


def test_a_record_claimed_by_another_is_shown_with_its_owner(desk: Desk, other: Desk) -> None:
    other.submit(other.ask("1", Kind.CLAIM))
    desk.submit(desk.ask("1", Kind.CLAIM))
    found = desk.answer.found
    assert found is not None
    assert found.state == CLAIMED
    assert found.token.startswith(other.name)


def test_a_record_that_nobody_here_wrote_is_nobodys_duplicate(desk: Desk, store: Store) -> None:
    """An operator's own text under the prefix: what arrives with that id is parked, not acked."""
    for event_id, value in (("1", b"x"), ("2", b"[]"), ("3", b'{"state":"done"}'), ("4", b"")):
        store.put(f"/service/order/{event_id}", value)
        desk.answers.clear()
        desk.submit(desk.ask(event_id))
        found = desk.answer.found
        assert found is not None
        assert (found.state, found.digest == digest_of("1")) == (DONE, False)


def test_what_stands_in_nobodys_way_is_committed_again(
    desk: Desk, other: Desk, store: Store
) -> None:
    """One duplicate in a batch costs the others a second transaction, and nothing else."""
    other.submit(other.ask("2"))
    desk.submit(*(desk.ask(str(n), effects=(Put(f"/orders/{n}", b"x"),)) for n in range(5)))
    landed = {answer.ask.key[-1:]: answer.landed for answer in desk.answers}
    assert landed == {b"0": True, b"1": True, b"2": False, b"3": True, b"4": True}
    assert desk.answers[0].ask.key[-1:] == b"2", "it is answered first"
    assert store.keys("/orders/") == ["/orders/0", "/orders/1", "/orders/3", "/orders/4"]
    assert all(store.get(key).version == 1 for key in store.keys("/orders/"))


def test_a_remaining_batch_whose_answer_is_lost_is_not_recorded_twice(
    desk: Desk, other: Desk, store: Store
) -> None:
    other.submit(other.ask("2"))
    desk.etcd.script("Txn", FINE, ANSWER_LOST, FINE)
    desk.submit(*(desk.ask(str(n)) for n in range(4)))
    desk.wait()
    assert sorted(a.ask.key[-1:] for a in desk.answers if a.landed) == [b"0", b"1", b"3"]
    assert len(store.puts("/service/order/")) == 4


def test_two_replicas_at_the_same_instant_one_wins(desk: Desk, other: Desk, store: Store) -> None:
    """Both transactions are on their way; only the first can land."""
    mine, theirs = desk.ask("1", effects=(EFFECT,)), other.ask("1", effects=(EFFECT,))
    for each, ask in ((desk, mine), (other, theirs)):
        each.etcd.script("Txn", Fate(applies_s=1.0))
        each.submit(ask)
    desk.loop.advance(1.0)
    assert [desk.answer.landed, other.answer.landed] == [True, False]
    assert store.get("/orders/1").version == 1


def test_a_look_reads_and_changes_nothing(desk: Desk, other: Desk, store: Store) -> None:
    other.submit(other.ask("1"))
    before = store.revision
    desk.submit(desk.ask("1", Kind.LOOK), desk.ask("2", Kind.LOOK))
    found, absent = desk.answers
    assert found.found is not None
    assert found.found.state == DONE
    assert (absent.landed, absent.found) == (False, None)
    assert store.revision == before


def test_a_look_beside_a_failing_transaction_is_answered_too(desk: Desk, other: Desk) -> None:
    other.submit(other.ask("1"))
    desk.submit(desk.ask("1"), desk.ask("1x", Kind.LOOK), desk.ask("2"))
    assert {(a.ask.key[15:], a.landed) for a in desk.answers} == {
        (b"1", False),
        (b"1x", False),
        (b"2", True),
    }


# Claims.


def test_a_claim_becomes_done_only_at_its_own_revision(desk: Desk, store: Store) -> None:
    desk.submit(desk.ask("1", Kind.CLAIM))
    assert record_of(store, "1")[0] == CLAIMED
    revision = desk.answer.revision
    desk.answers.clear()
    desk.submit(desk.ask("1", expect=revision + 7))
    assert not desk.answer.landed
    desk.answers.clear()
    desk.submit(desk.ask("1", expect=revision, effects=(EFFECT,)))
    assert desk.answer.landed
    assert record_of(store, "1")[0] == DONE


def test_a_done_record_outlives_the_claims_lease(desk: Desk, store: Store) -> None:
    """It is put under the window's lease, so the end of the process does not take it along."""
    desk.submit(desk.ask("1", Kind.CLAIM))
    desk.submit(desk.ask("1", expect=desk.answer.revision))
    desk.ledger.close()
    desk.loop.advance(3600)
    assert record_of(store, "1")[0] == DONE


def test_a_claim_goes_with_a_process_that_ends(desk: Desk, store: Store) -> None:
    desk.submit(desk.ask("1", Kind.CLAIM))
    desk.ledger.close()
    desk.loop.advance(14.9)
    assert record_of(store, "1")[0] == CLAIMED
    desk.loop.advance(0.2)
    assert store.get("/service/order/1") is None


def test_a_released_claim_is_put_as_released_and_can_be_claimed(
    desk: Desk, other: Desk, store: Store
) -> None:
    desk.submit(desk.ask("1", Kind.CLAIM))
    desk.submit(desk.ask("1", Kind.RELEASE, expect=desk.answers[0].revision))
    assert desk.answers[1].landed
    assert record_of(store, "1")[0] == RELEASED
    other.submit(other.ask("1", Kind.CLAIM))
    found = other.answer.found
    assert found is not None
    assert found.state == RELEASED
    other.submit(other.ask("1", Kind.CLAIM, expect=found.mod_revision))
    assert other.answers[1].landed


def test_a_claim_that_applies_late_does_not_come_back_after_its_release(
    desk: Desk, store: Store
) -> None:
    """Had the release deleted the record, the late attempt would find it absent and land."""
    desk.etcd.script("Txn", applied_late(10.0), FINE)
    desk.submit(desk.ask("1", Kind.CLAIM))
    desk.loop.advance(5.0)
    desk.submit(desk.ask("1", Kind.RELEASE, expect=desk.answer.revision))
    desk.loop.advance(5.1)
    assert record_of(store, "1")[0] == RELEASED


# Leases that etcd does not know.


def test_a_lost_window_lease_is_replaced_and_the_same_values_are_put(
    desk: Desk, store: Store
) -> None:
    desk.submit(desk.ask("0"))
    first = store.get("/service/order/0").lease
    store.revoke(first)
    ask = desk.ask("1", effects=(EFFECT,))
    desk.submit(ask)
    desk.wait()
    assert desk.answers[-1].landed
    kv = store.get("/service/order/1")
    assert kv.lease not in (0, first)
    assert kv.value == ask.value
    attempts = [r for r in desk.etcd.sent("Txn") if r.success[0].request_put.key == ask.key]
    assert len({r.success[0].request_put.value for r in attempts}) == 1
    assert [r.success[0].request_put.lease for r in attempts] == [first, kv.lease]


def test_a_lost_lease_does_not_make_the_service_unready(desk: Desk, store: Store) -> None:
    desk.submit(desk.ask("0"))
    store.revoke(store.get("/service/order/0").lease)
    desk.submit(desk.ask("1"))
    assert desk.health.missing == {}


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
        refused("user name is empty", Failure.AUTHENTICATION),
        refused("invalid auth token", Failure.AUTHENTICATION),
        refused("permission denied", Failure.AUTHENTICATION),
        REQUEST_LOST,
    ],
)
def test_an_error_holds_the_batch_and_makes_the_service_unready_until_it_is_over(
    desk: Desk, error: Fate
) -> None:
    """No status parks, splits or settles: the same transaction is sent until it is answered."""
    desk.etcd.fate = lambda _method, _request: error
    desk.submit(desk.ask("1"), desk.ask("2"))
    desk.loop.advance(600)
    assert desk.answers == []
    assert error.error is not None
    assert desk.health.missing == {"etcd": str(error.error)}
    assert desk.has_said("warning", str(error.error))
    desk.etcd.fate = lambda _method, _request: FINE
    desk.wait()
    assert [answer.landed for answer in desk.answers] == [True, True]
    assert desk.health.missing == {}


def test_a_long_outage_is_one_warning_and_a_bounded_number_of_attempts(desk: Desk) -> None:
    desk.submit(desk.ask("0"))
    before = len(desk.etcd.sent("Txn"))
    desk.etcd.fate = lambda _method, _request: REQUEST_LOST
    desk.submit(desk.ask("1"))
    desk.loop.advance(600)
    warnings = [line for line in desk.lines.entries if line["log_level"] == "warning"]
    assert len(warnings) == 1
    attempts = len(desk.etcd.sent("Txn")) - before
    assert 300 < attempts < 1500, "about one a second, with jitter"


def test_a_full_etcd_keeps_nothing_and_loses_nothing(desk: Desk, store: Store) -> None:
    """NOSPACE as etcd itself has it, on the lease as on the transaction."""
    store.out_of_space = True
    desk.submit(desk.ask("1"))
    desk.loop.advance(60)
    assert desk.answers == []
    store.out_of_space = False
    desk.wait()
    assert desk.answer.landed


def test_a_full_etcd_is_not_back_because_it_answers_a_look(desk: Desk, store: Store) -> None:
    desk.submit(desk.ask("0"))
    store.out_of_space = True
    desk.submit(desk.ask("1"))
    desk.submit(desk.ask("2", Kind.LOOK))
    assert list(desk.health.missing) == ["etcd"]
    assert not desk.has_said("info", "answers again")
    store.out_of_space = False
    desk.wait()
    assert desk.health.missing == {}


def test_an_outage_at_the_start_is_waited_out(loop: ManualLoop, store: Store) -> None:
    desk = Desk(loop, store)
    desk.etcd.fate = lambda _method, _request: REQUEST_LOST
    desk.open()
    loop.advance(300)
    assert (desk.opened, list(desk.health.missing)) == (0, ["etcd"])
    desk.etcd.fate = lambda _method, _request: FINE
    desk.wait()
    assert (desk.opened, desk.health.missing) == (1, {})


# Limits of a batch.


def taken(batch_size: int, max_operations: int, asks: list[Ask]) -> int:
    batch = Batch(batch_size, max_operations)
    return next((n for n, ask in enumerate(asks) if not batch.take(ask)), len(asks))


def asks_with(desk: Desk, number: int, effects: int, bytes_each: int = 1) -> list[Ask]:
    return [
        desk.ask(
            f"{n}",
            effects=tuple(Put(f"/orders/{n}/{e}", b"x" * bytes_each) for e in range(effects)),
        )
        for n in range(number)
    ]


@pytest.mark.parametrize(
    ("batch_size", "max_operations", "effects", "expected"),
    [
        (128, 128, 0, 127),  # One comparison is the incarnation's.
        (128, 1024, 0, 128),
        (16, 128, 0, 16),
        (128, 128, 1, 64),
        (128, 129, 1, 64),
        (128, 128, 3, 32),
        (128, 1024, 7, 128),
        (1, 4, 0, 1),
        (128, 4, 0, 3),
    ],
)
def test_a_batch_keeps_to_etcds_operations(
    desk: Desk, batch_size: int, max_operations: int, effects: int, expected: int
) -> None:
    """Comparisons, THEN and ELSE are counted separately, as etcd counts them."""
    assert taken(batch_size, max_operations, asks_with(desk, 200, effects)) == expected


@pytest.mark.parametrize("kind", [Kind.RECORD, Kind.CLAIM, Kind.LOOK, Kind.RELEASE])
@pytest.mark.parametrize(("operations", "effects"), [(4, 0), (16, 0), (16, 1), (16, 14), (17, 2)])
def test_etcd_takes_the_fullest_batch(
    loop: ManualLoop, kind: Kind, operations: int, effects: int
) -> None:
    desk = Desk(
        loop,
        Store(loop.now_s, max_txn_ops=operations),
        settings=Settings(enable_etcd=True, etcd_max_txn_ops=operations),
    )
    desk.open()
    effects = effects if kind is Kind.RECORD else 0
    asks = [
        desk.ask(ask.key.decode(), kind, effects=ask.effects.puts)
        for ask in asks_with(desk, 20, effects)
    ]
    batch = desk.ledger.batch()
    for ask in asks:
        if not batch.take(ask):
            break
    desk.ledger.submit(batch, desk.answers.extend)
    loop.run_until_idle()
    assert len(desk.answers) == len(batch.asks) >= 1


def test_a_batch_keeps_to_a_mebibyte(desk: Desk) -> None:
    asks = asks_with(desk, 20, 1, bytes_each=100_000)
    number = taken(128, 1024, asks)
    assert number == 10
    batch = desk.ledger.batch()
    assert all(batch.take(ask) for ask in asks[:number])
    desk.ledger.submit(batch, desk.answers.extend)
    desk.loop.run_until_idle()
    assert desk.etcd.sent("Txn")[-1].ByteSize() <= 1024 * 1024


def test_an_effect_key_twice_goes_into_the_next_batch(desk: Desk) -> None:
    """etcd refuses a transaction that writes one key twice."""
    asks = [desk.ask(str(n), effects=(Put("/stock/7", b"%d" % n),)) for n in range(3)]
    assert taken(128, 128, asks) == 1
    for ask in asks:
        desk.submit(ask)
    assert all(answer.landed for answer in desk.answers)
    assert desk.store.get("/stock/7").version == 3


@pytest.mark.parametrize(("effects", "bytes_each"), [(126, 10), (1, 1_400_000)])
def test_an_event_alone_is_always_taken(desk: Desk, effects: int, bytes_each: int) -> None:
    """What fits into no batch with others goes alone; what never fits is refused before."""
    (ask,) = asks_with(desk, 1, effects, bytes_each)
    assert desk.ledger.why_never(ask.effects) is None
    desk.submit(ask)
    assert desk.answer.landed
    assert desk.etcd.sent("Txn")[-1].ByteSize() < 1536 * 1024


@pytest.mark.parametrize(
    ("effects", "bytes_each", "part"),
    [
        (128, 1, "ETCD_MAX_TXN_OPS is 128"),
        (1, 1_600_000, "1536"),
        (2, 800_000, "bytes"),
    ],
)
def test_effects_that_fit_into_no_transaction_are_refused_with_the_reason(
    desk: Desk, effects: int, bytes_each: int, part: str
) -> None:
    (ask,) = asks_with(desk, 1, effects, bytes_each)
    why = desk.ledger.why_never(ask.effects)
    assert why is not None
    assert part in why.replace("1572864", "1536")


@pytest.mark.parametrize("effects", [0, 1, 5, 126])
@pytest.mark.parametrize("id_bytes", [1, 128])
def test_the_size_of_an_ask_is_never_underestimated(
    desk: Desk, effects: int, id_bytes: int
) -> None:
    ask = desk.ask(
        "i" * id_bytes, effects=tuple(Put(f"/ä€/{n}", b"x" * 1000) for n in range(effects))
    )
    desk.submit()
    empty = desk.etcd.sent("Txn")[-1].ByteSize()
    desk.submit(ask)
    assert desk.etcd.sent("Txn")[-1].ByteSize() - empty <= ask.size_bytes
