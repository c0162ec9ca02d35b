"""SIGTERM and SIGINT: take no more, settle what is in hand, exit 0 within 10 s."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import pytest

from integration.judging import (
    StartService,
    assert_counters_add_up,
    assert_handled_once,
    becomes,
    counters,
    lines,
    not_ready,
    passes,
    times_returned,
    wait_drained,
)
from integration.load import order, orders, repeated
from integration.sink import Sink
from servers.broker import Broker, Depth
from servers.ports import free_port
from servers.servers import Servers
from servers.services import Service
from servers.statsd import StatsdListener
from servers.store import Store
from servers.wait import eventually

WITHIN_S = 10
SLOW = {"BATCH_SIZE": "16", "ETCD_MAX_TXN_OPS": "32"}

CALLS_AT_ONCE = 100
CALL_S = 5

_CALLS = """
import asyncio
import sys
import time

import structlog

from idempotent_consumer import Service

service = Service("notify", noun="notifications")
log = structlog.get_logger()


def plain(event, timeout_s):
    log.info("call begins", event_id=event.id)
    time.sleep({call_s})
    log.info("call ends", event_id=event.id)


async def coroutine(event, timeout_s):
    log.info("call begins", event_id=event.id)
    await asyncio.sleep({call_s})
    log.info("call ends", event_id=event.id)


