"""Calls to the outside under faults: every event is called for, and each repeat has its cause."""

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import pytest

from chaos.accounts import account, lost_claims
from chaos.conftest import StartTrial
from chaos.durations import lasting, often
from chaos.proxy import Proxy, relay
from chaos.signs import port_of, true
from chaos.timed_sink import Span, TimedSink, listen_timed
from integration.judging import StartService, becomes, not_ready, passes, says, throughout
from integration.load import ids, orders
from servers.servers import Servers
from servers.services import Service
from servers.statsd import StatsdListener
from servers.store import Store
from servers.wait import eventually

RATE_PER_S = 100
CALLS_AT_ONCE = 100
LEASE_S = 15
TAKEN_OVER = ["claimed", "gone", "claimed", "done"]
StartNamed = Callable[..., Service]


@pytest.fixture
def sink() -> Iterator[TimedSink]:
    """Give a receiver that takes a while for each call, so that faults fall into calls."""
    with listen_timed() as running:
        yield running


@pytest.fixture
def start_named(start_audited: StartService, sink: TimedSink) -> StartNamed:
    """Start notify under a name, by which its calls and its counters are told from others'."""

    def start(name: str, **settings: str) -> Service:
        named = {"NOTIFY_URL": sink.url_for(name), "STATSD_PREFIX": name}
        return start_audited("notify", **named, **settings)

    return start


@pytest.fixture
def way(clean: Servers) -> Iterator[Proxy]:
    """Give a way to etcd that can be held."""
    with relay(port_of(clean.etcd.endpoint)) as running:
        yield running


