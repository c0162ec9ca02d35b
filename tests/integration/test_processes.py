"""Services are killed, frozen and stopped under load: others finish their work."""

import random
import signal
import time
from functools import partial

import pytest

from chaos.checks import becomes, lines, losses, not_ready, passes, throughout, true
from chaos.durations import lasting, often, quick, rate
from chaos.load import ids, orders
from chaos.network import port_of
from chaos.proxy import Proxy, relay
from chaos.receiver import Receiver, account
from chaos.rig import Rig
from chaos.trial import StartTrial
from servers.services import Service
from servers.wait import eventually, lasts

# Small transactions, so that a backlog lasts until the signal.
SLOW = {"BATCH_SIZE": "16", "ETCD_MAX_TXN_OPS": "32"}
# RabbitMQ checks every 10 s, and closes a connection that was silent at three checks.
TAKEN_BACK_WITHIN_S = 35.0

STOPPED_WITHIN_S = 10
STOPS = 25
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Slow transactions, so that something is in flight at nearly every signal.
COMMIT_S = 0.02

# Killed and frozen.


@pytest.mark.short
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("replicas", "times"), [quick(1, 4), (1, often(18, 100)), (2, often(18, 100))]
)
def test_processes_are_killed_again_and_again(trial: StartTrial, replicas: int, times: int) -> None:
    """Other processes finish what it held.

    Every second time it is frozen before, until deliveries have piled up in it.
    """
    chance = random.Random(replicas)
    attempt = trial(f"process killed -9 under load, {replicas} at work")
    running = [attempt.start() for _ in range(replicas)]

    def has_settled(service: Service) -> None:
        said = ("processed", "skipped: a duplicate", "settled a batch")
        assert any(lines(service, text) for text in said), "it has settled nothing"

    with attempt.under_load(rate(2 * times, most=300), at_least=50 * times):
        for kill in range(times):
            victim = running.pop(chance.randrange(replicas))
            eventually(partial(has_settled, victim))
            attempt.poison()
            if kill % 2:
                victim.pause()
                passes(lambda: attempt.broker.unacked("order"), 0)
            else:
                lasts(chance.uniform(0, 0.3))
            victim.kill()
            assert victim.exit_code == -signal.SIGKILL
            attempt.fired()
            running.append(attempt.start())


@pytest.mark.short
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seconds", lasting(25, 60))
def test_processes_are_frozen_for_longer_than_the_heartbeat(
    trial: StartTrial, seconds: float
) -> None:
    """One before its transaction arrives, one before its reply arrives; a third does their work.

    Their transactions arrive when the third has recorded the events, so their compares fail.
    """
    attempt = trial("process frozen for longer than the heartbeat")
    store, port = attempt.store, port_of(attempt.servers.etcd.endpoint)
    with relay(port) as asking, relay(port) as answered:
        zombies = [attempt.start(ETCD_ENDPOINTS=way.address) for way in (asking, answered)]
        # Before its first commit a service asks for a lease, which must not be held back.
        warm = attempt.publish(orders(20, "warm"))
        becomes(lambda: store.done("order"), ids(warm))
        asking.hold("up")
        answered.hold("down")
        frozen = attempt.publish(orders(40, "frozen"))
        eventually(lambda: true(asking.up.holds(b"/service/order/frozen-")))
        passes(attempt.done, len(warm))
        for zombie in zombies:
            zombie.pause()
        until_s = time.monotonic() + seconds
        assert attempt.broker.depth("order") == (0, len(frozen))
        attempt.fired(2)
        attempt.start()
        with attempt.load(rate_per_s=100):
            eventually(lambda: true(store.done("order") >= ids(frozen)), TAKEN_BACK_WITHIN_S)
            attempt.works()
            answers = asking.down.passed_bytes
            asking.release()
            passes(lambda: asking.down.passed_bytes, answers)
            answered.release()
            lasts(until_s - time.monotonic())
            for zombie in zombies:
                zombie.resume()
            attempt.recovers()
            for zombie in zombies:
                passes(partial(losses, zombie), 0)
                zombie.wait_ready()
                assert not losses(zombie, "delivery tag"), "it has acked on another channel"
        attempt.judge(at_least=500)