service.claimed_handler("new_order", timeout_s={call_s} + 1)({handler})
sys.exit(service.run())
"""


def terminate(service: Service) -> int:
    """Send SIGTERM."""
    return service.terminate(WITHIN_S)


def interrupt(service: Service) -> int:
    """Send SIGINT."""
    service.interrupt()
    return service.wait_end(WITHIN_S)


def test_stopped_again_and_again_under_load(
    start_service: StartService,
    broker: Broker,
    store: Store,
    statsd: StatsdListener,
) -> None:
    """Four times in the middle of a backlog: exit 0, nothing lost, each event counted once."""
    service = start_service("order", **SLOW)
    assert terminate(service) == 0
    sent = repeated(orders(4000), 2)
    confirmed = broker.publish(sent)
    for stop in (terminate, interrupt, terminate, interrupt):
        before = store.client.revision()
        service = start_service("order", wait=False, **SLOW)
        passes(store.client.revision, before + 5)
        assert stop(service) == 0
        left = broker.depth("order")
        assert left.ready > 0, "the backlog was gone before the signal"
        assert left.unacked == 0
    service = start_service("order")
    wait_drained(broker, "order")
    assert terminate(service) == 0
    assert_handled_once("order", store, sent=sent, confirmed=confirmed, at_least=4000)
    assert counters(statsd, "orders")["processed"] == 4000
    assert_counters_add_up(statsd, "orders")


def test_a_call_under_way_is_finished_before_the_exit(
    start_service: StartService,
    broker: Broker,
    store: Store,
    statsd: StatsdListener,
    sink: Sink,
) -> None:
    """The notification that was on its way is recorded; nobody sends it again."""
    service = start_service("notify", NOTIFY_URL=sink.url)
    sink.hold()
    broker.publish(orders(3))
    becomes(lambda: len(sink.calls), 3)
    service.interrupt()
    eventually(lambda: not_ready(service, "running"))
    sink.release()
    assert service.wait_end(WITHIN_S) == 0
    assert len(store.done("notify")) == 3
    assert len(sink.calls) == 3
    assert broker.depth("notify") == (0, 0)
    assert counters(statsd, "notifications") == {"received": 3, "processed": 3}


@pytest.mark.parametrize("handler", ["plain", "coroutine"])
def test_as_many_calls_as_there_can_be_are_finished_before_the_exit(
    start_service: StartService,
    broker: Broker,
    store: Store,
    statsd: StatsdListener,
    tmp_path: Path,
    handler: str,
) -> None:
    """Each is recorded by the process that made it; what waited for a slot is left to the next."""
    script = tmp_path / "service.py"
    script.write_text(_CALLS.format(call_s=CALL_S, handler=handler))
    command = [sys.executable, str(script)]
    service = start_service("notify", command=command, CALLS_AT_ONCE=str(CALLS_AT_ONCE))
    events = orders(2 * CALLS_AT_ONCE)
    broker.publish(events)
    becomes(lambda: len(lines(service, "call begins")), CALLS_AT_ONCE)
    becomes(lambda: statsd.count("notifications_received"), 2 * CALLS_AT_ONCE)
    assert lines(service, "call ends") == []
    assert terminate(service) == 0
    made = sorted(line["event_id"] for line in lines(service, "call begins"))
    assert len(made) == CALLS_AT_ONCE
    assert sorted(line["event_id"] for line in lines(service, "call ends")) == made
    assert sorted(store.done("notify")) == made
    assert store.records("notify").keys() == set(made)
    becomes(lambda: broker.depth("notify"), Depth(CALLS_AT_ONCE, 0))
    becomes(
        lambda: counters(statsd, "notifications"),
        {
            "received": 2 * CALLS_AT_ONCE,
            "processed": CALLS_AT_ONCE,
            "returned": CALLS_AT_ONCE,
        },
    )
    service = start_service("notify", command=command, CALLS_AT_ONCE=str(CALLS_AT_ONCE))
    wait_drained(broker, "notify")
    assert not {line["event_id"] for line in lines(service, "call begins")} & set(made)
    assert_handled_once("notify", store, sent=events, confirmed=events, at_least=2 * CALLS_AT_ONCE)


@pytest.mark.parametrize(("server", "stop"), [("rabbitmq", terminate), ("etcd", interrupt)])
def test_stopped_while_a_server_has_never_been_there(
    start_service: StartService,
    server: Literal["rabbitmq", "etcd"],
    stop: Callable[[Service], int],
) -> None:
    """There is nothing to settle, so it ends at once."""
    port = free_port()
    nowhere = {
        "rabbitmq": {"RABBITMQ_URL": f"amqp://guest:guest@127.0.0.1:{port}/"},
        "etcd": {"ETCD_ENDPOINTS": f"127.0.0.1:{port}"},
    }
    service = start_service("order", wait=False, **nowhere[server])
    eventually(lambda: not_ready(service, server), also=(OSError,))
    assert stop(service) == 0


def test_stopped_while_etcd_is_frozen_with_deliveries_in_hand(
    clean: Servers,
    start_service: StartService,
    broker: Broker,
    store: Store,
    statsd: StatsdListener,
) -> None:
    """What cannot be settled goes back by closing the channel, once, and the next process does it.

    RabbitMQ drops what was delivered too often, so an outage must not cost more than this one.
    """
    names = ("order", "notify")
    running = [start_service(name) for name in names]
    clean.etcd.pause()
    events = orders(30)
    assert len(broker.publish(events)) == 30
    for name in names:
        becomes(partial(broker.depth, name), Depth(0, 30))
    for service in running:
        service.interrupt()
    assert [service.wait_end(WITHIN_S) for service in running] == [0, 0]
    for name, noun in zip(names, ("orders", "notifications"), strict=True):
        assert broker.depth(name) == (30, 0)
        assert times_returned(clean.rabbitmq, name) == [1] * 30
        assert counters(statsd, noun) == {"received": 30, "returned": 30}
    clean.etcd.resume()
    for name in names:
        start_service(name)
    wait_drained(broker, *names)
    for name in names:
        assert_handled_once(name, store, sent=events, confirmed=events, at_least=30)


def test_stopped_while_the_broker_is_frozen(
    clean: Servers, start_service: StartService, broker: Broker, store: Store
) -> None:
    """A broker that does not answer the goodbye does not keep a service from ending."""
    service = start_service("order")
    broker.publish([order("e-1")])
    becomes(lambda: store.done("order"), {"e-1"})
    clean.rabbitmq.pause()
    assert terminate(service) == 0
    clean.rabbitmq.resume()
    start_service("order")
    broker.publish([order("e-2")])
    becomes(lambda: store.done("order"), {"e-1", "e-2"})
    wait_drained(broker, "order")
