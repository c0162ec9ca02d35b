"""A delivery that outlasts RabbitMQ's consumer time-out: its consumer is cancelled."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.judging import (
    StartService,
    assert_handled_once,
    becomes,
    lines,
    says,
    wait_drained,
)
from integration.load import ids, order, orders
from servers.broker import Broker
from servers.servers import Servers
from servers.store import Store
from servers.wait import eventually

_TIMEOUT_MS = 2_000

_HOLDS = """
import sys

import structlog

from idempotent_consumer import Service

service = Service("notify", noun="notifications")


@service.claimed_handler("new_order", timeout_s=60)
def hold_one(event, timeout_s):
    if event.id == "held":
        structlog.get_logger().info("holds")
        open(sys.argv[1]).read()  # A FIFO: until the test has opened it too, and closed it.


sys.exit(service.run())
"""


@pytest.fixture
def short_timeout(clean: Servers) -> Iterator[None]:
    """Give notify's queue a short consumer time-out, by a policy."""
    found: Any = clean.rabbitmq.management("GET", "/api/overview")
    version = found["rabbitmq_version"]
    if tuple(map(int, version.split(".")[:2])) < (4, 3):
        pytest.skip(f"RabbitMQ {version} looks for overdue deliveries once a minute only")
    definition = f'{{"consumer-timeout": {_TIMEOUT_MS}}}'
    clean.rabbitmq.ctl("set_policy", "short", "^notify$", definition, "--apply-to", "queues")
    yield
    clean.rabbitmq.ctl("clear_policy", "short")


@pytest.mark.usefixtures("short_timeout")
def test_a_delivery_that_outlasts_the_consumer_timeout_is_neither_lost_nor_handled_twice(
    start_service: StartService, broker: Broker, store: Store, tmp_path: Path
) -> None:
    """The log says why; other events are handled meanwhile; the call that goes on is joined."""
    gate, script = tmp_path / "gate", tmp_path / "service.py"
    os.mkfifo(gate)
    script.write_text(_HOLDS)
    service = start_service("notify", command=[sys.executable, str(script), str(gate)])
    broker.publish([order("held")])
    eventually(lambda: says(service, "deliveries went back to the broker and will come again"))
    why = lines(service, "no connection to RabbitMQ")[0]["error"]
    assert "the broker cancelled the consumer, whose queue is still there" in why
    assert "consumer_timeout (the oldest for " in why
    others = orders(40, "beside")
    broker.publish(others)
    becomes(lambda: store.done("notify"), ids(others))
    assert store.records("notify")["held"].state == "claimed"
    gate.write_text("")
    becomes(lambda: store.is_done("notify", "held"), True)
    wait_drained(broker, "notify")
    events = [order("held"), *others]
    assert_handled_once("notify", store, sent=events, confirmed=events, at_least=41)
    assert store.steps("notify")["held"] == ["claimed", "done"]
    assert len(lines(service, "holds")) == 1
    assert broker.ready("notify.dead-letter") == 0
