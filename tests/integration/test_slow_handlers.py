"""A pure handler that takes long slows its service down, and holds nothing else up."""

import sys
from functools import partial
from pathlib import Path

import pytest

from integration.judging import (
    StartService,
    assert_handled_once,
    counters,
    lines,
    passes,
    throughout,
    wait_drained,
)
from integration.load import orders
from servers.broker import Broker
from servers.servers import Servers
from servers.services import Health, Service
from servers.statsd import StatsdListener
from servers.store import Store

_SLOW = """
import os
import sys
import time

import structlog

from idempotent_consumer import Put, Service

service = Service("order", noun="orders")


@service.handler("new_order")
def place(event):
    time.sleep(float(os.environ["HANDLER_S"]))
    structlog.get_logger().info("handled")
    return [Put(f"/orders/{event.id}", b"placed")]


sys.exit(service.run())
"""

BACKLOG = 1000
HEARTBEAT_S = 3
LASTS_S = 5 * HEARTBEAT_S
"""A broker gives up a connection that has been silent for two heartbeats."""

WITHIN_S = 10


@pytest.mark.parametrize("handler_s", [0.1, 0.2, 1.0])
def test_a_backlog_for_a_slow_handler_is_recorded_and_acked_as_it_is_handled(
    clean: Servers,
    start_service: StartService,
    broker: Broker,
    store: Store,
    statsd: StatsdListener,
    tmp_path: Path,
    handler_s: float,
) -> None:
    """Heartbeats go on, so nothing is requeued; it is alive; and one warning says what is slow."""
    script = tmp_path / "service.py"
    script.write_text(_SLOW)
    service = start_service(
        "order",
        command=[sys.executable, str(script)],
        HANDLER_S=str(handler_s),
        RABBITMQ_URL=f"{clean.rabbitmq.url}?heartbeat={HEARTBEAT_S}",
    )
    events = orders(BACKLOG)
    broker.publish(events)
    passes(lambda: handled(service), 0)
    throughout(LASTS_S, partial(keeps_up, service, store, most_unrecorded=2 + int(1 / handler_s)))
    passes(lambda: statsd.count("orders_processed"), 0)
    assert "returned" not in counters(statsd, "orders")
    (warning,) = lines(service, "a pure handler took long")
    assert warning["level"] == "warning"
    assert warning["handler"] == "place"
    assert handler_s <= warning["seconds"] < handler_s + 1
    assert lines(service, "no connection to RabbitMQ") == []
    assert service.terminate(WITHIN_S) == 0
    start_service("order")
    wait_drained(broker, "order")
    assert_handled_once("order", store, sent=events, confirmed=events, at_least=BACKLOG)


def handled(service: Service) -> int:
    """Return how many events its handler has returned for."""
    return len(lines(service, "handled"))


def keeps_up(service: Service, store: Store, most_unrecorded: int) -> None:
    """Raise AssertionError unless what is handled is recorded soon, and the process is alive."""
    returned = handled(service)
    assert returned - len(store.done("order")) <= most_unrecorded
    assert service.health("/livez") == Health(200, {"alive": True})
