"""The window's lease and the claims' lease."""

from __future__ import annotations

from collections import Counter

import pytest

from fakes.desk import Desk
from idempotent_consumer.ledger.etcd import Failure
from idempotent_consumer.ledger.records import Kind
from idempotent_consumer.settings import Settings
from idempotent_consumer.testing.etcd import REQUEST_LOST, Fate, answered_late, refused
from idempotent_consumer.testing.loop import ManualLoop
from idempotent_consumer.testing.store import Store


@pytest.fixture
def loop() -> ManualLoop:
    return ManualLoop()


@pytest.fixture
def store(loop: ManualLoop) -> Store:
    return Store(loop.now_s, max_txn_ops=5000)


def open_desk(loop: ManualLoop, store: Store, window_s: int = 3600, call_s: float = 5.0) -> Desk:
    settings = Settings(
        enable_etcd=True, dedup_window_s=window_s, batch_size=4096, etcd_max_txn_ops=5000
    )
    desk = Desk(loop, store, settings=settings, longest_call_s=call_s)
    desk.open()
    return desk


def leases_of(store: Store) -> list[int]:
    return [store.get(key).lease for key in store.keys("/service/")]


# The window.


@pytest.mark.parametrize("window_s", [2, 10, 60, 3600, 86400, 30 * 86400])
def test_a_record_is_kept_for_the_window_at_least_and_a_tenth_more_at_most(
    loop: ManualLoop, store: Store, window_s: int
) -> None:
    desk, recorded_s = open_desk(loop, store, window_s), {}
    for number in range(40):
        loop.freeze(window_s / 33)
        desk.submit(desk.ask(f"{number:02}"))
        recorded_s[f"/service/order/{number:02}"] = loop.now_s()
    bucket_s = max(1, min(600, window_s // 10))
    for key, at_s in recorded_s.items():
        kv = store.get(key)
        if kv is None:
            assert loop.now_s() >= at_s + window_s
        else:
            ends_s = store.leases[kv.lease]
            assert at_s + window_s <= ends_s <= at_s + window_s + bucket_s


def test_records_of_one_bucket_share_a_lease(loop: ManualLoop, store: Store) -> None:
    desk = open_desk(loop, store)
    for number in range(10):
        desk.submit(desk.ask(str(number)))
        loop.advance(30)
    assert len(set(leases_of(store))) == 1
    loop.advance(60)
    desk.submit(desk.ask("later"))
    assert len(set(leases_of(store))) == 2


def test_a_lease_is_bounded_in_records(loop: ManualLoop, store: Store) -> None:
    """Its end deletes them in one step, in which etcd does nothing else."""
    desk = open_desk(loop, store)
    for batch in range(13):
        desk.submit(*(desk.ask(f"{batch}-{n}") for n in range(2000)))
    numbers = Counter(leases_of(store)).values()
    assert sum(numbers) == 26_000
    assert max(numbers) <= 10_000


def test_a_window_of_zero_keeps_records_for_good(loop: ManualLoop, store: Store) -> None:
    desk = open_desk(loop, store, window_s=0)
    desk.submit(desk.ask("1"))
    assert desk.etcd.sent("LeaseGrant") == []
    loop.freeze(10 * 365 * 86400)
    assert store.keys("/service/") == ["/service/order/1"]


def test_after_the_window_a_duplicate_is_a_new_event(loop: ManualLoop, store: Store) -> None:
    desk = open_desk(loop, store, window_s=60)
    desk.submit(desk.ask("1"))
    loop.advance(67)
    desk.submit(desk.ask("1"))
    assert [answer.landed for answer in desk.answers] == [True, True]


def test_batches_that_wait_for_a_lease_share_it(loop: ManualLoop, store: Store) -> None:
    desk = open_desk(loop, store)
    desk.etcd.script("LeaseGrant", answered_late(1.0))
    for number in range(4):
        desk.submit(desk.ask(str(number)))
    assert desk.answers == []
    loop.advance(1.0)
    assert len(desk.answers) == 4
    assert len(desk.etcd.sent("LeaseGrant")) == 1


def test_a_lease_whose_grant_was_slow_counts_from_its_sending(
    loop: ManualLoop, store: Store
) -> None:
    """etcd's clock for it started somewhere between; the earlier instant is the safe one."""
    desk = open_desk(loop, store, window_s=10)
    desk.etcd.script("LeaseGrant", answered_late(3.0))
    desk.submit(desk.ask("1"))
    loop.advance(3.0)
    desk.submit(desk.ask("2"))
    assert len(desk.etcd.sent("LeaseGrant")) == 2


# The claims.


def claim(desk: Desk, event_id: str = "1") -> int:
    """Claim, and return the lease of the claim."""
    desk.submit(desk.ask(event_id, Kind.CLAIM))
    answer = desk.answers.pop()
    assert answer.landed
    assert answer.lease == desk.store.get(f"/service/order/{event_id}").lease
    return answer.lease


@pytest.mark.parametrize(("call_s", "ttl_s"), [(0.5, 15), (5, 15), (6, 18), (60, 180)])
def test_the_lease_lasts_three_calls_and_fifteen_seconds_at_least(
    loop: ManualLoop, store: Store, call_s: float, ttl_s: int
) -> None:
    desk = open_desk(loop, store, call_s=call_s)
    lease = claim(desk)
    assert desk.ledger.claim_remaining_s(lease) == ttl_s
    loop.advance(ttl_s / 3 - 0.1)
    assert desk.ledger.claim_remaining_s(lease) > 2 * call_s


def test_a_claim_is_kept_alive_for_as_long_as_the_process_runs(
    loop: ManualLoop, store: Store
) -> None:
    desk = open_desk(loop, store)
    lease = claim(desk)
    for _ in range(100):
        loop.advance(7.0)
        assert desk.ledger.claim_remaining_s(lease) >= 9.9
    assert store.get("/service/order/1").lease == lease
    assert [grant.TTL for grant in desk.etcd.sent("LeaseGrant")].count(15) == 1


def test_what_remains_is_never_more_than_etcd_grants(loop: ManualLoop, store: Store) -> None:
    """Counted from the sending, under replies that are late, lost and refused."""
    desk = open_desk(loop, store)
    lease = claim(desk)
    desk.etcd.script(
        "LeaseKeepAlive",
        answered_late(3.0),
        REQUEST_LOST,
        Fate(2.0, 4.0),
        refused("leader changed"),
        answered_late(1.0),
    )
    for _ in range(400):
        loop.advance(0.1)
        assert desk.ledger.claim_remaining_s(lease) <= store.leases[lease] - loop.now_s() + 1e-6


def test_a_lease_that_ended_at_etcd_is_given_up_and_a_new_one_granted(
    loop: ManualLoop, store: Store
) -> None:
    desk = open_desk(loop, store)
    first = claim(desk)
    store.revoke(first)
    loop.advance(5.1)
    assert desk.ledger.claim_remaining_s(first) <= 0
    second = claim(desk)
    assert second != first
    assert desk.ledger.claim_remaining_s(second) == 15
    assert desk.ledger.claim_remaining_s(first) <= 0, "the claims under it are nobody's"


def test_a_claim_under_a_lease_that_etcd_does_not_know_gets_a_new_one(
    loop: ManualLoop, store: Store
) -> None:
    desk = open_desk(loop, store)
    first = claim(desk)
    store.revoke(first)
    desk.submit(desk.ask("2", Kind.CLAIM))
    desk.wait()
    assert desk.answers.pop().landed
    assert store.get("/service/order/2").lease != first


def test_an_outage_longer_than_the_lease_leaves_no_time_for_a_call(
    loop: ManualLoop, store: Store
) -> None:
    desk = open_desk(loop, store)
    lease = claim(desk)
    desk.etcd.fate = lambda _method, _request: REQUEST_LOST
    loop.advance(15.1)
    assert desk.ledger.claim_remaining_s(lease) <= 0


def test_the_end_of_the_windows_lease_does_not_end_the_claims(
    loop: ManualLoop, store: Store
) -> None:
    """Which lease etcd did not know, its error does not say; the claim is still there."""
    desk = open_desk(loop, store)
    lease = claim(desk)
    desk.submit(desk.ask("0"))
    store.revoke(store.get("/service/order/0").lease)
    desk.submit(desk.ask("2"))
    loop.advance(14)
    assert store.get("/service/order/1").lease == lease
    assert desk.answers[-1].landed


def test_without_claims_there_is_no_claim_lease(loop: ManualLoop, store: Store) -> None:
    desk = open_desk(loop, store)
    desk.submit(desk.ask("1"))
    loop.advance(100)
    assert desk.etcd.sent("LeaseKeepAlive") == []


def test_a_refused_login_holds_the_claim_too(loop: ManualLoop, store: Store) -> None:
    desk = open_desk(loop, store)
    wrong = refused("authentication failed, invalid user ID or password", Failure.AUTHENTICATION)
    desk.etcd.fate = lambda _method, _request: wrong
    desk.submit(desk.ask("1", Kind.CLAIM))
    loop.advance(60)
    assert desk.answers == []
    assert "authentication failed" in desk.health.missing["etcd"]
