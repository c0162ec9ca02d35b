"""Crash points: a service that kills itself at a named step.

    cd order && CRASH_POINT="txn sent:2" ../.venv/bin/python -m chaos.crash_points order

runs the service as `python -m order` does, and kills it with SIGKILL when it passes that step for
the second time. The library knows nothing of this: the function of that step is wrapped from
outside before the service starts, and the services' images do not contain this file.
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
    """A step: a function of the library or of pika, and the moment in a call of it.

    "before" is just before the function runs, and "after" when it has returned (a coroutine: when
    it has ended). "waiting" is while the coroutine waits, with its request on the way, and
    "resolved" when the future that the function has returned has its result.

    A call has the function's arguments as attributes, and its ``answer``. ``counts`` says which
    calls pass the step. ``reaches`` returns the number of the passage, if one call can be several
    passages; otherwise each call is one. ``last_act`` runs just before the kill, to finish what
    the function leaves to a later turn of the loop; it returns more for the proof.
    """

    when: Literal["before", "after", "waiting", "resolved"]
    where: str
    counts: Callable[[Any], object] = lambda _: True
    reaches: Callable[[Any], int] | None = None
    last_act: Callable[[Any], dict[str, object]] = lambda _: {}


# What some points add to the proof, or have to wait for.


def _id(of: str) -> Callable[[Any], dict[str, object]]:
    return lambda call: {"id": attrgetter(of)(call).id}


def _body(of: str) -> Callable[[Any], dict[str, object]]:
    return lambda call: {"body": getattr(call, of).body.decode()}


def _acked(call: Any) -> dict[str, object]:
    return {"acked": call.delivery_tag if call.multiple else 1}


def _acked_and_sent(call: Any) -> dict[str, object]:
    """Send the ack, which is still in buffers until one of the next turns of the loop."""
    connection = call.self.connection
    getattr(connection, "_write", lambda: None)()  # It would run at the end of this turn.
    transport = connection._transport  # noqa: SLF001
    while transport.get_write_buffer_size():
        with suppress(BlockingIOError):
            transport._produce()  # noqa: SLF001
    return _acked(call)


def _records(call: Any) -> list[str]:
    """Return the keys of the records that a request to etcd puts."""
    puts = call.request.success if call.method == "Txn" else ()
    keys = (operation.request_put.key.decode() for operation in puts)
    return [key for key in keys if key.startswith("/service/")]


def _seen_in_etcd(call: Any) -> dict[str, object]:
    """Read one record of the transaction from etcd, with another client than the library's."""
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
    # A pure handler, on the loop's thread. When it is left, its effects exist only in memory.
    "handler entered": Point("before", "calls:Calls.run", last_act=_EVENT),
    "handler left": Point("after", "calls:Calls.run", last_act=_EVENT),
    # The batch is complete, and not sent.
    "batch sealed": Point("before", "ledger:EtcdLedger.commit"),
    # gRPC has the transaction, which may land or not.
    "txn sent": Point("waiting", _CALL, counts=_records),
    # gRPC has the reply, and the ledger has not.
    "applied but reply unread": Point(
        "after",
        _CALL,
        counts=lambda call: _records(call) and call.answer.succeeded,
        last_act=_seen_in_etcd,
    ),
    # The reply is judged, and nothing is settled.
    "reply read": Point("after", "ledger:EtcdLedger.commit"),
    # One ack covers all that was settled meanwhile, a number that depends on the commits.
    "before ack": Point("before", _ACK, reaches=attrgetter("delivery_tag"), last_act=_acked),
    "after ack": Point("after", _ACK, reaches=attrgetter("delivery_tag"), last_act=_acked_and_sent),
    "before park": Point("before", "settle:forwarded_message", last_act=_body("delivery")),
    # The broker has confirmed the dead letter, and its delivery is not acked.
    "after park": Point("resolved", _SEND, counts=attrgetter("answer"), last_act=_body("message")),
    # The record is there with its events, and none of them has been sent.
    "events recorded": Point("before", "flow:Consumer._publish", last_act=_id("flight.event")),
    # pika has an event, which may arrive at the broker or not.
    "event sent": Point("after", _SEND),
    # The broker has confirmed it, and the record is still *publishing*.
    "event confirmed": Point("resolved", _SEND, counts=attrgetter("answer")),
    # The claim has landed, and its call has not begun.
    "claim taken": Point("before", "calls:Calls.call", last_act=_EVENT),
    # A claimed handler has returned, and nothing is recorded.
    "call made": Point(
        "after", "calls:Calls.call", counts=lambda call: call.answer is not None, last_act=_EVENT
    ),
    # The record is *done* in place of the claim, and nothing is acked.
    "claim completed": Point(
        "before", "settle:Settler.recorded", counts=attrgetter("ours"), last_act=_EVENT
    ),
}


def find(point: Point) -> tuple[Any, str, Callable[..., Any]]:
    """Return the class or module that has the point's function, its name there, and itself."""
    module, _, path = point.where.partition(":")
    *owners, name = path.split(".")
    within = module if module.startswith("pika.") else f"idempotent_consumer.{module}"
    owner = functools.reduce(getattr, owners, importlib.import_module(within))
    return owner, name, getattr(owner, name)


def plant(point: Point, reached: Callable[[Any], None]) -> None:
    """Wrap the point's function so that each passage calls `reached`."""
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
            # The first callback of the future runs before those of the code that awaits it.
            answer.add_done_callback(lambda future: passes("resolved", call, future.result()))
        return answer

    @functools.wraps(function)
    async def coroutine(*args: Any, **kwargs: Any) -> Any:
        call = begins(*args, **kwargs)
        if point.when == "waiting":
            # The body runs until it waits. gRPC then takes the request over in a task of its own,
            # in the turn after this one, and before the second of these callbacks.
            loop = asyncio.get_running_loop()
            loop.call_soon(lambda: loop.call_soon(passes, "waiting", call))
        answer = await function(*args, **kwargs)
        passes("after", call, answer)
        return answer

    setattr(owner, name, coroutine if inspect.iscoroutinefunction(function) else plain)


def kill_at(setting: str) -> None:
    """Kill this process at the passage that a setting such as `txn sent:2` names.

    Raises LookupError if there is no such point.
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
    """Run the service that the command line names, with the crash point of the environment."""
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
