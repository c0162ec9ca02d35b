"""Processes of the order service are killed and frozen under load: others finish their work."""

import random
import signal
import time
from collections.abc import Callable
from functools import partial

import pytest

from chaos.conftest import StartTrial
from chaos.durations import lasting, often, rate
from chaos.poison import Poison
from chaos.proxy import relay
from chaos.signs import losses, port_of, true
from integration.judging import becomes, lines, passes
from integration.load import ids, orders
from servers.broker import Broker
from servers.servers import Servers
from servers.services import Service
from servers.store import Store
from servers.wait import eventually, lasts

# RabbitMQ gives up a connection at the third of its checks, 10 s apart, that finds it silent.
TAKEN_BACK_WITHIN_S = 35.0


@pytest.mark.timeout(600)
@pytest.mark.parametrize("replicas", [1, 2])
def test_processes_are_killed_again_and_again(
    trial: StartTrial, start_audited: Callable[..., Service], replicas: int
) -> None:
    """At any moment of their work; whatever each had in hand is finished by another."""
    chance = random.Random(replicas)
    attempt = trial(f"process killed -9 under load, {replicas} at work")
    poison = Poison(attempt)
    running = [start_audited("order") for _ in range(replicas)]
    times = often(18, 100)
    with attempt.load(rate(2 * times, most=300)):
        for _ in range(times):
            victim = running.pop(chance.randrange(replicas))
            _works(victim)
            poison.inject()
            lasts(chance.uniform(0, 0.3))
            victim.kill()
            assert victim.exit_code == -signal.SIGKILL
            attempt.fired()
            running.append(start_audited("order"))
        attempt.recovers()
    poison.assert_parked()
    attempt.judge(at_least=1000)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seconds", lasting(25, 60))
def test_processes_are_frozen_for_longer_than_the_heartbeat(
    trial: StartTrial,
    clean: Servers,
    start_audited: Callable[..., Service],
    broker: Broker,
    store: Store,
    seconds: float,
) -> None:
    """One before its transaction arrives, one before its reply does: a third does their work.

    What they had sent arrives late, while the third has long been done: it loses its compares.
    """
    attempt = trial("process frozen for longer than the heartbeat")
    port = port_of(clean.etcd.endpoint)
    with relay(port) as asking, relay(port) as answered:
        zombies = [start_audited("order", ETCD_ENDPOINTS=way.address) for way in (asking, answered)]
        # Before its first commit a service asks for a lease: that is done when these are.
        warm = attempt.publish(orders(20, "warm"))
        becomes(lambda: store.done("order"), ids(warm))
        asking.hold("up")
        answered.hold("down")
        frozen = attempt.publish(orders(40, "frozen"))
        eventually(lambda: true(asking.up.holds(b"/service/order/frozen-")))
        passes(lambda: len(store.done("order")), len(warm))
        for zombie in zombies:
            zombie.pause()
        until_s = time.monotonic() + seconds
        assert broker.depth("order") == (0, len(frozen))
        attempt.fired(2)
        start_audited("order")
        with attempt.load(rate_per_s=100):
            eventually(lambda: true(store.done("order") >= ids(frozen)), TAKEN_BACK_WITHIN_S)
            attempt.works()
            answers = asking.down.passed_bytes
            asking.release()
            eventually(lambda: true(asking.down.passed_bytes > answers))
            answered.release()
            lasts(until_s - time.monotonic())
            for zombie in zombies:
                zombie.resume()
            attempt.recovers()
            for zombie in zombies:
                eventually(partial(_is_back_by_another_channel, zombie))
                assert not losses(zombie, "delivery tag"), "it has acked on another channel"
        attempt.judge(at_least=500)


def _is_back_by_another_channel(service: Service) -> None:
    true(losses(service) and service.health().status == 200)


def _works(service: Service) -> None:
    """Wait until the service has settled something."""

    def settled() -> None:
        said = ("processed", "skipped: a duplicate", "settled a batch")
        assert any(lines(service, text) for text in said), "it has settled nothing"

    eventually(settled)
