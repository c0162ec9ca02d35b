"""One event: ``find`` and ``inspect`` show where it is, ``forget`` makes it new again."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from .. import names
from ..event import Event, InvalidEvent, decode
from ..records import CLAIMED, PUBLISHING, Record
from .broker import Broker, Queues
from .context import EVENT_ID, SERVICE, SERVICES, YES, Context, Verb, argument, flag
from .dead_letters import NotArrivedError, hold, moment
from .output import CommandError, Report, ago, duration, plain

LOOKED_AT_MOST = 1000
"""A queue with more messages is searched only with ``--all``, because all of them are fetched."""


def _inspect(arguments: argparse.Namespace, context: Context) -> Report:
    name, event_id = arguments.service, arguments.id
    body = _body(arguments.body, event_id) if arguments.body else None
    with context.etcd() as etcd:
        found = etcd.record(name, event_id)
        remaining_s = etcd.remaining_s(found.lease) if found else None
    key = names.record_key(name, event_id).decode()
    document = {"service": name, "id": event_id, "key": key, "found": found is not None}
    if found is None:
        raise CommandError(
            f"{name} has no record of '{plain(event_id)}'. idempotent-consumer find tells whether "
            "it waits in a queue, or is a dead letter",
            document,
        )
    record = found.record
    document |= {
        "state": record.state,
        "time": record.time,
        "replica": _replica(record),
        "token": record.token,
        "digest": record.digest,
        "mod_revision": found.mod_revision,
        "events": [orjson.loads(each.body) for each in record.events],
        "remaining_s": remaining_s,
    }
    age = ago(moment(record.time), context.now_s())
    texts = [
        ("state", record.state),
        ("time", f"{record.time} ({age})" if age else "unknown"),
        ("replica", plain(_replica(record)) or "none: it was not written by this library"),
        ("digest", plain(record.digest)),
        ("claim" if record.state == CLAIMED else "kept", _remaining(record, remaining_s)),
    ]
    if record.state == PUBLISHING:
        texts += [("publishes", plain(each.body.decode())) for each in record.events]
    if body is not None:
        same = body.digest == record.digest
        document |= {"body_digest": body.digest, "same_event": same}
        conflict = f"a conflict, which would be parked, unless {name} has a decoder of its own"
        other = f"another event with this id, read in the default form: {conflict}"
        texts.append(("body", "the same event" if same else other))
    return Report(document, "\n".join(f"{label:<10}{text}" for label, text in texts))


def _body(path: Path, event_id: str) -> Event:
    try:
        event = decode(path.read_bytes())
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}") from None
    except InvalidEvent as error:
        raise CommandError(f"{path} is no event in the default form: {error}") from None
    if event.id != event_id:
        raise CommandError(f"{path} has the id '{plain(event.id)}', not '{plain(event_id)}'")
    return event


def _replica(record: Record) -> str:
    """Return the part of a record's token that identifies its process, which logs it at start."""
    return record.token.partition("/")[0]


def _remaining(record: Record, remaining_s: int | None) -> str:
    if remaining_s is None:
        return "for good"
    renewed = ", unless its replica renews it" * (record.state == CLAIMED)
    return f"for another {duration(remaining_s)}{renewed}"


def _find(arguments: argparse.Namespace, context: Context) -> Report:
    """Look everywhere, or say where not. Not ok if no service has it.

    The records are read last: an event that has left its queue by then has a record.
    """
    known = context.management().queues()
    found: dict[str, dict[str, Any]] = {name: {} for name in known.services(arguments.service)}
    with context.rabbitmq() as broker:
        for name, places in found.items():
            places.update(_messages(broker, name, arguments, context, known))
    with context.etcd() as etcd:
        for name, places in found.items():
            kept = etcd.record(name, arguments.id)
            places["record"] = kept and {"state": kept.record.state, "time": kept.record.time}
    lines = [line for name, places in found.items() for line in _lines(name, places, context)]
    missing = dict.fromkeys(("unacked", "retries"), known.why_not) if known.why_not else {}
    if missing:
        others = "retry queues whose delay RETRY_DELAYS does not have"
        lines.append(f"not looked for in flight, nor in {others}. {known.why_not}")
    is_found = any(places["record"] or places["messages"] for places in found.values())
    text = "\n".join(lines) if found else "no service has declared its queues yet"
    return Report({"id": arguments.id, "services": found, "missing": missing}, text, is_found)


