"""Crash points: a service that kills itself at a named step.

    cd order && CRASH_POINT="txn sent:2" PYTHONPATH=../tests python -m chaos.crash_points order

runs the service as `python -m order` does, and ends it with SIGKILL where it passes that step for
the second time. Nothing in the library knows of this: the one function at which the step happens
is wrapped from outside, before the service starts, so where the variable is unset nothing is
wrapped, and the image of a service does not even hold this file.
"""

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
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from harness.etcd import EtcdClient

VARIABLE = "CRASH_POINT"
PROOF = "killed at a crash point: "

_LIBRARY = "idempotent_consumer"


@dataclass(frozen=True)
class Call:
    """A call of the wrapped function: its arguments by name, and what its callback was given."""

    arguments: Mapping[str, Any]
    answer: tuple[Any, ...] = ()


def _true(_: Call) -> bool:
    return True


def _nothing(_: Call) -> dict[str, object]:
    return {}


@dataclass(frozen=True)
class Point:
    """Where a step is: before or after a function's run, or before the run of its ``callback``.

    ``counts`` says which calls pass the step. ``reaches`` tells the passage that a call comes to,
    where one call is several; else each is one more. ``last_act`` is done at the passage that
    kills, for what the function leaves to be done a moment later, and returns what the proof is
    to hold.
    """

    where: str
    when: str
    callback: str = ""
    counts: Callable[[Call], bool] = _true
    reaches: Callable[[Call], int] | None = None
    last_act: Callable[[Call], dict[str, object]] = _nothing


def before(where: str, **more: Any) -> Point:
    """Return the point at which a function is about to run."""
    return Point(where, "before", **more)


def after(where: str, **more: Any) -> Point:
    """Return the point at which a function has returned (one that raises does not pass it)."""
    return Point(where, "after", **more)


def answered(where: str, callback: str, **more: Any) -> Point:
    """Return the point at which a function's callback, a parameter of it, is about to run."""
    return Point(where, "answered", callback, **more)


# What the proof of some points holds, and what some have to wait for.


def _event(call: Call) -> dict[str, object]:
    return {"id": call.arguments["event"].id}


def _task(call: Call) -> dict[str, object]:
    return {"id": call.arguments["task"].event.id}


def _ours(call: Call) -> bool:
    return bool(call.arguments["ours"])


def _body(call: Call) -> dict[str, object]:
    return {"body": call.arguments["delivery"].body.decode()}


def _tag(call: Call) -> int:
    tag: int = call.arguments["delivery_tag"]
    return tag


def _acked(call: Call) -> dict[str, object]:
    tag, multiple = call.arguments["delivery_tag"], call.arguments["multiple"]
    return {"acked": tag if multiple else 1}


def _acked_and_sent(call: Call) -> dict[str, object]:
    """Send the ack: pika writes it to its buffer, and to the socket in the loop's next turn."""
    transport = call.arguments["self"].connection._transport  # noqa: SLF001
    while transport.get_write_buffer_size():
        with suppress(BlockingIOError):
            transport._produce()  # noqa: SLF001
    return _acked(call)


def _applied(call: Call) -> bool:
    """Tell whether this is the reply to a transaction that has put a record."""
    reply, _error = call.answer
    return (
        call.arguments["method"] == "Txn"
        and reply is not None
        and bool(reply.succeeded and _records(call.arguments["request"]))
    )


def _records(request: Any) -> list[str]:
    puts = (operation.request_put.key.decode() for operation in request.success)
    return [key for key in puts if key.startswith("/service/")]


def _seen_in_etcd(call: Call) -> dict[str, object]:
    """Read one record of the transaction from etcd, by a client that is not the library's."""
    key = _records(call.arguments["request"])[0]
    (found,) = EtcdClient(os.environ["ETCD_ENDPOINTS"]).get(key)[:1]
    return {"key": found.key, "revision": found.mod_revision}


