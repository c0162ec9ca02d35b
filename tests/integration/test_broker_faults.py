"""RabbitMQ is stopped, killed and frozen, closes connections, loses a queue, raises an alarm."""

from contextlib import suppress
from functools import partial

import pytest

from chaos import outages
from chaos.checks import becomes, lines, losses, not_ready, passes, says, throughout, true
from chaos.durations import FULL, lasting, often, quick, rate
from chaos.load import ids, orders
from chaos.trial import StartTrial
from servers.wait import eventually, lasts

pytestmark = pytest.mark.short

STUCK_AFTER_S = 25.0


@pytest.mark.parametrize(
    ("fault", "down"),
    [
        ("broker restarted (stop_app, start_app)", outages.application_stopped),
        ("broker restarted (its process)", outages.stopped),
        quick("broker killed -9", outages.killed),
    ],
)
def test_the_broker_is_down_for_a_while(
    trial: StartTrial, fault: str, down: outages.Outage
) -> None:
    """Confirmed events survive. The service reconnects by itself, without a hot loop."""
    attempt = trial(fault)
    service = attempt.start()
    with attempt.under_load(at_least=200):
        with outages.frozen(service):
            for _ in range(5):
                attempt.poison()
        with down(attempt.servers.rabbitmq):
            eventually(lambda: not_ready(service, "rabbitmq"))
            attempt.fired()
    service.wait_ready()
    assert losses(service) < 50
    attempt.rig.counters_add_up("orders")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("seconds", lasting(30, 120))
def test_the_broker_is_frozen(trial: StartTrial, seconds: float) -> None:
    """Heartbeats and the publisher's deadline notice it, and the event loop is not blocked."""
    attempt = trial(f"broker frozen for {seconds:g} s")
    rabbitmq, service = attempt.servers.rabbitmq, attempt.start()
    with attempt.under_load(rate(seconds + 10)):
        service.pause()
        attempt.poison()
        becomes(lambda: attempt.broker.ready("order"), 0)
        rabbitmq.pause()
        service.resume()
        throughout(seconds, lambda: true(service.health("/livez").status == 200))
        passes(partial(losses, service), 0)
        outages.silent(rabbitmq)
        attempt.fired()
        rabbitmq.resume()
    service.wait_ready()
    assert losses(service, "no confirm within", connection="rabbitmq-publishing")
    blocked = lines(service, "the event loop was blocked")
    assert all(line["seconds"] < STUCK_AFTER_S for line in blocked)


@pytest.mark.quick
def test_a_queue_is_deleted_by_hand(trial: StartTrial) -> None:
    """The service logs it, and consumes from a new one within 10 s. The events in it are lost."""
    attempt = trial("queue deleted by hand (losses waived)")
    service = attempt.start()
    with attempt.under_load(lost_is_waived=True):
        for deleted in range(3):
            attempt.works()
            attempt.servers.rabbitmq.ctl("delete_queue", "order")
            passes(partial(losses, service, "deleted"), deleted)
            attempt.fired()
            attempt.recovers(10)
            service.wait_ready()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("times", [quick(3), often(20, 30)])
def test_connections_are_closed_by_an_operator(trial: StartTrial, times: int) -> None:
    """All of them, again and again, every 10 s with FULL=1: what was in flight is redelivered.

    The replicas are frozen while their connections are closed, so that something is in flight. It
    counts only if one of them was connected: both may have been about to connect again.
    """
    attempt = trial("connections closed by an operator")
    replicas, closed = [attempt.start() for _ in range(2)], 0

    def closings() -> int:
        return sum(losses(replica, "closed by the test") for replica in replicas)

    def close_while_frozen() -> None:
        with outages.frozen(replicas[0]), outages.frozen(replicas[1]):
            passes(lambda: attempt.broker.unacked("order"), 0, timeout_s=2)
            attempt.servers.rabbitmq.ctl("close_all_connections", "closed by the test")

    with attempt.under_load(rate(400 if FULL else 60)):
        while closed < times:
            lasts(10 if FULL else 0)
            attempt.works()
            attempt.poison()
            before = closings()
            eventually(close_while_frozen)
            with suppress(AssertionError):
                passes(closings, before, 2)
                closed += 1
                attempt.fired()
    assert attempt.statsd.count("orders_returned") > 0
    attempt.rig.counters_add_up("orders")


@pytest.mark.parametrize("kind", outages.ALARMS)
def test_the_broker_has_an_alarm(trial: StartTrial, kind: str) -> None:
    """A backlog is acked during the alarm; what the service publishes waits until it is over."""
    attempt = trial(f"{kind} alarm")
    rabbitmq, service = attempt.servers.rabbitmq, attempt.start()
    service.pause()
    backlog = attempt.publish(orders(2000, "backlog"))
    attempt.poison()
    with outages.alarm(rabbitmq, kind), attempt.load():
        service.resume()
        becomes(lambda: attempt.store.done("order") >= ids(backlog), expected=True)
        eventually(lambda: says(service, "RabbitMQ has an alarm"))
        becomes(lambda: attempt.broker.depth("order"), (0, 1))
        assert outages.alarmed(rabbitmq)
        attempt.fired()
        rabbitmq.ctl(*outages.ALARMS[kind][1])
        attempt.recovers()
        attempt.works()
    attempt.judge(at_least=2000)
