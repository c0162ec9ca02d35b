"""A handler that never returns: it is said, it costs nothing but its own, and a restart ends it."""

import sys
from pathlib import Path

from integration.judging import (
    StartService,
    assert_handled_once,
    becomes,
    lines,
    not_ready,
    says,
    wait_drained,
)
from integration.load import ids, order, orders
from servers.broker import Broker, Depth
from servers.services import Health
from servers.store import Store
from servers.wait import eventually

_PURE = """
import sys
import threading

import structlog

from idempotent_consumer import Service

service = Service("order", noun="orders")


@service.handler("new_order")
def hang(event):
    structlog.get_logger().info("hangs")
    threading.Event().wait()


sys.exit(service.run())
"""

_CLAIMED = """
import sys
import threading

from idempotent_consumer import Service

service = Service("notify", noun="notifications")


@service.claimed_handler("new_order", timeout_s=0.5)
def hang_at_one(event, timeout_s):
    if event.id == "hangs":
        threading.Event().wait()


sys.exit(service.run())
"""

_WITHIN_S = 10


def test_a_pure_handler_that_hangs_does_not_keep_its_process_from_ending(
    start_service: StartService, broker: Broker, store: Store, tmp_path: Path
) -> None:
    """It has the loop to itself, so nothing more is settled; the next process has all of it."""
    service = start_service("order", command=_script(tmp_path, _PURE))
    events = orders(3)
    broker.publish(events)
    eventually(lambda: says(service, "hangs"))
    becomes(lambda: broker.depth("order"), Depth(0, 3))
    assert service.terminate(_WITHIN_S) == 0
    assert says(service, "a handler does not return: what is not settled goes back")
    becomes(lambda: broker.depth("order"), Depth(3, 0))
    assert store.records("order") == {}
    start_service("order")
    becomes(lambda: store.done("order"), ids(events))
    wait_drained(broker, "order")
    assert_handled_once("order", store, sent=events, confirmed=events, at_least=3)


def test_a_claimed_handler_that_hangs_is_told_and_the_others_get_done(
    start_service: StartService, broker: Broker, store: Store, tmp_path: Path
) -> None:
    """/livez asks for a restart, which frees the event: its next process claims it anew."""
    service = start_service("notify", command=_script(tmp_path, _CLAIMED))
    before = orders(20, "before")
    broker.publish(before)
    becomes(lambda: store.done("notify"), ids(before))
    assert service.health("/livez") == Health(200, {"alive": True})
    broker.publish([order("hangs")])
    becomes(lambda: service.health("/livez"), Health(503, {"alive": False}))
    not_ready(service, "calls")
    (said,) = eventually(lambda: says(service, "calls do not return; a restart frees their events"))
    assert said["calls"] == 1
    others = orders(40, "beside")
    broker.publish(others)
    becomes(lambda: store.done("notify"), ids(before + others))
    assert store.records("notify")["hangs"].state == "claimed"
    assert service.health("/livez").status == 503
    assert len(lines(service, "calls do not return")) == 1
    assert service.terminate(_WITHIN_S) == 0
    becomes(lambda: broker.depth("notify"), Depth(1, 0))
    start_service("notify")
    becomes(lambda: store.is_done("notify", "hangs"), True)
    wait_drained(broker, "notify")
    events = [*before, order("hangs"), *others]
    assert_handled_once("notify", store, sent=events, confirmed=events, at_least=61)
    assert store.steps("notify")["hangs"] == ["claimed", "gone", "claimed", "done"]


def _script(directory: Path, text: str) -> list[str]:
    """Return the command that runs a service of this text."""
    script = directory / "service.py"
    script.write_text(text)
    return [sys.executable, str(script)]
