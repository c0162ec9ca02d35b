"""The window's lease and the claims' lease."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from etcd3.etcdrpc import LeaseGrantResponse

from fakes.events import Pure, body
from fakes.ledger import Replica
from fakes.world import World
from idempotent_consumer.calls import Handler
from idempotent_consumer.leases import ClaimLease
from idempotent_consumer.records import Kind
from idempotent_consumer.settings import Settings
from idempotent_consumer.testing.etcd import (
    FINE,
    REQUEST_LOST,
    Call,
    Fate,
    Store,
    answered_late,
    refused,
)
from idempotent_consumer.testing.loop import Loop, complete


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def store(loop: Loop) -> Store:
    return Store(loop.time, max_txn_ops=5000)


def open_replica(loop: Loop, store: Store, window_s: int = 3600, call_s: float = 5.0) -> Replica:
    settings = Settings(
        enable_etcd=True, dedup_window_s=window_s, batch_size=4096, etcd_max_txn_ops=5000
    )
    replica = Replica(loop, store, settings=settings, longest_call_s=call_s)
    replica.open()
    return replica


def leases_of(store: Store) -> list[int]:
    return [store.get(key).lease for key in store.keys("/service/")]


# The window.


@pytest.mark.parametrize("window_s", [2, 10, 60, 3600, 86400, 30 * 86400])
def test_a_record_is_kept_for_the_window_at_least_and_a_tenth_more_at_most(
    loop: Loop, store: Store, window_s: int
) -> None:
    replica, recorded_s = open_replica(loop, store, window_s), {}
    for number in range(40):
        loop.freeze(window_s / 33)
        loop.advance(window_s / 33)
        replica.commit(replica.ask(f"{number:02}"))
        recorded_s[f"/service/order/{number:02}"] = loop.time()
    bucket_s = max(1, min(600, window_s // 10))
    for key, at_s in recorded_s.items():
        kv = store.get(key)
        if kv is None:
            assert loop.time() >= at_s + window_s
        else:
            ends_s = store.leases[kv.lease]
            assert at_s + window_s <= ends_s <= at_s + window_s + bucket_s


def test_records_of_one_bucket_share_a_lease(loop: Loop, store: Store) -> None:
    replica = open_replica(loop, store)
    for number in range(10):
        replica.commit(replica.ask(str(number)))
        loop.advance(30)
    assert len(set(leases_of(store))) == 1
    loop.advance(60)
    replica.commit(replica.ask("later"))
    assert len(set(leases_of(store))) == 2


def test_a_lease_is_bounded_in_records(loop: Loop, store: Store) -> None:
    """Its end deletes them in one step, in which etcd does nothing else."""
    replica = open_replica(loop, store)
    for batch in range(13):
        replica.commit(*(replica.ask(f"{batch}-{n}") for n in range(2000)))
    numbers = Counter(leases_of(store)).values()
    assert sum(numbers) == 26_000
    assert max(numbers) <= 10_000


def test_a_window_of_zero_keeps_records_for_good(loop: Loop, store: Store) -> None:
    replica = open_replica(loop, store, window_s=0)
    replica.commit(replica.ask("1"))
    assert replica.etcd.sent("LeaseGrant") == []
    loop.freeze(10 * 365 * 86400)
    loop.advance(10 * 365 * 86400)
    assert store.keys("/service/") == ["/service/order/1"]


def test_after_the_window_a_duplicate_is_a_new_event(loop: Loop, store: Store) -> None:
    replica = open_replica(loop, store, window_s=60)
    replica.commit(replica.ask("1"))
    loop.advance(67)
    replica.commit(replica.ask("1"))
    assert [answer.landed for answer in replica.answers] == [True, True]


def test_batches_that_wait_for_a_lease_share_it(loop: Loop, store: Store) -> None:
    replica = open_replica(loop, store)
    replica.etcd.script("LeaseGrant", answered_late(1.0))
    for number in range(4):
        replica.commit(replica.ask(str(number)))
    assert replica.answers == []
    loop.advance(1.0)
    assert len(replica.answers) == 4
    assert len(replica.etcd.sent("LeaseGrant")) == 1


def test_a_lease_whose_grant_was_slow_counts_from_its_sending(loop: Loop, store: Store) -> None:
    """etcd's clock for it started somewhere between; the earlier instant is the safe one."""
    replica = open_replica(loop, store, window_s=10)
    replica.etcd.script("LeaseGrant", answered_late(3.0))
    replica.commit(replica.ask("1"))
    loop.advance(3.0)
    replica.commit(replica.ask("2"))
    assert len(replica.etcd.sent("LeaseGrant")) == 2


