"""The lease of the window and the lease of claims."""

from __future__ import annotations

from collections import Counter

import pytest

from fakes.events import Claimed, body
from fakes.ledger import Replica
from fakes.world import World
from idempotent_consumer.etcd import CALL_TIMEOUT_S
from idempotent_consumer.records import Kind
from idempotent_consumer.settings import Settings
from idempotent_consumer.testing import etcd


def replica_with(window_s: int = 3600, call_s: float = 5.0) -> Replica:
    settings = Settings(
        enable_etcd=True, dedup_window_s=window_s, batch_size=4096, etcd_max_txn_ops=5000
    )
    return Replica(settings=settings, longest_call_s=call_s).open()


@pytest.fixture
def replica() -> Replica:
    return replica_with()


def lease_of(replica: Replica, event_id: str) -> int:
    lease: int = replica.store.get(f"/service/order/{event_id}").lease
    return lease


def leases_of(replica: Replica) -> list[int]:
    return [replica.store.get(key).lease for key in replica.store.keys("/service/")]


# The window.


@pytest.mark.parametrize("window_s", [2, 10, 60, 3600, 86400, 30 * 86400])
def test_a_record_is_kept_for_the_window_at_least_and_a_tenth_more_at_most(window_s: int) -> None:
    replica, recorded_s = replica_with(window_s), {}
    loop, store = replica.loop, replica.store
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


def test_records_share_a_lease_that_is_bounded_in_time_and_in_records(replica: Replica) -> None:
    """When it ends, etcd deletes them in one step and does nothing else meanwhile."""
    for number in range(10):
        replica.commit(replica.ask(str(number)))
        replica.loop.advance(30)
    assert len(set(leases_of(replica))) == 1
    replica.loop.advance(60)
    for batch in range(13):
        replica.commit(*(replica.ask(f"{batch}-{n}") for n in range(2000)))
    numbers = Counter(leases_of(replica)).values()
    assert (len(numbers), sum(numbers), max(numbers)) == (4, 26_010, 10_000)


def test_a_window_of_zero_keeps_records_for_ever() -> None:
    replica = replica_with(window_s=0)
    replica.commit(replica.ask("1"))
    assert replica.etcd.sent("LeaseGrant") == []
    replica.loop.freeze(10 * 365 * 86400)
    replica.loop.advance(10 * 365 * 86400)
    assert replica.store.keys("/service/") == ["/service/order/1"]


@pytest.mark.parametrize("others", [[], [Kind.CLAIM]])
def test_a_lease_that_was_granted_late_is_not_used(others: list[Kind]) -> None:
    """It has less than the window left, because etcd counts from the request.

    The same is true if the lease of other asks in the batch was granted late.
    """
    replica = replica_with(window_s=10)
    late_ttls_s = {15 if others else 11}

    def fate(call: etcd.Call) -> etcd.Fate:
        if call.method == "LeaseGrant" and call.request.TTL in late_ttls_s:
            late_ttls_s.clear()
            return etcd.Fate(answers_s=3.0)
        return etcd.FINE

    replica.etcd.fate = fate
    replica.commit(replica.ask("1"), *(replica.ask("2", kind) for kind in others))
    replica.loop.advance(3.0)
    assert replica.store.leases[lease_of(replica, "1")] >= replica.loop.time() + 10


@pytest.mark.parametrize("window_s", [1, 10, 45])
def test_a_short_window_works_with_a_slow_etcd(window_s: int) -> None:
    """Otherwise each lease would be granted too late to be used, and nothing recorded."""
    replica = replica_with(window_s)
    replica.etcd.fate = lambda _: etcd.Fate(answers_s=CALL_TIMEOUT_S - 0.1)
    replica.commit(replica.ask("1"))
    replica.wait()
    assert [answer.landed for answer in replica.answers] == [True]
    assert len(replica.etcd.sent("LeaseGrant")) <= 2


def test_a_lease_from_before_the_machine_was_suspended_is_not_used() -> None:
    with World() as world:
        order = world.start()
        order.deliver(body("1"))
        world.suspend(3600)
        order.deliver(body("2"))
        ends_s = world.store.leases[world.store.get("/service/order/2").lease]
        assert ends_s >= world.elapsed_s() + Settings().dedup_window_s


