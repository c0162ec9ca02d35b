"""Calls to the outside, under claims: each event gets its call, and each repeat has a cause."""

import time
from functools import partial

import pytest

from chaos.checks import becomes, not_ready, passes, says, throughout, true
from chaos.durations import lasting, often, quick
from chaos.load import ids, orders
from chaos.proxy import Proxy
from chaos.receiver import Call, Receiver, account, ended_claims, lost_claims
from chaos.trial import RECOVERY_TIMEOUT_S, StartTrial, Trial
from idempotent_consumer.calls import LONGEST_PROBE_S
from servers.broker import Event
from servers.services import Service
from servers.wait import eventually, lasts

RATE_PER_S = 100
CALLS_AT_ONCE = 100
LEASE_S = 15
BREAKER_FAILURES = 20
OPEN_BREAKER = "circuit breaker of new_order"
TAKEN_OVER = ["claimed", "gone", "claimed", "done"]


def start(attempt: Trial, receiver: Receiver, name: str, **settings: str) -> Service:
    """Start notify under a name, which its calls and its counters carry."""
    return attempt.start(NOTIFY_URL=receiver.url_for(name), STATSD_PREFIX=name, **settings)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kills", [quick(1), often(12, 30)])
def test_replicas_killed_in_mid_call(trial: StartTrial, receiver: Receiver, kills: int) -> None:
    """Calls for one event never overlap, and one is repeated only if its process was killed."""
    attempt = trial("notify: killed in mid-call", service="notify")
    at_once = 16
    start_named = partial(start, attempt, receiver, CALLS_AT_ONCE=str(at_once))
    killed_s: dict[str, float] = {}
    running = [(name, start_named(name)) for name in ("p0", "p1")]
    with attempt.under_load(RATE_PER_S, drained_within_s=90):
        for number in range(kills):
            name, victim = running.pop(0)
            receiver.hold()
            passes(partial(receiver.number_held, name), 0)
            victim.kill()
            killed_s[name] = time.monotonic()
            receiver.release()
            attempt.fired()
            attempt.recovers()
            running.append((f"p{number + 2}", start_named(f"p{number + 2}")))
            attempt.works()

    def was_killed(before: Call, again: Call) -> bool:
        return killed_s.get(before.caller, again.began_s) < again.began_s

    again = account(receiver.calls, attempt.store.done("notify"), was_killed)
    assert kills <= len(again) <= kills * at_once
    ended = ended_claims(attempt.store)
    for event_id, calls in receiver.per_key().items():
        assert calls <= 1 + ended[event_id], "a call without a claim of its own"


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    ("fault", "seconds"),
    [quick("down", 5), *[("down", s) for s in lasting(30, 600)], quick("slow", 0)],
)
def test_a_receiver_that_is_down(
    trial: StartTrial, receiver: Receiver, fault: str, seconds: float
) -> None:
    """Circuit breakers open: few calls are made, none of the events is parked, all are called for.

    Meanwhile one of two replicas is killed; the one that replaces it opens a breaker of its own. A
    slow receiver answers no call before its time-out.
    """
    attempt = trial(f"notify: receiver {fault}", service="notify")
    replicas = [start(attempt, receiver, name) for name in ("p0", "p1")]
    with attempt.load(RATE_PER_S) as load:
        attempt.works(100)
        if fault == "down":
            receiver.status = 500
        else:
            receiver.hold()
        for replica in replicas:
            eventually(partial(not_ready, replica, OPEN_BREAKER))
        attempt.fired()
        called = len(receiver.calls)
        lasts(seconds / 2)
        replicas.pop().kill()
        replicas.append(start(attempt, receiver, "p2"))
        eventually(partial(not_ready, replicas[-1], OPEN_BREAKER))
        lasts(seconds / 2)
        assert load.running
        waiting, called = ids(load.sent), len(receiver.calls) - called
        # Calls until the new replica's breaker opens, and probes after 1, 2, 4, … 30 s.
        assert called <= CALLS_AT_ONCE + BREAKER_FAILURES + 3 * 5 + 2 * (1 + seconds / 30)
        back_s = time.monotonic()
        receiver.status = 204
        receiver.release()
        # The probe waits behind the events that have gathered in the queue.
        attempt.recovers(LONGEST_PROBE_S + RECOVERY_TIMEOUT_S + seconds)
        eventually(lambda: true(waiting <= receiver.accepted()), 60 + seconds, interval_s=1)
        print(
            f"receiver {fault} for {seconds:g} s: {called} calls meanwhile; all {len(waiting)} "
            f"events called for {time.monotonic() - back_s:.1f} s after it was back"
        )
        for replica in replicas:
            replica.wait_ready()
    assert attempt.judge(at_least=100, drained_within_s=300).held


