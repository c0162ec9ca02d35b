"""The network between a service and one dependency is cut, slow, crumbly and abrupt."""

import time
from collections.abc import Callable
from functools import partial

import pytest

from chaos.acks import AckAudit
from chaos.conftest import StartTrial
from chaos.durations import lasting, rate
from chaos.partition import Lost
from chaos.signs import losses, true
from chaos.trial import Trial
from chaos.ways import Dependency, cuttable, relayed
from integration.judging import becomes, passes, says, throughout
from integration.load import order
from servers.broker import Broker
from servers.servers import Servers
from servers.services import Service
from servers.store import Store
from servers.wait import eventually, lasts

DEPENDENCIES: tuple[Dependency, ...] = ("broker", "etcd")
DIRECTIONS: tuple[Lost, ...] = ("in", "out", "both")
COMMITS_IN_FLIGHT = 4
CALL_TIMEOUT_S = 5.0
# Within this everything that was on its way has arrived, and nothing follows.
STANDSTILL_S = 1.0
CLOSE_S = 8.0
# Every transaction compares or reads the key that tells one life of etcd's data from another.
IN_EVERY_ATTEMPT = b"/incarnation/order"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("dependency", DEPENDENCIES)
@pytest.mark.parametrize("seconds", lasting(5, 30, 120))
def test_a_partition_to_one_dependency(
    trial: StartTrial,
    clean: Servers,
    acks: AckAudit,
    start_audited: Callable[..., Service],
    dependency: Dependency,
    seconds: float,
) -> None:
    """What the service sends is dropped, what is sent to it, or both: work stops, and goes on."""
    attempt = trial(f"partition to {dependency} for {seconds:g} s")
    with cuttable(dependency, clean, acks) as (way, settings):
        # A small prefetch: what has arrived before the cut is soon done.
        start_audited("order", BATCH_SIZE="16", **settings)
        with attempt.load(rate(3 * (seconds + 10), most=100)):
            for lost in DIRECTIONS:
                attempt.works()
                way.cut(lost)
                lasts(seconds - STANDSTILL_S)
                throughout(STANDSTILL_S, partial(_stands_still, attempt, attempt.done()))
                assert way.stopped() > 0
                attempt.fired()
                way.heal()
                attempt.recovers()
        attempt.judge(at_least=100)


def test_latency_to_the_broker(
    trial: StartTrial,
    clean: Servers,
    acks: AckAudit,
    store: Store,
    start_audited: Callable[..., Service],
) -> None:
    """50 ms, half a second and 5 s each way slow it down; no connection is given up."""
    attempt = trial("latency of 50 ms to 5 s to broker")
    with relayed("broker", clean, acks) as (proxy, settings):
        service = start_audited("order", **settings)
        with attempt.load():
            attempt.works()
            for seconds in (0.05, 0.5, 5):
                proxy.delay(seconds)
                assert _takes_s(attempt, store, f"late-{seconds}") > seconds
                attempt.fired()
            proxy.delay(0)
            attempt.recovers()
        attempt.judge(at_least=100)
        assert losses(service) == 0