def _messages(
    broker: Broker, name: str, arguments: argparse.Namespace, context: Context, known: Queues
) -> dict[str, Any]:
    """Return the event's messages in a service's queues, and the queues not searched."""
    messages, skipped = list[dict[str, Any]](), dict[str, int]()
    for queue in known.of(name, context.settings):
        depth = broker.depth(queue)
        if depth is None or not depth.ready:
            continue
        if depth.ready > LOOKED_AT_MOST and not arguments.all:
            skipped[queue] = depth.ready
            continue
        # The service may consume messages meanwhile.
        with hold(broker, queue) as letters, suppress(NotArrivedError):
            for letter in letters:
                if letter.id == arguments.id:
                    messages.append({"queue": queue, **letter.facts(context.now_s())})
    unacked = known.facts.get(name, {}).get("messages_unacknowledged")
    return {"messages": messages, "not_looked_into": skipped, "unacked": unacked}


def _lines(name: str, places: dict[str, Any], context: Context) -> list[str]:
    texts = []
    if record := places["record"]:
        in_flight = " (in flight)" * (record["state"] in (CLAIMED, PUBLISHING))
        age = ago(moment(record["time"]), context.now_s())
        texts.append(f"{record['state']}{', ' * bool(age)}{age}{in_flight}")
    texts += [_message(name, message) for message in places["messages"]]
    if not texts:
        unacked = places["unacked"] or 0
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


def _forget(arguments: argparse.Namespace, context: Context) -> Report:
    """Delete a record, unless it has changed since it was read."""
    name, event_id = arguments.service, plain(arguments.id)
    with context.etcd() as etcd:
        found = etcd.record(name, arguments.id)
        if found is None:
            raise CommandError(f"{name} has no record of '{event_id}': it is new to it already")
        record, state = found.record, found.record.state
        if state == CLAIMED and not arguments.force:
            remaining = duration(etcd.remaining_s(found.lease) or 0)
            raise CommandError(
                f"{name} is at work on '{event_id}': its replica {_replica(record)[:8]} has "
                f"claimed it for another {remaining}, and renews that while it lives. Wait, or "
                "say --force: then its call may be made twice"
            )
        if state == PUBLISHING and not arguments.force:
            raise CommandError(
                f"{name} has recorded '{event_id}' and is publishing its events. Wait, or say "
                "--force"
            )
        context.confirm(
            f"Delete the record of '{event_id}' ({state})? {name} will process the event as new "
            "when it comes again.",
            arguments.yes,
        )
        if not etcd.forget(name, arguments.id, record):
            raise CommandError(
                f"the record of '{event_id}' has changed meanwhile and was not deleted: look again"
            )
    return Report(
        {"service": name, "id": arguments.id, "forgotten": True, "state": state},
        f"{name} has forgotten '{event_id}'. Running replicas learn it from their watch of etcd, "
        "in a moment; the effects of the first time stay. Publish the event to have it processed.",
    )


_BODY = "say whether this body is the same event, or a conflict"
_ALL = (
    f"look into queues with over {LOOKED_AT_MOST:,} messages, too: all of them are fetched, and "
    "put back"
)

INSPECT = Verb(
    "inspect",
    "show an event's record",
    _inspect,
    [SERVICE, EVENT_ID, argument("--body", read=Path, metavar="FILE", help=_BODY)],
)
FIND = Verb(
    "find",
    "tell where an event is: record, queue, retry, dead letter",
    _find,
    [EVENT_ID, SERVICES, flag("--all", _ALL)],
)
FORGET = Verb(
    "forget",
    "make an event new again",
    _forget,
    [SERVICE, EVENT_ID, YES, flag("--force", "also a record that a replica is at work on")],
)