POINTS: dict[str, Point] = {
    # pika has handed a delivery over.
    "received": after(f"{_LIBRARY}.bus.delivery:Epoch.arrived"),
    "decoded": after(f"{_LIBRARY}.consumer:decode"),
    # A pure handler, on the loop's thread; its effects exist nowhere else when it is left.
    "handler entered": before(f"{_LIBRARY}.consumer:run_handler", last_act=_event),
    "handler left": after(f"{_LIBRARY}.consumer:run_handler", last_act=_event),
    # The batch takes no more; nothing has been sent.
    "batch sealed": before(f"{_LIBRARY}.ledger.ledger:EtcdLedger.submit"),
    # gRPC has the transaction: it may apply or not.
    "txn sent": after(f"{_LIBRARY}.ledger.commit:Commit._send"),
    # On gRPC's thread, before the loop and so the library hears of the reply.
    "applied but reply unread": answered(
        f"{_LIBRARY}.ledger.etcd:Etcd.call", "answered", counts=_applied, last_act=_seen_in_etcd
    ),
    # The reply is judged, and nothing has been done about it.
    "reply read": before(f"{_LIBRARY}.consumer:Consumer._answered"),
    # One ack covers what has been settled meanwhile: how many that are is the commits' luck.
    "before ack": before("pika.channel:Channel.basic_ack", reaches=_tag, last_act=_acked),
    "after ack": after("pika.channel:Channel.basic_ack", reaches=_tag, last_act=_acked_and_sent),
    "before park": before(f"{_LIBRARY}.bus.bus:RabbitBus.forward", last_act=_body),
    # The broker has confirmed the dead letter; its delivery is not acked.
    "after park": answered(f"{_LIBRARY}.bus.bus:RabbitBus.forward", "confirmed", last_act=_body),
    # The record is there with its events; none of them has been sent.
    "events recorded": before(f"{_LIBRARY}.consumer:Consumer._publish", last_act=_task),
    # pika has an event: it may arrive at the broker or not.
    "event sent": after(f"{_LIBRARY}.bus.bus:RabbitBus.publish"),
    # The broker has it, and the record still says publishing.
    "event confirmed": answered(f"{_LIBRARY}.bus.bus:RabbitBus.publish", "confirmed"),
    # The claim has landed; its call has not been handed to the pool.
    "claim taken": before(f"{_LIBRARY}.caller:Caller.call", last_act=_event),
    # A claimed handler has returned, on a thread of the pool.
    "call made": after(f"{_LIBRARY}.caller:run_handler", last_act=_event),
    # The record is done in place of the claim; nothing has been acked.
    "claim completed": before(f"{_LIBRARY}.settler:Settler.recorded", counts=_ours, last_act=_task),
}


def find(point: Point) -> tuple[Any, str, Callable[..., Any]]:
    """Return the point's function, what holds it, and its name there.

    Raises LookupError where the library has no such function, or no such parameter of it.
    """
    module, _, path = point.where.partition(":")
    *owners, name = path.split(".")
    try:
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        function = getattr(owner, name)
    except (ImportError, AttributeError) as error:
        raise LookupError(f"{point.where} is no longer there: {error}") from error
    if point.callback and point.callback not in inspect.signature(function).parameters:
        raise LookupError(f"{point.where} no longer has a parameter {point.callback}")
    return owner, name, function


def plant(point: Point, reached: Callable[[Call], None]) -> None:
    """Wrap the point's function so that `reached` is called at each passage; raises LookupError."""
    owner, name, function = find(point)
    signature = inspect.signature(function)

    def passed(call: Call) -> None:
        if point.counts(call):
            reached(call)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        call = Call(dict(bound.arguments))
        if point.callback:
            callback = bound.arguments[point.callback]

            def observed(*answer: Any) -> Any:
                passed(Call(call.arguments, answer))
                return callback(*answer)

            bound.arguments[point.callback] = observed
        elif point.when == "before":
            passed(call)
        result = function(*bound.args, **bound.kwargs)
        if point.when == "after":
            passed(call)
        return result

    setattr(owner, name, wrapper)


def kill_at(setting: str) -> None:
    """Wrap what the setting, such as `txn sent:2`, names, to end this process at that passage.

    Raises LookupError where there is no such point, or where the library does not have it.
    """
    found = re.fullmatch(r"(.+):([1-9][0-9]*)", setting)
    if found is None or found[1] not in POINTS:
        raise LookupError(f"{setting!r} is not one of these with a number: {', '.join(POINTS)}")
    name, number = found[1], int(found[2])
    point, passages = POINTS[name], itertools.count(1)  # Threads get a number each.
    dying = threading.Lock()

    def reached(call: Call) -> None:
        passage = point.reaches(call) if point.reaches else next(passages)
        if passage >= number and dying.acquire(blocking=False):
            proof = {"point": name, "passage": number, **point.last_act(call)}
            os.write(2, f"\n{PROOF}{json.dumps(proof)}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        elif passage >= number:
            threading.Event().wait()  # Another thread is dying at it: nobody gets past.

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
