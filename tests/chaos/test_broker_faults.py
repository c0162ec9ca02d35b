"""The broker stops, dies, freezes, closes connections, loses a queue and raises alarms."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytest

from chaos.conftest import StartTrial
from chaos.durations import FULL, lasting, often, rate
from chaos.outages import (
    ALARMS,
    Outage,
    alarm,
    alarmed,
    application_stopped,
    killed,
    silent,
    stopped,
)
from chaos.poison import Poison
from chaos.signs import Pulse, losses, true
from integration.judging import becomes, not_ready, says, throughout
from integration.load import ids, orders
from servers.broker import Broker
from servers.servers import Servers
from servers.services import Service
from servers.store import Store
from servers.wait import eventually, lasts


@pytest.mark.parametrize(
    ("fault", "down"),
    [
        ("broker restarted (stop_app, start_app)", application_stopped),
        ("broker restarted (its process)", stopped),
        ("broker killed -9", killed),
    ],
)
def test_the_broker_is_down_for_a_while(
    trial: StartTrial,
    clean: Servers,
    start_audited: Callable[..., Service],
    fault: str,
    down: Outage,
) -> None:
    """Confirmed events survive it; the service comes back by itself, without a hot loop."""
    attempt = trial(fault)
    poison = Poison(attempt)
    service = start_audited("order")
    with attempt.load():
        attempt.works()
        service.pause()
        for _ in range(5):
            poison.inject()
        service.resume()
        with down(clean.rabbitmq):
            eventually(lambda: not_ready(service, "rabbitmq"))
            attempt.fired()
        attempt.recovers()
    assert losses(service) < 50
    poison.assert_parked()
    attempt.judge(at_least=100)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("seconds", lasting(30, 120))
def test_the_broker_is_frozen(
    trial: StartTrial,
    clean: Servers,
    start_audited: Callable[..., Service],
    broker: Broker,
    seconds: float,
) -> None:
    """Heartbeats notice, the publisher's deadline too, and the loop comes round all the while."""
    attempt = trial(f"broker frozen for {seconds:g} s")
    poison = Poison(attempt)
    service = start_audited("order")
    with attempt.load(rate(seconds + 10)):
        attempt.works()
        service.pause()
        poison.inject()
        becomes(lambda: broker.ready("order"), 0)
        clean.rabbitmq.pause()
        service.resume()
        throughout(seconds, Pulse(service).check)
        eventually(partial(_lost_more, [service], "", 0), 5)
        silent(clean.rabbitmq)
        attempt.fired()
        clean.rabbitmq.resume()
        attempt.recovers()
        attempt.works(100)
    service.wait_ready()
    confirms_missed = [
        line
        for line in says(service, "no connection to RabbitMQ")
        if line["error"].startswith("no confirm within")
    ]
    assert confirms_missed
    poison.assert_parked()
    attempt.judge(at_least=100)


def test_a_queue_is_deleted_by_hand(
    trial: StartTrial, clean: Servers, start_audited: Callable[..., Service]
) -> None:
    """Three times; the service says so and consumes from a new one within 10 s.

    What was in the queue is lost with it, and counted.
    """
    attempt = trial("queue deleted by hand (losses waived)")
    service = start_audited("order")
    with attempt.load():
        for deleted in range(3):
            attempt.works()
            clean.rabbitmq.ctl("delete_queue", "order")
            eventually(partial(_lost_more, [service], "deleted", deleted))
            attempt.fired()
            attempt.recovers(10)
    attempt.judge(at_least=100, lost_is_waived=True)


@pytest.mark.timeout(900)
def test_connections_are_closed_by_an_operator(
    trial: StartTrial, clean: Servers, start_audited: Callable[..., Service]
) -> None:
    """All of them, again and again: 20 times, or every 10 s for 5 minutes."""
    attempt = trial("connections closed by an operator")
    poison = Poison(attempt)
    replicas = [start_audited("order") for _ in range(2)]
    closed, times = 0, often(20, 30)
    with attempt.load(rate(400 if FULL else 60)):
        while closed < times:
            lasts(10 if FULL else 0)
            eventually(lambda: true(any(replica.health().status == 200 for replica in replicas)))
            poison.inject()
            before = _lost(replicas, "closed by the test")
            clean.rabbitmq.ctl("close_all_connections", "closed by the test")
            # It counts where it has found somebody connected.
            with suppress(AssertionError):
                eventually(partial(_lost_more, replicas, "closed by the test", before), 2)
                closed += 1
                attempt.fired()
        attempt.recovers()
    poison.assert_parked()
    attempt.judge(at_least=100)


@pytest.mark.parametrize("kind", ALARMS)
def test_the_broker_has_an_alarm(
    trial: StartTrial,
    clean: Servers,
    start_audited: Callable[..., Service],
    broker: Broker,
    store: Store,
    kind: str,
) -> None:
    """A backlog is acked during the alarm; what must be published waits, and goes on after it."""
    attempt = trial(f"{kind} alarm")
    poison = Poison(attempt)
    service = start_audited("order")
    service.pause()
    backlog = attempt.publish(orders(2000, "backlog"))
    poison.inject()
    with alarm(clean.rabbitmq, kind), attempt.load():
        service.resume()
        becomes(lambda: store.done("order") >= ids(backlog), expected=True)
        eventually(lambda: says(service, "RabbitMQ has an alarm"))
        becomes(lambda: broker.depth("order"), (0, 1))
        assert alarmed(clean.rabbitmq)
        attempt.fired()
        clean.rabbitmq.ctl(*ALARMS[kind][1])
        attempt.recovers()
        attempt.works()
    poison.assert_parked()
    attempt.judge(at_least=2000)


def _lost(services: list[Service], because: str) -> int:
    return sum(losses(service, because) for service in services)


def _lost_more(services: list[Service], because: str, before: int) -> None:
    true(_lost(services, because) > before)