# Stopped by SIGTERM or SIGINT: they take no more, settle what is in flight, and exit with code 0.


def stopped(service: Service, by: signal.Signals = signal.SIGTERM) -> int:
    """Send a signal, and return the exit code."""
    service.signal(by)
    return service.wait_end(STOPPED_WITHIN_S)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stops", [quick(4), STOPS])
def test_stopped_again_and_again_in_the_middle_of_a_backlog(
    trial: StartTrial, way: Proxy, stops: int
) -> None:
    """Each id is published once, so a skip would mean a record without an ack.

    It is stopped at least so often, and until more than half of the stops met work in flight.
    """
    attempt = trial("stopped under load")
    store, slow = attempt.store, {**SLOW, "ETCD_ENDPOINTS": way.address}
    way.delay(COMMIT_S / 2)
    assert stopped(attempt.start(**slow)) == 0
    published = 0
    in_flight: list[int] = []
    while len(in_flight) < stops or sum(each > 0 for each in in_flight) <= stops / 2:
        number = len(in_flight)
        if attempt.broker.ready("order") < 1000:
            published += len(attempt.publish(orders(3000, f"o{number}")))
        before = store.client.revision()
        service = attempt.start(**slow)
        passes(store.client.revision, before + 5)
        assert stopped(service, SIGNALS[number % 2]) == 0
        ready, unacked = attempt.broker.depth("order")
        assert ready > 0, "the backlog was gone before the signal"
        assert unacked == 0
        (said,) = lines(service, "stopping: taking no more")
        in_flight.append(said["in_hand"])
        attempt.fired()
    service = attempt.start()
    attempt.judge(at_least=published)
    assert stopped(service) == 0
    # Nothing was recorded without an ack, and nothing that was recorded was requeued.
    becomes(lambda: attempt.statsd.count("orders_processed"), published)
    counts = attempt.rig.counters("orders")
    assert "processed_skipped" not in counts
    assert counts["received"] == published + counts.get("returned", 0)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stops", [quick(2), often(8, STOPS)])
def test_stopped_with_calls_under_way(trial: StartTrial, receiver: Receiver, stops: int) -> None:
    """The process finishes and records its calls, and no other repeats them."""
    attempt = trial("notify: stopped with calls under way", service="notify")
    store = attempt.store

    def start(name: str) -> tuple[str, Service]:
        return name, attempt.start(NOTIFY_URL=receiver.url_for(name))

    running = [start("p0"), start("p1")]
    finished: set[str] = set()
    with attempt.under_load(100, at_least=50 * stops):
        for number in range(stops):
            name, service = running.pop(0)
            receiver.hold()
            # A call that was about to be answered when the hold began is not held.
            passes(partial(receiver.number_held, name), 0)
            service.signal(SIGNALS[number % 2])
            eventually(partial(not_ready, service, "running"))
            # A call is given 5 s.
            throughout(0.5, partial(not_ready, service, "running"))
            in_call = receiver.held(name)
            receiver.release()
            assert service.wait_end(STOPPED_WITHIN_S) == 0
            assert set() < in_call <= store.done("notify")
            finished |= in_call
            attempt.fired()
            running.append(start(f"p{number + 2}"))
            attempt.works()
    assert account(receiver.calls, store.done("notify"), lambda *_: False) == set()
    of_records = store.steps("notify")
    assert {tuple(of_records[event_id]) for event_id in finished} == {("claimed", "done")}
    assert [stopped(service) for _, service in running] == [0, 0]
    attempt.rig.counters_add_up("notifications")


@pytest.mark.parametrize("name", ["rabbitmq", "etcd"])
def test_stopped_while_a_server_is_frozen(rig: Rig, name: str) -> None:
    """What is in flight is requeued: the service waits neither for a commit nor for the broker."""
    service, server, events = rig.start("order"), getattr(rig.servers, name), orders(20)
    service.pause()
    rig.broker.publish(events)
    becomes(lambda: rig.broker.ready("order"), 0)
    server.pause()
    service.resume()
    passes(lambda: rig.statsd.count("orders_received"), 0)
    assert stopped(service) == 0
    server.resume()
    rig.start("order")
    rig.handled_once("order", events)
