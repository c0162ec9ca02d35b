"""``find``: where an event is, over all services."""

from __future__ import annotations

import argparse
from typing import Any

from .. import names
from ..records import CLAIMED, PUBLISHING
from .broker import Broker, Queues
from .context import Context, add_services
from .dead_letters import open_dead_letter_queue
from .etcd import Records
from .output import Report, duration, plain
from .records import age_s

LOOKED_AT_MOST = 1000
"""In a queue with more messages, the event is looked for only when asked to: all are fetched."""


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "find", parents=[common], help="tell where an event is: record, queue, retry, dead letter"
    )
    parser.add_argument("id", metavar="ID", help="the event's id")
    add_services(parser)
    parser.add_argument(
        "--all",
        action="store_true",
        help=f"look into queues with over {LOOKED_AT_MOST:,} messages, too: all of them are "
        "fetched, and put back",
    )
    parser.set_defaults(run=_find)


def _find(arguments: argparse.Namespace, context: Context) -> Report:
    """Look everywhere. Not ok where no service has it.

    The records are read last: an event that leaves a queue meanwhile has its record then.
    """
    known, event_id = context.management().queues(), arguments.id
    found: dict[str, dict[str, Any]] = {name: {} for name in known.services(arguments.service)}
    with context.rabbitmq() as broker:
        for name, places in found.items():
            places.update(_queues(broker, name, arguments, context, known))
    with context.etcd() as etcd:
        for name, places in found.items():
            record = Records(etcd, name).get(event_id)
            places["record"] = record and {
                "state": record.record.state,
                "time": record.record.time,
            }
    lines = [line for name, places in found.items() for line in _lines(name, places, context)]
    is_found = any(places["record"] or places["messages"] for places in found.values())
    if not found:
        lines = ["no service has declared its queues yet"]
    return Report({"id": event_id, "services": found}, "\n".join(lines), is_found)


def _queues(
    broker: Broker, name: str, arguments: argparse.Namespace, context: Context, known: Queues
) -> dict[str, Any]:
    """Return the event's messages in a service's queues, and the queues not looked into."""
    messages, skipped = list[dict[str, Any]](), dict[str, int]()
    for queue in known.of(name, context.settings):
        depth = broker.depth(queue)
        if depth is None or not depth.ready:
            continue
        if depth.ready > LOOKED_AT_MOST and not arguments.all:
            skipped[queue] = depth.ready
            continue
        with open_dead_letter_queue(broker, name, queue) as letters:
            messages += [
                {"queue": queue, **letter.facts(context.now_s())}
                for letter in letters
                if letter.id == arguments.id
            ]
    unacked = known.facts.get(name, {}).get("messages_unacknowledged")
    return {"messages": messages, "not_looked_into": skipped, "unacked": unacked}


def _lines(name: str, places: dict[str, Any], context: Context) -> list[str]:
    """Return what there is to say of a service, a line each."""
    texts = []
    if record := places["record"]:
        since_s = age_s(record["time"], context.now_s())
        when = "" if since_s is None else f", {duration(since_s)} ago"
        in_flight = record["state"] in (CLAIMED, PUBLISHING)
        texts.append(f"{record['state']}{when}" + " (in flight)" * in_flight)
    texts += [_message(name, message) for message in places["messages"]]
    if not texts:
        unacked = places["unacked"]
        may_be = f"; its replicas have {unacked:,} in flight, which may include it"
        texts.append("not found" + may_be * bool(unacked))
    texts += [
        f"not looked for among the {number:,} messages of {queue}: --all does"
        for queue, number in places["not_looked_into"].items()
    ]
    return [f"{name}: {text}" for text in texts]


def _message(name: str, message: dict[str, Any]) -> str:
    queue, error = message["queue"], plain(message["error"], 200)
    if queue == name:
        return f"waits in {queue}"
    if queue == names.dead_letter_queue(name):
        age = message["age_s"]
        since = "" if age is None else f" for {duration(age)}"
        return f"a dead letter{since}: {plain(message['reason'], 40)}: {error}"
    return f"waits in {queue} for its next attempt, after {message['attempts']}: {error}"