def test_a_lease_that_was_granted_too_late_is_not_used(loop: Loop, store: Store) -> None:
    """It has less than the window left when it comes."""
    replica = open_replica(loop, store, window_s=10)
    replica.etcd.script("LeaseGrant", answered_late(3.0))
    replica.commit(replica.ask("1"))
    loop.advance(3.0)
    assert store.leases[store.get("/service/order/1").lease] >= loop.time() + 10


def test_a_lease_is_still_good_when_the_others_of_its_batch_are_there(
    loop: Loop, store: Store
) -> None:
    replica = open_replica(loop, store, window_s=10)
    claims_late = answered_late(3.0)
    replica.etcd.fate = lambda call: claims_late if ttl_of(call) == 15 else FINE
    replica.commit(replica.ask("1"), replica.ask("2", Kind.CLAIM))
    loop.advance(3.0)
    assert store.leases[store.get("/service/order/1").lease] >= loop.time() + 10


def ttl_of(call: Call) -> int:
    return call.request.TTL if call.method == "LeaseGrant" else 0


def test_a_lease_from_before_the_machine_was_suspended_is_not_used() -> None:
    world = World()
    process = world.start(Handler(Pure()))
    process.deliver(body("1"))
    world.suspend(3600)
    process.deliver(body("2"))
    ends_s = world.store.leases[world.store.get("/service/order/2").lease]
    assert ends_s >= world.elapsed_s() + Settings().dedup_window_s
    world.close()


# The claims.


def claim(replica: Replica, event_id: str = "1") -> int:
    """Claim, and return the lease of the claim."""
    replica.commit(replica.ask(event_id, Kind.CLAIM))
    answer = replica.answers.pop()
    assert answer.landed
    assert answer.lease == replica.store.get(f"/service/order/{event_id}").lease
    return answer.lease


def left_s(replica: Replica, lease: int) -> float:
    """Return how long claims under a lease last at least."""
    return replica.ledger.claim_remaining_s(lease)


@pytest.mark.parametrize(("call_s", "ttl_s"), [(0.5, 15), (5, 15), (6, 18), (60, 180)])
def test_the_lease_lasts_three_calls_and_fifteen_seconds_at_least(
    loop: Loop, store: Store, call_s: float, ttl_s: int
) -> None:
    replica = open_replica(loop, store, call_s=call_s)
    lease = claim(replica)
    assert left_s(replica, lease) == ttl_s
    loop.advance(ttl_s / 3 - 0.1)
    assert left_s(replica, lease) > 2 * call_s


def test_a_claim_is_kept_alive_for_as_long_as_the_process_runs(loop: Loop, store: Store) -> None:
    replica = open_replica(loop, store)
    lease = claim(replica)
    for _ in range(100):
        loop.advance(7.0)
        assert left_s(replica, lease) >= 9.9
    assert store.get("/service/order/1").lease == lease
    assert [grant.TTL for grant in replica.etcd.sent("LeaseGrant")].count(15) == 1


