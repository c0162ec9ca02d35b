"""Crash points: a service that kills itself at a named step.

    cd order && CRASH_POINT="txn sent:2" ../.venv/bin/python -m chaos.crash_points order

runs the service as `python -m order` does, and ends it with SIGKILL where it passes that step for
the second time. Nothing in the library knows of this: the one function at which the step happens
is wrapped from outside, before the service starts, so where the variable is unset nothing is
wrapped, and the image of a service does not even hold this file.
"""

import asyncio
import functools
import importlib
import inspect
import itertools
import json
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, Literal

from servers.etcd import EtcdClient

VARIABLE = "CRASH_POINT"
PROOF = "killed at a crash point: "


@dataclass(frozen=True)
class Call:
    """A call of the wrapped function: its arguments by name, and its answer, where there is one."""

    arguments: Mapping[str, Any]
    answer: Any = None


@dataclass(frozen=True)
class Point:
    """Where a step is, by a function of the library's or pika's, and when a call passes it.

    It is about to run: "before". It has returned: "after"; of a coroutine function that is what
    its body returns. It waits, so what it has asked for is on its way: "waiting". The future that
    it has returned has its result: "resolved".

    ``counts`` says which calls pass the step. ``reaches`` tells the passage that a call comes to,
    where one call is several; else each is one more. ``last_act`` is done at the passage that
    kills, for what the function leaves to be done a moment later, and returns what the proof is
    to hold.
    """

    when: Literal["before", "after", "waiting", "resolved"]
    where: str
    counts: Callable[[Call], bool] = lambda _: True
    reaches: Callable[[Call], int] | None = None
    last_act: Callable[[Call], dict[str, object]] = lambda _: {}


# What the proof of some points holds, and what some have to wait for.


def _shows(name: str, path: str) -> Callable[[Call], dict[str, object]]:
    """Let the proof hold a part of an argument, such as `event.id`."""

    def part(call: Call) -> dict[str, object]:
        found = attrgetter(path)(SimpleNamespace(**call.arguments))
        return {name: found.decode() if isinstance(found, bytes) else found}

    return part


def _ours(call: Call) -> bool:
    return bool(call.arguments["ours"])


def _made(call: Call) -> bool:
    """Tell whether a call was made: there may have been no time left for it."""
    return call.answer is not None


def _confirmed(call: Call) -> bool:
    return call.answer is True


def _tag(call: Call) -> int:
    tag: int = call.arguments["delivery_tag"]
    return tag


def _acked(call: Call) -> dict[str, object]:
    tag, multiple = call.arguments["delivery_tag"], call.arguments["multiple"]
    return {"acked": tag if multiple else 1}


def _acked_and_sent(call: Call) -> dict[str, object]:
    """Send the ack: it lies in buffers, and comes to the socket in one of the next turns."""
    connection = call.arguments["self"].connection
    getattr(connection, "_write", lambda: None)()  # What waits for the end of the turn.
    transport = connection._transport  # noqa: SLF001
    while transport.get_write_buffer_size():
        with suppress(BlockingIOError):
            transport._produce()  # noqa: SLF001
    return _acked(call)


def _puts_records(call: Call) -> bool:
    return call.arguments["method"] == "Txn" and bool(_records(call.arguments["request"]))


def _applied(call: Call) -> bool:
    """Tell whether this is the reply to a transaction that has put a record."""
    return _puts_records(call) and bool(call.answer.succeeded)


def _records(request: Any) -> list[str]:
    puts = (operation.request_put.key.decode() for operation in request.success)
    return [key for key in puts if key.startswith("/service/")]


def _seen_in_etcd(call: Call) -> dict[str, object]:
    """Read one record of the transaction from etcd, by a client that is not the library's."""
    key = _records(call.arguments["request"])[0]
    (found,) = EtcdClient(os.environ["ETCD_ENDPOINTS"]).get(key)[:1]
    return {"key": found.key, "revision": found.mod_revision}


_EVENT, _FLIGHT = _shows("id", "event.id"), _shows("id", "flight.event.id")
_CALL, _SEND, _ACK = (
    "etcd:Client.call",
    "publisher:Publisher.send",
    "pika.channel:Channel.basic_ack",
)