@pytest.mark.timeout(600)
def test_replicas_killed_in_mid_call(
    trial: StartTrial, start_named: StartNamed, sink: TimedSink, store: Store
) -> None:
    """Calls of one id never overlap, and are repeated only where a process was killed in one."""
    attempt = trial("notify: killed in mid-call", service="notify")
    killed_s: dict[str, float] = {}
    running = [(name, start_named(name)) for name in ("p0", "p1")]
    with attempt.load(RATE_PER_S) as load:
        attempt.works()
        for number in range(often(12, 30)):
            name, victim = running.pop(0)
            sink.hold()
            passes(partial(sink.number_under_way, name), 0)
            victim.kill()
            killed_s[name] = time.monotonic()
            sink.release()
            attempt.fired()
            assert load.running
            attempt.recovers()
            running.append((f"p{number + 2}", start_named(f"p{number + 2}")))
            attempt.works()
    attempt.judge(at_least=200, drained_within_s=90)

    def was_killed(before: Span, again: Span) -> bool:
        return killed_s.get(before.caller, again.began_s) < again.began_s

    again = account(sink.spans, store.done("notify"), was_killed)
    assert len(again) >= len(killed_s)
    of_records = store.steps("notify")
    for event_id, calls in sink.per_key().items():
        lost, last = of_records[event_id][:-2], of_records[event_id][-2:]
        assert last == ["claimed", "done"]
        assert lost == ["claimed", "gone"] * (len(lost) // 2)
        assert calls <= 1 + len(lost) // 2, "a call without a claim of its own"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("finished", [False, True], ids=["in its call", "before its record"])
def test_a_replica_frozen_for_longer_than_its_lease(
    trial: StartTrial,
    start_named: StartNamed,
    sink: TimedSink,
    store: Store,
    statsd: StatsdListener,
    way: Proxy,
    finished: bool,
) -> None:
    """A peer takes over and completes; the one that wakes does not, though its calls succeeded.

    Frozen in its calls, it finds that they took too long. Frozen after them, with their records
    on the way to etcd, it finds that it has lost its claims, counts them, and says so.
    """
    attempt = trial("notify: frozen for longer than its lease", service="notify")
    frozen = start_named("frozen", ETCD_ENDPOINTS=way.address)
    start_named("peer")
    with attempt.load(RATE_PER_S) as load:
        attempt.works()
        sink.hold()
        passes(partial(sink.number_under_way, "frozen"), 3)
        in_call = sink.under_way("frozen")
        if finished:
            way.hold("up")
            sink.release()
            eventually(lambda: true(not in_call & sink.under_way("frozen")))
            eventually(lambda: true(way.up.holds(b'"state":"done"')))
        frozen.pause()
        in_call -= store.done("notify")
        sink.release()
        eventually(partial(all_done, in_call, store), 90)
        attempt.fired()
        assert load.running
        frozen.resume()
        way.release()
        attempt.recovers()
        frozen.wait_ready()
        eventually(lambda: true(not finished or in_call <= lost_claims(frozen)))
    attempt.judge(at_least=200)
    again = account(sink.spans, store.done("notify"), lambda *calls: calls[0].caller == "frozen")
    assert in_call <= again
    of_records = store.steps("notify")
    assert [of_records[each] for each in in_call] == [TAKEN_OVER] * len(in_call)
    becomes(partial(statsd.count, "frozen.notifications_claim_lost"), len(lost_claims(frozen)))
    assert statsd.count("peer.notifications_claim_lost") == 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seconds", lasting(20, 45))
def test_etcd_frozen_for_longer_than_the_claims_leases(
    clean: Servers,
    trial: StartTrial,
    start_named: StartNamed,
    sink: TimedSink,
    store: Store,
    statsd: StatsdListener,
    seconds: float,
) -> None:
    """Calls are repeated only where their claims were lost or they had failed, and none vanishes.

    The calls of the first replica succeed, but cannot be recorded. Those of the second are not
    answered, so each fails after its time, and none begins when its claim may have ended.
    """
    attempt = trial("notify: etcd frozen", service="notify")
    services = {name: start_named(name) for name in ("first", "second")}
    with attempt.load(RATE_PER_S) as load:
        attempt.works()
        sink.hold()
        # Enough that each slot of both has a call in it, and more wait for one.
        attempt.publish(orders(3 * CALLS_AT_ONCE, "burst"))
        becomes(partial(claims, store), 2 * CALLS_AT_ONCE)
        clean.etcd.pause()
        frozen_s = time.monotonic()
        sink.let_through("first")
        eventually(partial(none_ready, services.values()))
        throughout(seconds, partial(none_ready, services.values()))
        last_s = max(span.began_s for span in sink.spans)
        sink.release()
        attempt.fired()
        assert load.running
        clean.etcd.resume()
        attempt.recovers()
        attempt.works(100)
    attempt.judge(at_least=500)
    assert last_s - frozen_s < LEASE_S
    lost = {name: lost_claims(service) for name, service in services.items()}

    def has_cause(before: Span, _again: Span) -> bool:
        return before.key in lost[before.caller] or not before.answered

    again = account(sink.spans, store.done("notify"), has_cause)
    assert len(again) >= CALLS_AT_ONCE
    for name in services:
        becomes(partial(statsd.count, f"{name}.notifications_claim_lost"), len(lost[name]))


@pytest.mark.timeout(600)
def test_channels_dropped_in_mid_call(
    clean: Servers,
    trial: StartTrial,
    start_named: StartNamed,
    sink: TimedSink,
    store: Store,
    statsd: StatsdListener,
) -> None:
    """The event comes back to the process that calls for it, and attaches to that one call.

    Every second time the call ends before the event is back, and the event finds it done.
    """
    attempt = trial("notify: channel dropped in mid-call", service="notify")
    for process in range(often(6, 10)):
        name = f"p{process}"
        service = start_named(name)
        for drop in range(1, 4):
            events = orders(5, f"{name}-{drop}")
            sink.hold()
            attempt.publish(events)
            becomes(partial(sink.under_way, name), ids(events))
            clean.rabbitmq.ctl("close_all_connections", "closed by the test")
            eventually(partial(says, service, "deliveries went back", drop))
            attempt.fired()
            if drop % 2:
                # Each event is back, and in hand beside its call, before that call ends.
                becomes(partial(statsd.count, f"{name}.notifications_received"), 10 * drop)
            sink.release()
            eventually(partial(all_done, ids(events), store), 30)
        assert service.terminate(10) == 0
        assert statsd.count(f"{name}.notifications_returned") == 15
    attempt.judge(at_least=90)
    assert account(sink.spans, store.done("notify"), lambda *_: False) == set()
    assert set(map(tuple, store.steps("notify").values())) == {("claimed", "done")}


def none_ready(services: Iterable[Service]) -> None:
    """Raise AssertionError unless all of them say that they lack etcd."""
    for service in services:
        not_ready(service, "etcd")


def claims(store: Store) -> int:
    """Return how many records are claimed."""
    return sum(record.state == "claimed" for record in store.records("notify").values())


def all_done(event_ids: set[str], store: Store) -> None:
    """Raise AssertionError unless these are done."""
    assert event_ids <= store.done("notify"), event_ids - store.done("notify")
