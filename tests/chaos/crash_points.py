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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, Literal

from servers.etcd import EtcdClient

VARIABLE = "CRASH_POINT"
PROOF = "killed at a crash point: "


@dataclass(frozen=True)
class Point:
    """Where a step is, by a function of the library's or pika's, and when a call passes it.

    It is about to run: "before". It has returned: "after"; of a coroutine function that is what
    its body returns. It waits, so what it has asked for is on its way: "waiting". The future that
    it has returned has its result: "resolved".

    A call has the function's arguments as its attributes, and ``answer`` where there is one.
    ``counts`` says which calls pass the step. ``reaches`` tells the passage that a call comes to,
    where one call is several; else each is one more. ``last_act`` is done at the passage that
    kills, for what the function leaves to be done a moment later, and returns what the proof is
    to hold.
    """

    when: Literal["before", "after", "waiting", "resolved"]
    where: str
    counts: Callable[[Any], object] = lambda _: True
    reaches: Callable[[Any], int] | None = None
    last_act: Callable[[Any], dict[str, object]] = lambda _: {}


# What the proof of some points holds, and what some have to wait for.


def _id(of: str) -> Callable[[Any], dict[str, object]]:
    return lambda call: {"id": attrgetter(of)(call).id}


def _body(of: str) -> Callable[[Any], dict[str, object]]:
    return lambda call: {"body": getattr(call, of).body.decode()}


def _acked(call: Any) -> dict[str, object]:
    return {"acked": call.delivery_tag if call.multiple else 1}


def _acked_and_sent(call: Any) -> dict[str, object]:
    """Send the ack: it lies in buffers, and comes to the socket in one of the next turns."""
    connection = call.self.connection
    getattr(connection, "_write", lambda: None)()  # What waits for the end of the turn.
    transport = connection._transport  # noqa: SLF001
    while transport.get_write_buffer_size():
        with suppress(BlockingIOError):
            transport._produce()  # noqa: SLF001
    return _acked(call)


def _records(call: Any) -> list[str]:
    """Return the keys of the records that a call to etcd puts."""
    puts = call.request.success if call.method == "Txn" else ()
    keys = (operation.request_put.key.decode() for operation in puts)
    return [key for key in keys if key.startswith("/service/")]


def _seen_in_etcd(call: Any) -> dict[str, object]:
    """Read one record of the transaction from etcd, by a client that is not the library's."""
    (found,) = EtcdClient(os.environ["ETCD_ENDPOINTS"]).get(_records(call)[0])[:1]
    return {"key": found.key, "revision": found.mod_revision}


_EVENT = _id("event")
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
    "txn sent": Point("waiting", _CALL, counts=_records),
    # gRPC has the reply, before the ledger hears of it.
    "applied but reply unread": Point(
        "after",
        _CALL,
        counts=lambda call: _records(call) and call.answer.succeeded,
        last_act=_seen_in_etcd,
    ),
    # The reply is judged, and nothing has been done about it.
    "reply read": Point("after", "ledger:EtcdLedger.commit"),
    # One ack covers what has been settled meanwhile: how many that are is the commits' luck.
    "before ack": Point("before", _ACK, reaches=attrgetter("delivery_tag"), last_act=_acked),
    "after ack": Point("after", _ACK, reaches=attrgetter("delivery_tag"), last_act=_acked_and_sent),
    "before park": Point("before", "settle:forwarded_message", last_act=_body("delivery")),
    # The broker has confirmed the dead letter; its delivery is not acked.
    "after park": Point("resolved", _SEND, counts=attrgetter("answer"), last_act=_body("message")),
    # The record is there with its events; none of them has been sent.
    "events recorded": Point("before", "flow:Consumer._publish", last_act=_id("flight.event")),
    # pika has an event: it may arrive at the broker or not.
    "event sent": Point("after", _SEND),
    # The broker has it, and the record still says publishing.
    "event confirmed": Point("resolved", _SEND, counts=attrgetter("answer")),
    # The claim has landed; its call has not begun.
    "claim taken": Point("before", "calls:Calls.call", last_act=_EVENT),
    # A claimed handler has returned, and nothing has been done about it.
    "call made": Point(
        "after", "calls:Calls.call", counts=lambda call: call.answer is not None, last_act=_EVENT
    ),
    # The record is done in place of the claim; nothing has been acked.
    "claim completed": Point(
        "before", "settle:Settler.recorded", counts=attrgetter("ours"), last_act=_EVENT
    ),
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


def plant(point: Point, reached: Callable[[Any], None]) -> None:
    """Wrap the point's function so that `reached` is called at each passage; raises LookupError."""
    owner, name, function = find(point)
    signature = inspect.signature(function)

    def passes(when: str, call: Any, answer: Any = None) -> None:
        call.answer = answer
        if point.when == when and point.counts(call):
            reached(call)

    def begins(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        passes("before", call := SimpleNamespace(**bound.arguments))
        return call

    @functools.wraps(function)
    def plain(*args: Any, **kwargs: Any) -> Any:
        call, answer = begins(*args, **kwargs), function(*args, **kwargs)
        passes("after", call, answer)
        if point.when == "resolved":
            # The first of its callbacks: whoever waits for it adds another, which comes later.
            answer.add_done_callback(lambda future: passes("resolved", call, future.result()))
        return answer

    @functools.wraps(function)
    async def coroutine(*args: Any, **kwargs: Any) -> Any:
        call = begins(*args, **kwargs)
        if point.when == "waiting":
            # Its body runs at once, until it waits; gRPC takes a request over in the turn after
            # that, in a task of its own, which is in the line ahead of the second of these.
            loop = asyncio.get_running_loop()
            loop.call_soon(lambda: loop.call_soon(passes, "waiting", call))
        answer = await function(*args, **kwargs)
        passes("after", call, answer)
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

    def reached(call: Any) -> None:
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