def test_what_remains_is_never_more_than_etcd_grants(loop: Loop, store: Store) -> None:
    """Counted from the sending, under replies that are late, lost and refused."""
    replica = open_replica(loop, store)
    lease = claim(replica)
    replica.etcd.script(
        "LeaseKeepAlive",
        answered_late(3.0),
        REQUEST_LOST,
        Fate(2.0, 4.0),
        refused("leader changed"),
        answered_late(1.0),
    )
    for _ in range(400):
        loop.advance(0.1)
        assert left_s(replica, lease) <= store.leases[lease] - loop.time() + 1e-6


def test_a_lease_that_ended_at_etcd_is_given_up_and_a_new_one_granted(
    loop: Loop, store: Store
) -> None:
    replica = open_replica(loop, store)
    first = claim(replica)
    store.revoke(first)
    loop.advance(5.1)
    assert left_s(replica, first) <= 0
    second = claim(replica)
    assert second != first
    assert left_s(replica, second) == pytest.approx(15)
    assert left_s(replica, first) <= 0, "the claims under it are nobody's"


def test_a_claim_under_a_lease_that_etcd_does_not_know_gets_a_new_one(
    loop: Loop, store: Store
) -> None:
    replica = open_replica(loop, store)
    first = claim(replica)
    store.revoke(first)
    replica.commit(replica.ask("2", Kind.CLAIM))
    replica.wait()
    assert replica.answers.pop().landed
    assert store.get("/service/order/2").lease != first


def test_a_lease_goes_on_while_the_machine_is_suspended(loop: Loop, store: Store) -> None:
    """The loop's clock stands still meanwhile, and etcd's does not."""
    suspended_s = 0.0
    replica = Replica(loop, store, clock=lambda: loop.time() + suspended_s)
    replica.open()
    lease = claim(replica)
    suspended_s = 14.0
    assert left_s(replica, lease) == 1.0
    suspended_s = 15.0
    assert left_s(replica, lease) == 0.0
    store.revoke(lease)
    assert claim(replica, "2") != lease


def test_an_outage_longer_than_the_lease_leaves_no_time_for_a_call(
    loop: Loop, store: Store
) -> None:
    replica = open_replica(loop, store)
    lease = claim(replica)
    replica.etcd.fate = lambda _: REQUEST_LOST
    loop.advance(15.1)
    assert left_s(replica, lease) <= 0


def test_the_end_of_the_windows_lease_does_not_end_the_claims(loop: Loop, store: Store) -> None:
    """Which lease etcd did not know, its error does not say; the claim is still there."""
    replica = open_replica(loop, store)
    lease = claim(replica)
    replica.commit(replica.ask("0"))
    store.revoke(store.get("/service/order/0").lease)
    replica.commit(replica.ask("2"))
    loop.advance(14)
    assert store.get("/service/order/1").lease == lease
    assert replica.answers[-1].landed


def test_without_claims_there_is_no_claim_lease(loop: Loop, store: Store) -> None:
    replica = open_replica(loop, store)
    replica.commit(replica.ask("1"))
    loop.advance(100)
    assert replica.etcd.sent("LeaseKeepAlive") == []


def test_a_refused_login_holds_the_claim_too(loop: Loop, store: Store) -> None:
    replica = open_replica(loop, store)
    wrong = refused("authentication failed, invalid user ID or password")
    replica.etcd.fate = lambda _: wrong
    replica.commit(replica.ask("1", Kind.CLAIM))
    loop.advance(60)
    assert replica.answers == []
    assert "authentication failed" in replica.health.missing["etcd"]


def test_a_keep_alive_with_a_defect_ends_its_group() -> None:
    async def ask(method: str, make: Callable[[], Any]) -> Any:
        make()
        if method == "LeaseKeepAlive":
            raise RuntimeError("a defect")
        return LeaseGrantResponse(ID=1, TTL=15)

    async def run() -> None:
        async with asyncio.TaskGroup() as tasks:
            await ClaimLease(ask, asyncio.get_running_loop().time, 5.0, tasks).take(1)
            await asyncio.sleep(60)

    with pytest.raises(ExceptionGroup) as raised:
        complete(run())
    assert raised.group_contains(RuntimeError, match="a defect")