def test_a_claims_lease_does_not_grow_by_the_time_that_the_machine_was_suspended() -> None:
    """Otherwise the claims of a process that dies would hold their events for hours."""
    with World() as world:
        order = world.start(Claimed(waits=True))
        order.etcd.script("LeaseGrant", etcd.Fate(answers_s=1.0))
        order.deliver(body("1"))
        world.suspend(8 * 3600)
        order.advance(3)
        assert order.claimed.calls == ["1"]
        first, *others = [request.TTL for request in order.etcd.sent("LeaseGrant")]
        assert all(first < ttl_s <= first + CALL_TIMEOUT_S + 1 for ttl_s in others)
        assert others


# The claims.


def claim(replica: Replica, event_id: str = "1") -> int:
    """Claim an event, and return the claim's lease."""
    (answer,) = replica.commit(replica.ask(event_id, Kind.CLAIM))
    assert answer.landed
    assert answer.lease == lease_of(replica, event_id)
    return answer.lease


def left_s(replica: Replica, lease: int) -> float:
    """Return for how long, at least, a lease keeps its claims."""
    return replica.ledger.claim_remaining_s(lease)


@pytest.mark.parametrize(("call_s", "ttl_s"), [(0.5, 15), (5, 15), (6, 18), (60, 180)])
def test_the_lease_lasts_three_calls_or_fifteen_seconds(call_s: float, ttl_s: int) -> None:
    replica = replica_with(call_s=call_s)
    lease = claim(replica)
    assert left_s(replica, lease) == ttl_s
    replica.loop.advance(ttl_s / 3 - 0.1)
    assert left_s(replica, lease) > 2 * call_s


def test_a_claim_is_kept_alive_for_as_long_as_the_process_runs(replica: Replica) -> None:
    """The lease is granted for the first claim."""
    replica.commit(replica.ask("0"))
    replica.loop.advance(100)
    assert replica.etcd.sent("LeaseKeepAlive") == []
    lease = claim(replica)
    for _ in range(100):
        replica.loop.advance(7.0)
        assert left_s(replica, lease) >= 9.9
    assert lease_of(replica, "1") == lease
    assert [grant.TTL for grant in replica.etcd.sent("LeaseGrant")].count(15) == 1


def test_what_remains_is_never_more_than_etcd_grants(replica: Replica) -> None:
    """It is counted from the sending, even if replies are late, lost or errors."""
    lease = claim(replica)
    replica.etcd.script(
        "LeaseKeepAlive",
        etcd.Fate(answers_s=3.0),
        etcd.REQUEST_LOST,
        etcd.Fate(2.0, 4.0),
        etcd.refused("leader changed"),
        etcd.Fate(answers_s=1.0),
    )
    for _ in range(400):
        replica.loop.advance(0.1)
        ends_s = replica.store.leases[lease]
        assert left_s(replica, lease) <= ends_s - replica.loop.time() + 1e-6


@pytest.mark.parametrize("noticed", [True, False])
def test_a_lease_that_ended_at_etcd_is_replaced(replica: Replica, noticed: bool) -> None:
    """Either the keep-alive notices that, or the next claim."""
    first = claim(replica)
    replica.store.revoke(first)
    if noticed:
        replica.loop.advance(5.1)
        assert left_s(replica, first) <= 0
    replica.commit(replica.ask("2", Kind.CLAIM))
    replica.wait()
    assert replica.answers[-1].landed
    second = lease_of(replica, "2")
    assert second != first
    assert left_s(replica, second) > 0
    assert left_s(replica, first) <= 0, "nobody works on the claims under it"


def test_a_late_keep_alive_does_not_bring_back_a_lease_given_up(replica: Replica) -> None:
    lease = claim(replica)
    replica.etcd.script("LeaseKeepAlive", etcd.Fate(answers_s=3.0))
    replica.loop.advance(5.5)
    replica.etcd.script("Txn", etcd.REQUEST_LOST)
    replica.commit(replica.ask("2", Kind.CLAIM))
    replica.wait()
    assert left_s(replica, lease) <= 0
    assert left_s(replica, lease_of(replica, "2")) > 0


def test_the_end_of_the_windows_lease_does_not_end_the_claims(replica: Replica) -> None:
    """etcd's error does not say which of the leases it does not know."""
    lease = claim(replica)
    replica.commit(replica.ask("0"))
    replica.store.revoke(lease_of(replica, "0"))
    replica.commit(replica.ask("2"))
    replica.loop.advance(14)
    assert lease_of(replica, "1") == lease
    assert replica.answers[-1].landed
