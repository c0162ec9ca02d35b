"""Handlers that take long or never return: RabbitMQ keeps the connection, other events go on."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chaos.checks import becomes, lines, not_ready, passes, says, throughout
from chaos.load import ids, order, orders
from chaos.rig import Rig
from servers.broker import Depth
from servers.servers import Servers
from servers.services import Health, Service
from servers.wait import eventually

_SCRIPT = """
import os, sys, threading
import structlog
from idempotent_consumer import Put, Service

log, service = structlog.get_logger(), Service("{name}", noun="{noun}")
{handler}
sys.exit(service.run())
"""

_SLOW = """
@service.handler("new_order")
def place(event):
    threading.Event().wait(float(os.environ["HANDLER_S"]))
    log.info("handled")
    return [Put(f"/orders/{event.id}", b"placed")]
"""

_HANGS_AT_ONE = """
@service.claimed_handler("new_order", timeout_s=0.5)
def hang_at_one(event, timeout_s):
    if event.id == "hangs":
        threading.Event().wait()
"""

_HOLDS_ONE = """
@service.claimed_handler("new_order", timeout_s=60)
def hold_one(event, timeout_s):
    if event.id == "held":
        log.info("holds")
        open(os.environ["GATE"]).read()  # A FIFO: until the test has opened and closed it, too.
"""

BACKLOG = 1000
HEARTBEAT_S = 3
LASTS_S = 5 * HEARTBEAT_S
"""RabbitMQ closes a connection that has been silent for two heartbeats."""

CONSUMER_TIMEOUT_MS = 2_000
WITHIN_S = 10


def start_handler(rig: Rig, name: str, noun: str, handler: str, **settings: str) -> Service:
    script = _SCRIPT.format(name=name, noun=noun, handler=handler)
    return rig.start(name, script=script, **settings)


@pytest.mark.parametrize("handler_s", [0.1, 0.2, 1.0])
def test_a_backlog_for_a_slow_handler_is_recorded_while_it_is_handled(
    rig: Rig, handler_s: float
) -> None:
    """Heartbeats go on, so nothing is requeued."""
    url = f"{rig.servers.rabbitmq.url}?heartbeat={HEARTBEAT_S}"
    settings = {"HANDLER_S": str(handler_s), "RABBITMQ_URL": url}
    service = start_handler(rig, "order", "orders", _SLOW, **settings)

    def keeps_up() -> None:
        returned = len(lines(service, "handled"))
        assert returned - len(rig.store.done("order")) <= 2 + int(5 / handler_s)
        assert service.health("/livez") == Health(200, {"alive": True})

    events = orders(BACKLOG)
    rig.broker.publish(events)
    eventually(lambda: says(service, "handled"))
    throughout(LASTS_S, keeps_up)
    passes(lambda: rig.statsd.count("orders_processed"), 0)
    assert "returned" not in rig.counters("orders")
    assert says(service, "a pure handler took long")[0]["handler"] == "place"
    assert lines(service, "no connection to RabbitMQ") == []
    assert service.terminate(WITHIN_S) == 0
    rig.start("order")
    rig.handled_once("order", events)


def test_a_call_that_hangs_is_logged_and_other_events_are_handled(rig: Rig) -> None:
    """/livez asks for a restart: the next process claims the event again."""
    service = start_handler(rig, "notify", "notifications", _HANGS_AT_ONE)
    rig.broker.publish([order("hangs")])
    becomes(lambda: service.health("/livez"), Health(503, {"alive": False}))
    not_ready(service, "calls")
    others = orders(40)
    rig.broker.publish(others)
    becomes(lambda: rig.store.done("notify"), ids(others))
    assert service.health("/livez").status == 503
    (said,) = says(service, "calls do not return; a restart frees their events")
    assert said["calls"] == 1
    assert service.terminate(WITHIN_S) == 0
    becomes(lambda: rig.broker.depth("notify"), Depth(1, 0))
    rig.start("notify")
    rig.handled_once("notify", [order("hangs"), *others])
    assert rig.store.steps("notify")["hangs"] == ["claimed", "gone", "claimed", "done"]


@pytest.fixture
def short_timeout(clean: Servers) -> Iterator[None]:
    """Set a short consumer time-out for notify's queue by a policy."""
    found: Any = clean.rabbitmq.management("GET", "/api/overview")
    version = found["rabbitmq_version"]
    if tuple(map(int, version.split(".")[:2])) < (4, 3):
        pytest.skip(f"RabbitMQ {version} looks for overdue deliveries only once a minute")
    definition = f'{{"consumer-timeout": {CONSUMER_TIMEOUT_MS}}}'
    clean.rabbitmq.ctl("set_policy", "short", "^notify$", definition, "--apply-to", "queues")
    yield
    clean.rabbitmq.ctl("clear_policy", "short")


@pytest.mark.usefixtures("short_timeout")
def test_a_call_that_takes_longer_than_the_consumer_timeout_is_made_once(
    rig: Rig, tmp_path: Path
) -> None:
    """The log says why its event is redelivered, which then joins the call."""
    os.mkfifo(gate := tmp_path / "gate")
    service = start_handler(rig, "notify", "notifications", _HOLDS_ONE, GATE=str(gate))
    rig.broker.publish([order("held")])
    eventually(lambda: says(service, "deliveries went back to the broker and will come again"))
    # This line follows, so it may not be there yet.
    why = eventually(lambda: says(service, "no connection to RabbitMQ"))[0]["error"]
    assert "the broker cancelled the consumer, whose queue is still there" in why
    assert "consumer_timeout (the oldest for " in why
    others = orders(40, "beside")
    rig.broker.publish(others)
    becomes(lambda: rig.store.done("notify"), ids(others))
    assert rig.store.records("notify")["held"] == "claimed"
    gate.write_text("")
    becomes(lambda: rig.store.is_done("notify", "held"), True)
    rig.handled_once("notify", [order("held"), *others])
    assert rig.store.steps("notify")["held"] == ["claimed", "done"]
    assert len(lines(service, "holds")) == 1
    assert rig.broker.ready("notify.dead-letter") == 0