def test_latency_to_etcd(
    trial: StartTrial,
    clean: Servers,
    acks: AckAudit,
    store: Store,
    start_audited: Callable[..., Service],
) -> None:
    """50 ms and half a second each way slow it down; 5 s is as long as a call to etcd may take.

    Commits are sent once, and once for each time-out: the attempts are counted on their way.
    """
    attempt = trial("latency of 50 ms to 5 s to etcd")
    with relayed("etcd", clean, acks) as (proxy, settings):
        # Small batches: large ones wait for room on the slow connection, and so hide the attempts.
        service = start_audited("order", BATCH_SIZE="8", **settings)
        with attempt.load(rate_per_s=60):
            attempt.works()
            for seconds in (0.05, 0.5):
                proxy.delay(seconds)
                proxy.count("up", IN_EVERY_ATTEMPT)
                revision = store.client.revision()
                assert _takes_s(attempt, store, f"late-{seconds}") > seconds
                attempt.works(50)
                commits = store.client.revision() - revision
                # Besides those that had been on their way, and a look at the key every 5 s.
                assert proxy.up.appearances <= commits + 2 * COMMITS_IN_FLIGHT
                attempt.fired()
            proxy.delay(CALL_TIMEOUT_S)
            proxy.count("up", IN_EVERY_ATTEMPT)

            def tried_rarely() -> None:
                # At first and at the end of each time-out: each commit in flight, and the look.
                assert proxy.up.appearances <= (1 + 3) * (COMMITS_IN_FLIGHT + 1)

            throughout(3 * CALL_TIMEOUT_S, tried_rarely)
            assert says(service, "etcd does not answer")
            attempt.fired()
            proxy.delay(0)
            attempt.recovers()
        attempt.judge(at_least=100)


def test_bytes_come_one_at_a_time(
    trial: StartTrial, clean: Servers, acks: AckAudit, start_audited: Callable[..., Service]
) -> None:
    """From both and to both: frames and transactions are put together again."""
    attempt = trial("one-byte slices")
    with (
        relayed("broker", clean, acks) as (amqp, to_broker),
        relayed("etcd", clean, acks) as (grpc, to_etcd),
    ):
        start_audited("order", BATCH_SIZE="8", **to_broker, **to_etcd)
        with attempt.load(rate_per_s=40):
            attempt.works()
            for proxy in (amqp, grpc):
                proxy.slice(1)
            attempt.works(40)
            for way in (amqp.up, amqp.down, grpc.up, grpc.down):
                assert way.slices > 100
                attempt.fired()
            for proxy in (amqp, grpc):
                proxy.slice(None)
            attempt.recovers()
        attempt.judge(at_least=60)


def test_the_broker_learns_late_that_a_process_has_died(
    trial: StartTrial,
    clean: Servers,
    acks: AckAudit,
    start_audited: Callable[..., Service],
    broker: Broker,
) -> None:
    """What it had in hand is stuck for so long; its successor does the rest meanwhile."""
    attempt = trial("slow close, to broker")
    with relayed("broker", clean, acks) as (proxy, settings):
        service = start_audited("order", **settings)
        with attempt.load():
            attempt.works()
            proxy.close_slowly(CLOSE_S)
            service.pause()
            passes(lambda: broker.unacked("order"), 50)
            service.kill()
            start_audited("order")
            attempt.works(100)
            assert proxy.closed_late > 0
            # Those of the dead process are still out, besides those of its successor.
            assert broker.unacked("order") >= 50
            attempt.fired()
            attempt.recovers()
        attempt.judge(at_least=100)


def test_a_service_learns_late_that_etcd_has_died(
    trial: StartTrial, clean: Servers, acks: AckAudit, start_audited: Callable[..., Service]
) -> None:
    """Its calls go to a connection without another end, and time out."""
    attempt = trial("slow close, by etcd")
    with relayed("etcd", clean, acks) as (proxy, settings):
        service = start_audited("order", **settings)
        with attempt.load():
            attempt.works()
            proxy.close_slowly(CLOSE_S)
            clean.etcd.kill()
            clean.etcd.start()
            assert proxy.closed_late > 0
            eventually(lambda: says(service, "etcd does not answer"))
            attempt.fired()
            attempt.recovers()
        attempt.judge(at_least=100)


def _stands_still(attempt: Trial, done: int) -> None:
    true(attempt.done() == done)


def _takes_s(attempt: Trial, store: Store, event_id: str) -> float:
    """Return how long it takes until an event is done that is published now."""
    started_s = time.monotonic()
    attempt.publish([order(event_id)])
    becomes(lambda: event_id in store.done("order"), expected=True)
    return time.monotonic() - started_s
