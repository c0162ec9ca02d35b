"""Connections are reset in the middle of a frame, and replies are lost with what they would say."""

from collections.abc import Callable
from functools import partial

import pytest

from chaos.acks import AckAudit
from chaos.conftest import StartTrial
from chaos.crash_cells import frozen
from chaos.durations import often, rate
from chaos.poison import Poison
from chaos.proxy import Direction, Proxy
from chaos.signs import losses, true
from chaos.ways import Dependency, relayed
from integration.judging import becomes, lines
from integration.load import orders
from servers.broker import Broker
from servers.servers import Servers
from servers.services import Service
from servers.statsd import StatsdListener
from servers.wait import eventually

DIRECTIONS: tuple[Direction, ...] = ("up", "down")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("dependency", ["broker", "etcd"])
def test_connections_are_reset_in_the_middle_of_a_frame(
    trial: StartTrial,
    clean: Servers,
    acks: AckAudit,
    start_audited: Callable[..., Service],
    dependency: Dependency,
) -> None:
    """In turns of what the service sends and of what is sent to it; each time it connects again."""
    attempt = trial(f"reset in mid-frame, {dependency}")
    with relayed(dependency, clean, acks) as (proxy, settings):
        service = start_audited("order", **settings)
        poison = Poison(attempt)
        times = often(10, 100)
        with attempt.load(rate(3 * times)):
            for number in range(times):
                service.wait_ready()
                attempt.works(5)
                poison.inject()
                direction = DIRECTIONS[number % 2]
                proxy.cut_in_next(direction)
                eventually(partial(_broken, proxy, number + 1))
                attempt.fired()
            attempt.recovers()
        poison.assert_parked()
        attempt.judge(at_least=100)


@pytest.mark.timeout(600)
def test_replies_of_etcd_are_lost_after_it_has_done_what_was_asked(
    trial: StartTrial,
    clean: Servers,
    acks: AckAudit,
    start_audited: Callable[..., Service],
    statsd: StatsdListener,
) -> None:
    """Each event lands, nobody is told, the connection ends: the same is sent again, and known."""
    attempt = trial("reply of etcd lost, the transaction done")
    with relayed("etcd", clean, acks) as (proxy, settings):
        start_audited("order", **settings)
        attempt.publish(orders(5, "warm"))
        becomes(lambda: statsd.count("orders_processed"), 5)
        times = often(10, 100)
        for number in range(times):
            before = proxy.down.swallowed_bytes
            proxy.swallow("down")
            attempt.publish(orders(5, f"unheard-{number}"))
            # It is done, and no reply has got through since.
            becomes(attempt.done, 5 * (number + 2))
            eventually(partial(_swallowed, proxy, before))
            proxy.cut()
            attempt.fired()
            becomes(lambda: statsd.count("orders_processed"), 5 * (number + 2))
        attempt.recovers()
        attempt.judge(at_least=5 * times)
    assert statsd.count("orders_processed_skipped") == 0


@pytest.mark.timeout(300)
def test_replies_of_etcd_come_when_their_channel_has_gone(
    trial: StartTrial,
    clean: Servers,
    acks: AckAudit,
    broker: Broker,
    start_audited: Callable[..., Service],
) -> None:
    """The deliveries have come again by another channel, where their old tags mean others."""
    attempt = trial("reply of etcd after its channel has gone")
    with relayed("etcd", clean, acks) as (proxy, settings):
        service = start_audited("order", **settings)
        attempt.publish(orders(5, "warm"))
        becomes(attempt.done, 5)
        for number in range(often(4, 20)):
            proxy.hold("down")
            with frozen([service]):  # They arrive together: only so many commits are under way.
                attempt.publish(orders(10, f"old-{number}"))
            becomes(attempt.done, 5 + 20 * number + 10)
            becomes(lambda: broker.depth("order"), (0, 10))
            clean.rabbitmq.ctl("close_all_connections", "closed by the test")
            eventually(partial(_connected_again, service, number + 1))
            attempt.publish(orders(10, f"new-{number}"))
            becomes(lambda: broker.depth("order"), (0, 20))
            proxy.release()
            attempt.fired()
            becomes(attempt.done, 5 + 20 * number + 20)
            becomes(lambda: broker.depth("order"), (0, 0))
        attempt.recovers()
        attempt.judge(at_least=50)
        assert not losses(service, "delivery tag"), "it has acked on another channel"


def _connected_again(service: Service, times: int) -> None:
    connected = lines(service, "connected to RabbitMQ")
    true(sum(line["connection"] == "rabbitmq" for line in connected) > times)


def _broken(proxy: Proxy, times: int) -> None:
    true(proxy.up.broken + proxy.down.broken >= times)


def _swallowed(proxy: Proxy, before: int) -> None:
    true(proxy.down.swallowed_bytes > before)
