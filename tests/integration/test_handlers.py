"""Handlers that take long, never return, or outlast RabbitMQ's time-out: others get done."""

import os
from collections.abc import Iterator
from itertools import pairwise
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
    threading.Event().wait(float(os.environ["HANDLER_S"]))  # For an answer that does not come.
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
        open(os.environ["GATE"]).read()  # A FIFO: until the test has opened it too, and closed it.
"""

BACKLOG = 1000
HEARTBEAT_S = 3
LASTS_S = 5 * HEARTBEAT_S
"""A broker gives up a connection that has been silent for two heartbeats."""

CONSUMER_TIMEOUT_MS = 2_000
WITHIN_S = 10


def start_handler(rig: Rig, name: str, noun: str, handler: str, **settings: str) -> Service:
    script = _SCRIPT.format(name=name, noun=noun, handler=handler)
    return rig.start(name, script=script, **settings)


@pytest.mark.parametrize("handler_s", [0.1, 0.2, 1.0])
def test_a_backlog_for_a_slow_handler_is_recorded_and_acked_as_it_is_handled(
    rig: Rig, handler_s: float
) -> None:
    """Heartbeats go on, so nothing is requeued; it is alive; and a warning says what is slow."""
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
    # Without the bound on a turn nothing would be recorded before the backlog's end.
    throughout(LASTS_S, keeps_up)
    passes(lambda: rig.statsd.count("orders_processed"), 0)
    assert "returned" not in rig.counters("orders")
    warnings = lines(service, "a pure handler took long")
    assert {(line["level"], line["handler"]) for line in warnings} == {("warning", "place")}
    seconds = [line["seconds"] for line in warnings]
    assert handler_s <= seconds[0]
    # A loaded machine can hold a call up: only one that takes twice as long is warned about again.
    assert all(later >= 1.99 * sooner for sooner, later in pairwise(seconds))
    assert lines(service, "no connection to RabbitMQ") == []
    assert service.terminate(WITHIN_S) == 0
    rig.start("order")
    rig.handled_once("order", events)


def test_a_claimed_handler_that_hangs_is_told_and_the_others_get_done(rig: Rig) -> None:
    """/livez asks for a restart, which frees the event: its next process claims it again."""
    service = start_handler(rig, "notify", "notifications", _HANGS_AT_ONE)
    before = orders(20, "before")
    rig.broker.publish(before)
    becomes(lambda: rig.store.done("notify"), ids(before))
    assert service.health("/livez") == Health(200, {"alive": True})
    rig.broker.publish([order("hangs")])
    becomes(lambda: service.health("/livez"), Health(503, {"alive": False}))
    not_ready(service, "calls")
    (said,) = eventually(lambda: says(service, "calls do not return; a restart frees their events"))
    assert said["calls"] == 1
    others = orders(40, "beside")
    rig.broker.publish(others)
    becomes(lambda: rig.store.done("notify"), ids(before + others))
    assert rig.store.records("notify")["hangs"] == "claimed"
    assert service.health("/livez").status == 503
    assert len(lines(service, "calls do not return")) == 1
    assert service.terminate(WITHIN_S) == 0
    becomes(lambda: rig.broker.depth("notify"), Depth(1, 0))
    rig.start("notify")
    becomes(lambda: rig.store.is_done("notify", "hangs"), True)
    events = [*before, order("hangs"), *others]
    rig.handled_once("notify", events)
    assert rig.store.steps("notify")["hangs"] == ["claimed", "gone", "claimed", "done"]


@pytest.fixture
def short_timeout(clean: Servers) -> Iterator[None]:
    """Give notify's queue a short consumer time-out, by a policy."""
    found: Any = clean.rabbitmq.management("GET", "/api/overview")
    version = found["rabbitmq_version"]
    if tuple(map(int, version.split(".")[:2])) < (4, 3):
        pytest.skip(f"RabbitMQ {version} looks for overdue deliveries once a minute only")
    definition = f'{{"consumer-timeout": {CONSUMER_TIMEOUT_MS}}}'
    clean.rabbitmq.ctl("set_policy", "short", "^notify$", definition, "--apply-to", "queues")
    yield
    clean.rabbitmq.ctl("clear_policy", "short")


@pytest.mark.usefixtures("short_timeout")
def test_a_delivery_that_outlasts_the_consumer_timeout_is_neither_lost_nor_handled_twice(
    rig: Rig, tmp_path: Path
) -> None:
    """The log says why; other events are handled meanwhile; the call that goes on is joined."""
    os.mkfifo(gate := tmp_path / "gate")
    service = start_handler(rig, "notify", "notifications", _HOLDS_ONE, GATE=str(gate))
    rig.broker.publish([order("held")])
    eventually(lambda: says(service, "deliveries went back to the broker and will come again"))
    # The next line, and so not always there with this one.
    why = eventually(lambda: says(service, "no connection to RabbitMQ"))[0]["error"]
    assert "the broker cancelled the consumer, whose queue is still there" in why
    assert "consumer_timeout (the oldest for " in why
    others = orders(40, "beside")
    rig.broker.publish(others)
    becomes(lambda: rig.store.done("notify"), ids(others))
    assert rig.store.records("notify")["held"] == "claimed"
    gate.write_text("")
    becomes(lambda: rig.store.is_done("notify", "held"), True)
    events = [order("held"), *others]
    rig.handled_once("notify", events)
    assert rig.store.steps("notify")["held"] == ["claimed", "done"]
    assert len(lines(service, "holds")) == 1
    assert rig.broker.ready("notify.dead-letter") == 0