POINTS: dict[str, Point] = {
    # pika has handed a delivery over.
    "received": Point("after", "bus:Epoch.arrived"),
    "decoded": Point("after", "bus:Delivery.event"),
    # A pure handler, on the loop's thread; its effects exist nowhere else when it is left.
    "handler entered": Point("before", "calls:Calls.run", last_act=_EVENT),
    "handler left": Point("after", "calls:Calls.run", last_act=_EVENT),
    # The batch takes no more; nothing has been sent.
    "batch sealed": Point("before", "ledger:EtcdLedger.commit"),
    # gRPC has the transaction: it may apply or not.
    "txn sent": Point("waiting", _CALL, counts=_puts_records),
    # gRPC has the reply, before the ledger hears of it.
    "applied but reply unread": Point("after", _CALL, counts=_applied, last_act=_seen_in_etcd),
    # The reply is judged, and nothing has been done about it.
    "reply read": Point("after", "ledger:EtcdLedger.commit"),
    # One ack covers what has been settled meanwhile: how many that are is the commits' luck.
    "before ack": Point("before", _ACK, reaches=_tag, last_act=_acked),
    "after ack": Point("after", _ACK, reaches=_tag, last_act=_acked_and_sent),
    "before park": Point(
        "before", "settle:forwarded_message", last_act=_shows("body", "delivery.body")
    ),
    # The broker has confirmed the dead letter; its delivery is not acked.
    "after park": Point(
        "resolved", _SEND, counts=_confirmed, last_act=_shows("body", "message.body")
    ),
    # The record is there with its events; none of them has been sent.
    "events recorded": Point("before", "flow:Consumer._publish", last_act=_FLIGHT),
    # pika has an event: it may arrive at the broker or not.
    "event sent": Point("after", _SEND),
    # The broker has it, and the record still says publishing.
    "event confirmed": Point("resolved", _SEND, counts=_confirmed),
    # The claim has landed; its call has not begun.
    "claim taken": Point("before", "calls:Calls.call", last_act=_EVENT),
    # A claimed handler has returned, and nothing has been done about it.
    "call made": Point("after", "calls:Calls.call", counts=_made, last_act=_EVENT),
    # The record is done in place of the claim; nothing has been acked.
    "claim completed": Point("before", "settle:Settler.recorded", counts=_ours, last_act=_EVENT),
}


def find(point: Point) -> tuple[Any, str, Callable[..., Any]]:
    """Return the point's function, what holds it, and its name there.

    Raises LookupError where the library has no such function, or it does not wait any more.
    """
    module, _, path = point.where.partition(":")
    *owners, name = path.split(".")
    within = module if module.startswith("pika.") else f"idempotent_consumer.{module}"
    try:
        owner = functools.reduce(getattr, owners, importlib.import_module(within))
        function = getattr(owner, name)
    except (ImportError, AttributeError) as error:
        raise LookupError(f"{point.where} is no longer there: {error}") from error
    if point.when == "waiting" and not inspect.iscoroutinefunction(function):
        raise LookupError(f"{point.where} is no longer a coroutine function")
    return owner, name, function


def plant(point: Point, reached: Callable[[Call], None]) -> None:
    """Wrap the point's function so that `reached` is called at each passage; raises LookupError."""
    owner, name, function = find(point)
    signature = inspect.signature(function)

    def begins(*args: Any, **kwargs: Any) -> Call:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        call = Call(dict(bound.arguments))
        passes("before", call)
        if point.when == "waiting":
            # Its body runs at once, until it waits; gRPC takes a request over in the turn after
            # that, in a task of its own, which is in the line ahead of the second of these.
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, passes, "waiting", call)
        return call

    def passes(when: str, call: Call) -> None:
        if point.when == when and point.counts(call):
            reached(call)

    @functools.wraps(function)
    def plain(*args: Any, **kwargs: Any) -> Any:
        call = begins(*args, **kwargs)
        answer = function(*args, **kwargs)
        passes("after", Call(call.arguments, answer))
        if point.when == "resolved":
            # The first of its callbacks: whoever waits for it adds another, which comes later.
            answer.add_done_callback(
                lambda future: passes("resolved", Call(call.arguments, future.result()))
            )
        return answer

    @functools.wraps(function)
    async def coroutine(*args: Any, **kwargs: Any) -> Any:
        call = begins(*args, **kwargs)
        answer = await function(*args, **kwargs)
        passes("after", Call(call.arguments, answer))
        return answer

    setattr(owner, name, coroutine if inspect.iscoroutinefunction(function) else plain)


def kill_at(setting: str) -> None:
    """Wrap what the setting, such as `txn sent:2`, names, to end this process at that passage.

    Raises LookupError where there is no such point, or where the library does not have it.
    """
    found = re.fullmatch(r"(.+):([1-9][0-9]*)", setting)
    if found is None or found[1] not in POINTS:
        raise LookupError(f"{setting!r} is not one of these with a number: {', '.join(POINTS)}")
    name, number = found[1], int(found[2])
    point, passages = POINTS[name], itertools.count(1)

    def reached(call: Call) -> None:
        passage = point.reaches(call) if point.reaches else next(passages)
        if passage >= number:
            proof = {"point": name, "passage": number, **point.last_act(call)}
            os.write(2, f"\n{PROOF}{json.dumps(proof)}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    plant(point, reached)


def main() -> None:
    """Run the service that the command line names, to the crash point where one is set."""
    (service,) = sys.argv[1:]
    setting = os.environ.get(VARIABLE)
    if setting:
        try:
            kill_at(setting)
        except LookupError as error:
            sys.exit(f"{VARIABLE}: {error}")
    runpy.run_module(service, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
