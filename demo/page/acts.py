"""The acts as the page plays them: the README's four, and one fault of another page.

Each says what it does, does it by the same buttons, and goes on when the board shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from demo.page.board import Lane
from demo.page.controls import Controls
from demo.stage import SERVICES

Act = Callable[[Controls], Coroutine[Any, Any, None]]

_CALLS = 30
"""More than the failures in a row that open the circuit breaker."""

KILLED = (
    "Killed: a call is repeated only if the process died between the call and its record. "
    "The replica that gets the event next calls again once the dead process's lease has ended."
)
"""The sentences of docs/when-can-my-code-run-twice.md."""


def add_acts(controls: Controls) -> None:
    """Give the page its acts, by the names of their buttons."""
    acts: dict[str, tuple[str, Act]] = {
        "act1": ("Act 1", one_event_two_services),
        "act2": ("Act 2", notify_is_down),
        "act3": ("Act 3", the_same_again),
        "act4": ("Act 4", the_receiver_is_down),
        "fault": ("The fault", killed_in_its_call),
    }
    for name, (title, play) in acts.items():
        controls.add(name, title, partial(play, controls))


async def one_event_two_services(controls: Controls) -> None:
    """Act 1."""
    controls.say("Act 1: one event. Each service has a queue of its own, and gets its copy.")
    done = _done(controls, 1)
    await controls.publish("new")
    await controls.until(done)
    controls.say("Act 1: both have it. The producer knows neither of them.")


async def notify_is_down(controls: Controls) -> None:
    """Act 2."""
    controls.say("Act 2: notify is stopped.")
    await controls.process("stop", "notify-1")
    controls.say("Act 2: an event while notify is down. Producer and order do not notice.")
    done, order_has_it = _done(controls, 1), _done(controls, 1, "order")
    await controls.publish("new")
    await controls.until(lambda: order_has_it() and _lane(controls, "notify").ready >= 1)
    controls.say("Act 2: order has it. The queue keeps notify's copy. notify is started again.")
    await controls.process("start", "notify-1")
    await controls.until(done)
    controls.say("Act 2: notify has caught up by itself, and nothing is lost.")


async def the_same_again(controls: Controls) -> None:
    """Act 3."""
    controls.say("Act 3: without memory (ENABLE_ETCD=false), one event three times.")
    await controls.memory(False)
    await controls.until(partial(_without_memory, controls))
    done = _done(controls, 3)
    await _three_times(controls)
    await controls.until(done)
    controls.say("Act 3: processed three times. That is what double counts. Now with memory.")
    await controls.memory(True)
    done, skipped = _done(controls, 1), _skipped(controls, 2)
    await _three_times(controls)
    await controls.until(lambda: done() and skipped())
    controls.say("Act 3: recorded once, skipped twice. Now order is killed and started again.")
    for verb in ("kill", "start"):
        await controls.process(verb, "order-1")
    skipped = _skipped(controls, 1)
    await controls.publish("again")
    await controls.until(skipped)
    controls.say("Act 3: still skipped, for the record is in etcd and not in the process.")


async def the_receiver_is_down(controls: Controls) -> None:
    """Act 4."""
    controls.say("Act 4: the receiver that notify calls is down.")
    await controls.receiver("down")
    done, order_has_them = _done(controls, _CALLS), _done(controls, _CALLS, "order")
    await controls.publish("new", _CALLS)
    await controls.until(lambda: order_has_them() and _is_missing(controls, "notify-1"))
    controls.say("Act 4: the calls fail, and notify's circuit breaker opens. Nothing is parked.")
    await controls.receiver("well")
    controls.say("Act 4: the receiver is back. The next probe closes the circuit breaker.")
    await controls.until(done, 90)
    controls.say(f"Act 4: all {_CALLS} are called for.")


async def killed_in_its_call(controls: Controls) -> None:
    """Kill notify between its call and the record of it."""
    controls.say(f"{KILLED} First, the receiver becomes slow.")
    await controls.receiver("slow")
    calls, repeated = controls.board.calls, controls.board.repeated_calls
    done = _done(controls, 1)
    await controls.publish("new")
    await controls.until(lambda: controls.board.calls > calls)
    await controls.process("kill", "notify-1")
    controls.say(f"{KILLED} notify was killed in its call: the receiver has it, etcd does not.")
    await controls.receiver("well")
    await controls.process("start", "notify-1")
    await controls.until(lambda: done() and controls.board.repeated_calls > repeated)
    controls.say(f"{KILLED} It came again with the same key, so the receiver has dropped it.")


async def _three_times(controls: Controls) -> None:
    await controls.publish("new")
    await controls.publish("again", 2)


def _lane(controls: Controls, service: str) -> Lane:
    return controls.board.lanes[service]


def _done(controls: Controls, more: int, *services: str) -> Callable[[], bool]:
    """Return what tells whether each service has processed so many more than now."""
    lanes = [_lane(controls, service) for service in services or SERVICES]
    wanted = [lane.times.total() + more for lane in lanes]
    return lambda: all(
        lane.times.total() >= total for lane, total in zip(lanes, wanted, strict=True)
    )


def _skipped(controls: Controls, more: int) -> Callable[[], bool]:
    wanted = _lane(controls, "order").skipped + more
    return lambda: _lane(controls, "order").skipped >= wanted


def _is_missing(controls: Controls, name: str) -> bool:
    process = controls.board.processes.get(name)
    return process is not None and bool(process.missing)


def _without_memory(controls: Controls) -> bool:
    services = [each for each in controls.board.processes.values() if each.service in SERVICES]
    return not any(each.remembers for each in services)
