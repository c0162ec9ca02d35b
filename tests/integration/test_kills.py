"""Services are killed and frozen under load, and several share a queue: others finish it all."""

import random
import signal
import time
from functools import partial

import pytest

from chaos.checks import (
    becomes,
    lines,
    losses,
    passes,
    true,
)
from chaos.durations import lasting, often, quick, rate
from chaos.load import ids, orders, repeated
from chaos.network import port_of
from chaos.proxy import relay
from chaos.rig import Rig
from chaos.trial import StartTrial
from integration.command import Command
from servers.services import Service
from servers.wait import eventually, lasts

pytestmark = pytest.mark.short

# Small transactions: a backlog then lasts long enough to be killed in the middle of it.
SLOW = {"BATCH_SIZE": "16", "ETCD_MAX_TXN_OPS": "32"}
# RabbitMQ gives up a connection at the third of its checks, 10 s apart, that finds it silent.
TAKEN_BACK_WITHIN_S = 35.0


@pytest.mark.quick
def test_killed_again_and_again_in_the_middle_of_a_backlog(trial: StartTrial) -> None:
    """Six times, before it is ready or soon after: nothing lost, every order at version 1.

    Counts are lost that were not sent yet; gauges are not, they are what etcd and RabbitMQ hold.
    """
    attempt = trial("process killed -9 in a backlog")
    assert attempt.start(**SLOW).terminate() == 0
    attempt.publish(repeated(orders(6000), 2))
    for kill in range(6):
        before = attempt.store.client.revision()
        service = attempt.start(wait=False, **SLOW)
        passes(attempt.store.client.revision, before + 5 + 3 * kill)
        service.kill()
        assert attempt.broker.ready("order") > 0, "the backlog was gone before the kill"
        attempt.fired()
    attempt.start()
    attempt.judge(at_least=6000)
    gauges = {"order_records": 6000, "order_effects": 6000, "order_ready": 0, "order_retries": 0}
    command = Command(attempt.servers, attempt.statsd.settings())
    sent = command.json("gauges", "--effects", "order=/orders/")["gauges"]
    assert gauges.items() <= sent.items()
    becomes(lambda: {gauge: attempt.statsd.gauge(gauge) for gauge in sent}, sent)
    assert attempt.statsd.count("orders_processed") <= 6000


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("replicas", "times"), [quick(1, 4), (1, often(18, 100)), (2, often(18, 100))]
)
def test_processes_are_killed_again_and_again(trial: StartTrial, replicas: int, times: int) -> None:
    """Whatever each holds is finished by another.

    In turns one is killed at any moment of its work, and one that was frozen until deliveries have
    piled up in it.
    """
    chance = random.Random(replicas)
    attempt = trial(f"process killed -9 under load, {replicas} at work")
    running = [attempt.start() for _ in range(replicas)]
    with attempt.load(rate(2 * times, most=300)) as load:
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
            assert load.running
            attempt.fired()
            running.append(attempt.start())
        attempt.recovers()
        attempt.works(100)
    attempt.judge(at_least=50 * times)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seconds", lasting(25, 60))
def test_processes_are_frozen_for_longer_than_the_heartbeat(
    trial: StartTrial, seconds: float
) -> None:
    """One before its transaction arrives, one before its reply does: a third does their work.

    What they had sent arrives late, while the third has long been done: it loses its compares.
    """
    attempt = trial("process frozen for longer than the heartbeat")
    store, port = attempt.store, port_of(attempt.servers.etcd.endpoint)
    with relay(port) as asking, relay(port) as answered:
        zombies = [attempt.start(ETCD_ENDPOINTS=way.address) for way in (asking, answered)]
        # Before its first commit a service asks for a lease: that is done when these are.
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


def test_a_replica_takes_over_what_a_frozen_one_holds(rig: Rig) -> None:
    """The frozen one wakes to a closed connection: it loses its compares, its acks go nowhere."""
    frozen = rig.start("order", STATSD_PREFIX="frozen")
    events = orders(50)
    frozen.pause()
    rig.broker.publish(events)
    becomes(lambda: rig.broker.unacked("order"), 50)
    rig.servers.rabbitmq.ctl("close_all_connections", "closed by the test")
    rig.start("order", STATSD_PREFIX="awake")
    becomes(lambda: rig.statsd.count("awake.orders_processed"), 50)
    frozen.resume()
    becomes(lambda: rig.statsd.count("frozen.orders_returned"), 50)
    frozen.wait_ready()
    rig.handled_once("order", events)
    rig.counters_add_up("orders", prefix="frozen.")


def has_settled(service: Service) -> None:
    """Raise AssertionError unless the service has settled something."""
    said = ("processed", "skipped: a duplicate", "settled a batch")
    assert any(lines(service, text) for text in said), "it has settled nothing"