@pytest.mark.timeout(300)
@pytest.mark.parametrize("finished", [False, True], ids=["in its call", "before its record"])
def test_a_replica_frozen_for_longer_than_its_lease(
    trial: StartTrial, receiver: Receiver, way: Proxy, finished: bool
) -> None:
    """Another replica completes its events. The frozen one does not, although its calls succeed.

    Frozen in its calls, it finds that they took too long. Frozen after them, with their records on
    the way to etcd, it finds that it has lost its claims, counts them and logs them.
    """
    attempt = trial("notify: frozen for longer than its lease", service="notify")
    store, statsd = attempt.store, attempt.statsd
    frozen = start(attempt, receiver, "frozen", ETCD_ENDPOINTS=way.address)
    start(attempt, receiver, "peer")
    with attempt.load(RATE_PER_S) as load:
        attempt.works()
        receiver.hold()
        passes(partial(receiver.number_held, "frozen"), 3)
        in_call = receiver.held("frozen")
        if finished:
            way.hold("up")
            receiver.release()
            eventually(lambda: true(not in_call & receiver.under_way("frozen")))
            eventually(lambda: true(way.up.holds(b'"state":"done"')))
        frozen.pause()
        in_call -= store.done("notify")
        receiver.release()
        becomes(lambda: in_call - store.done("notify"), set(), 90)
        attempt.fired()
        assert load.running
        frozen.resume()
        way.release()
        attempt.recovers()
        frozen.wait_ready()
        eventually(lambda: true(not finished or in_call <= lost_claims(frozen)))
    attempt.judge(at_least=200)
    again = account(receiver.calls, store.done("notify"), lambda *of: of[0].caller == "frozen")
    assert in_call <= again
    of_records = store.steps("notify")
    assert [of_records[each] for each in in_call] == [TAKEN_OVER] * len(in_call)
    becomes(partial(statsd.count, "frozen.notifications_claim_lost"), len(lost_claims(frozen)))
    assert statsd.count("peer.notifications_claim_lost") == 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seconds", lasting(20, 45))
def test_etcd_frozen_for_longer_than_the_claims_leases(
    trial: StartTrial, receiver: Receiver, seconds: float
) -> None:
    """A call is repeated only if its claim was lost or it had failed, and none is left out.

    The calls of the first replica succeed but cannot be recorded. Those of the second get no
    answer, so they time out. No call begins after its claim may have ended.
    """
    attempt = trial("notify: etcd frozen", service="notify")
    etcd, store = attempt.servers.etcd, attempt.store
    services = {name: start(attempt, receiver, name) for name in ("first", "second")}

    def none_ready() -> None:
        for service in services.values():
            not_ready(service, "etcd")

    with attempt.load(RATE_PER_S) as load:
        attempt.works()
        receiver.hold()
        # Enough to occupy all slots of both, with more waiting for a slot.
        attempt.publish(orders(3 * CALLS_AT_ONCE, "burst"))
        becomes(lambda: len(store.in_state("notify", "claimed")), 2 * CALLS_AT_ONCE)
        etcd.pause()
        frozen_s = time.monotonic()
        receiver.let_through("first")
        eventually(none_ready)
        throughout(seconds, none_ready)
        last_s = max(call.began_s for call in receiver.calls)
        receiver.release()
        attempt.fired()
        assert load.running
        etcd.resume()
        attempt.recovers()
        attempt.works(100)
    attempt.judge(at_least=500)
    assert last_s - frozen_s < LEASE_S
    lost = {name: lost_claims(service) for name, service in services.items()}

    def has_cause(before: Call, _again: Call) -> bool:
        return before.key in lost[before.caller] or not before.answered

    again = account(receiver.calls, store.done("notify"), has_cause)
    assert len(again) >= CALLS_AT_ONCE
    for name in services:
        counter = f"{name}.notifications_claim_lost"
        becomes(partial(attempt.statsd.count, counter), len(lost[name]))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("processes", [quick(1), often(6, 10)])
def test_channels_dropped_in_mid_call(
    trial: StartTrial, receiver: Receiver, processes: int
) -> None:
    """The event is redelivered to the process that is calling for it, and joins that call.

    Every second time the call ends before the redelivery, which then finds the event done.
    """
    attempt = trial("notify: channel dropped in mid-call", service="notify")
    store, statsd = attempt.store, attempt.statsd

    def undone(events: list[Event]) -> set[str]:
        return ids(events) - store.done("notify")

    for process in range(processes):
        name = f"p{process}"
        service = start(attempt, receiver, name)
        for drop in range(1, 4):
            events = orders(5, f"{name}-{drop}")
            receiver.hold()
            attempt.publish(events)
            becomes(partial(receiver.under_way, name), ids(events))
            attempt.servers.rabbitmq.ctl("close_all_connections", "closed by the test")
            eventually(partial(says, service, "deliveries went back", drop))
            attempt.fired()
            if drop % 2:
                # Each event is redelivered before its call ends.
                becomes(partial(statsd.count, f"{name}.notifications_received"), 10 * drop)
                assert ids(events) <= store.in_state("notify", "claimed")
            receiver.release()
            becomes(partial(undone, events), set())
        assert service.terminate(10) == 0
        for counter in ("returned", "sent"):
            becomes(partial(statsd.count, f"{name}.notifications_{counter}"), 15)
        attempt.rig.counters_add_up("notifications", prefix=f"{name}.")
    attempt.judge(at_least=15 * processes)
    assert account(receiver.calls, store.done("notify"), lambda *_: False) == set()
    assert set(map(tuple, store.steps("notify").values())) == {("claimed", "done")}
