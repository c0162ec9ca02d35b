"""The network to RabbitMQ or etcd: partitions, latency, one-byte slices, lost replies, resets."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from chaos.checks import becomes, lines, losses, passes, says, throughout
from chaos.durations import lasting, often, rate
from chaos.load import order, orders
from chaos.network import Dependency, Lost, cuttable, relayed
from chaos.proxy import Proxy
from chaos.trial import StartTrial, Trial
from servers.services import Service
from servers.wait import eventually, lasts

DEPENDENCIES: tuple[Dependency, ...] = ("broker", "etcd")
LOST: tuple[Lost, ...] = ("in", "out", "both")
COMMITS_IN_FLIGHT = 4
CALL_TIMEOUT_S = 5.0
# Long enough for what was on its way to arrive.
STANDSTILL_S = 1.0
CLOSE_S = 8.0
# Every transaction compares or reads this key, which a wiped etcd no longer has.
IN_EVERY_ATTEMPT = b"/incarnation/order"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("dependency", DEPENDENCIES)
@pytest.mark.parametrize("seconds", lasting(5, 30, 120))
def test_a_partition_to_one_dependency(
    trial: StartTrial, dependency: Dependency, seconds: float
) -> None:
    """Packets to the service, from it, or both are dropped: work stops, and goes on afterwards."""
    attempt = trial(f"partition to {dependency} for {seconds:g} s")
    with cuttable(dependency, attempt.servers, attempt.acks) as (way, settings):
        # A small prefetch, so that what has arrived before the cut is soon done.
        attempt.start(BATCH_SIZE="16", **settings)
        with attempt.under_load(rate(3 * (seconds + 10), most=100)):
            for lost in LOST:
                attempt.works()
                way.cut(lost)
                lasts(seconds - STANDSTILL_S)
                throughout(STANDSTILL_S, partial(becomes, attempt.done, attempt.done(), 0))
                assert way.stopped() > 0
                attempt.fired()
                way.heal()
                attempt.recovers()


def test_latency_to_the_broker(trial: StartTrial) -> None:
    """50 ms, 500 ms and 5 s each way slow the service down, and close no connection."""
    attempt = trial("latency of 50 ms to 5 s to broker")
    with way_to("broker", attempt) as (proxy, service):
        with attempt.under_load():
            for seconds in (0.05, 0.5, 5):
                proxy.delay(seconds)
                assert takes_s(attempt, f"late-{seconds}") > seconds
                attempt.fired()
            proxy.delay(0)
        assert losses(service) == 0


def test_latency_to_etcd(trial: StartTrial) -> None:
    """50 ms and 500 ms each way slow the service down; with 5 s each call times out.

    A commit is sent once, and once more for each time-out. The proxy counts the attempts.
    """
    attempt = trial("latency of 50 ms to 5 s to etcd")
    # Large batches would wait for room on the slow connection, which hides the attempts.
    with (
        way_to("etcd", attempt, BATCH_SIZE="8") as (proxy, service),
        attempt.under_load(rate_per_s=60),
    ):
        for seconds in (0.05, 0.5):
            proxy.delay(seconds)
            proxy.count("up", IN_EVERY_ATTEMPT)
            revision = attempt.store.client.revision()
            assert takes_s(attempt, f"late-{seconds}") > seconds
            attempt.works(50)
            commits = attempt.store.client.revision() - revision
            # Also those that were under way, and a read of the key every 5 s.
            assert proxy.up.appearances <= commits + 2 * COMMITS_IN_FLIGHT
            attempt.fired()
        proxy.delay(CALL_TIMEOUT_S)
        proxy.count("up", IN_EVERY_ATTEMPT)
        lasts(3 * CALL_TIMEOUT_S)
        # At first and after each time-out: each commit in flight, and the read of the key.
        assert proxy.up.appearances <= (1 + 3) * (COMMITS_IN_FLIGHT + 1)
        assert says(service, "etcd does not answer")
        attempt.fired()
        proxy.delay(0)


def test_bytes_come_one_at_a_time(trial: StartTrial) -> None:
    """From and to both servers: frames and transactions are put together again."""
    attempt = trial("one-byte slices")
    with (
        relayed("broker", attempt.servers, attempt.acks) as (amqp, to_broker),
        way_to("etcd", attempt, BATCH_SIZE="8", **to_broker) as (grpc, _),
        attempt.under_load(rate_per_s=40),
    ):
        for proxy in (amqp, grpc):
            proxy.slice(1)
        attempt.works(40)
        for way in (amqp.up, amqp.down, grpc.up, grpc.down):
            assert way.slices > 100
            attempt.fired()
        for proxy in (amqp, grpc):
            proxy.slice(None)


def test_the_broker_learns_late_that_a_process_has_died(trial: StartTrial) -> None:
    """What it held stays unacked for so long; another process does the rest meanwhile."""
    attempt = trial("slow close, to broker")
    with way_to("broker", attempt) as (proxy, service), attempt.under_load():
        proxy.close_slowly(CLOSE_S)
        service.pause()
        passes(lambda: attempt.broker.unacked("order"), 50)
        service.kill()
        attempt.start()
        attempt.works(100)
        assert proxy.closed_late > 0
        # Those of the dead process are still unacked.
        assert attempt.broker.unacked("order") >= 50
        attempt.fired()


def test_a_service_learns_late_that_etcd_has_died(trial: StartTrial) -> None:
    """Its calls go to a connection whose other end is gone, and time out."""
    attempt = trial("slow close, by etcd")
    with way_to("etcd", attempt) as (proxy, service), attempt.under_load():
        proxy.close_slowly(CLOSE_S)
        attempt.servers.etcd.kill()
        attempt.servers.etcd.start()
        assert proxy.closed_late > 0
        eventually(lambda: says(service, "etcd does not answer"))
        attempt.fired()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("dependency", DEPENDENCIES)
def test_connections_are_reset_in_the_middle_of_a_frame(
    trial: StartTrial, dependency: Dependency
) -> None:
    """In frames from the service and to it, in turn. Each time it connects again."""
    attempt, times = trial(f"reset in mid-frame, {dependency}"), often(10, 100)
    with way_to(dependency, attempt) as (proxy, service), attempt.under_load(rate(3 * times)):
        for number in range(times):
            service.wait_ready()
            attempt.works(5)
            attempt.poison()
            proxy.cut_in_next("down" if number % 2 else "up")
            passes(lambda: proxy.up.broken + proxy.down.broken, number)
            attempt.fired()


@pytest.mark.timeout(600)
def test_replies_of_etcd_are_lost(trial: StartTrial) -> None:
    """The same transaction is sent again, and the service finds that it has landed."""
    attempt = trial("reply of etcd lost, the transaction done")
    processed = partial(attempt.statsd.count, "orders_processed")
    with way_to("etcd", attempt) as (proxy, _):
        attempt.publish(orders(5, "warm"))
        becomes(processed, 5)
        times = often(10, 100)
        for number in range(times):
            before = proxy.down.swallowed_bytes
            proxy.swallow("down")
            attempt.publish(orders(5, f"unheard-{number}"))
            # All are recorded, and the replies are lost.
            becomes(attempt.done, 5 * (number + 2))
            passes(lambda: proxy.down.swallowed_bytes, before)
            proxy.cut()
            attempt.fired()
            becomes(processed, 5 * (number + 2))
        attempt.recovers()
        attempt.judge(at_least=5 * times)
    assert attempt.statsd.count("orders_processed_skipped") == 0


@pytest.mark.timeout(300)
def test_replies_of_etcd_arrive_after_the_channel_has_closed(trial: StartTrial) -> None:
    """On the next channel the tags of the old deliveries belong to others."""
    attempt = trial("reply of etcd after its channel has gone")
    depth = partial(attempt.broker.depth, "order")
    with way_to("etcd", attempt) as (proxy, service):

        def consumes() -> int:
            said = lines(service, "connected to RabbitMQ")
            return sum(line["connection"] == "rabbitmq" for line in said)

        attempt.publish(orders(5, "warm"))
        becomes(attempt.done, 5)
        for number in range(often(4, 20)):
            proxy.hold("down")
            # They arrive together, since the number of commits in flight is limited.
            service.pause()
            attempt.publish(orders(10, f"old-{number}"))
            service.resume()
            becomes(attempt.done, 5 + 20 * number + 10)
            becomes(depth, (0, 10))
            attempt.servers.rabbitmq.ctl("close_all_connections", "closed by the test")
            passes(consumes, number + 1)
            attempt.publish(orders(10, f"new-{number}"))
            becomes(depth, (0, 20))
            proxy.release()
            attempt.fired()
            becomes(attempt.done, 5 + 20 * number + 20)
            becomes(depth, (0, 0))
        attempt.recovers()
        attempt.judge(at_least=50)
        assert not losses(service, "delivery tag"), "it has acked on another channel"


@contextmanager
def way_to(
    dependency: Dependency, attempt: Trial, **settings: str
) -> Iterator[tuple[Proxy, Service]]:
    """Start the service with a proxy to one of its dependencies."""
    with relayed(dependency, attempt.servers, attempt.acks) as (proxy, way):
        yield proxy, attempt.start(**settings, **way)


def takes_s(attempt: Trial, event_id: str) -> float:
    """Publish an event, and return how long it takes until that is done."""
    started_s = time.monotonic()
    attempt.publish([order(event_id)])
    becomes(lambda: event_id in attempt.store.done("order"), expected=True)
    return time.monotonic() - started_s
