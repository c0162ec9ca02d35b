"""``inspect`` shows an event's record; ``forget`` deletes it, so that the event is new again."""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson

from ..event import Event, InvalidEvent, decode
from ..names import record_key
from ..records import CLAIMED, PUBLISHING, RELEASED, Record
from .context import Context, service
from .etcd import Records
from .output import CommandError, Report, duration, plain


def add_inspect(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb that shows."""
    parser = verbs.add_parser("inspect", parents=[common], help="show an event's record")
    _add_event(parser)
    parser.add_argument(
        "--body",
        type=Path,
        metavar="FILE",
        help="say whether this body is the same event, or a conflict",
    )
    parser.set_defaults(run=_inspect)


def add_forget(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb that deletes."""
    parser = verbs.add_parser("forget", parents=[common], help="make an event new again")
    _add_event(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument(
        "--force", action="store_true", help="also a record that a replica is at work on"
    )
    parser.set_defaults(run=_forget)


def _add_event(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("service", type=service, metavar="SERVICE")
    parser.add_argument("id", metavar="ID", help="the event's id")


def _inspect(arguments: argparse.Namespace, context: Context) -> Report:
    name, event_id = arguments.service, arguments.id
    body = _body(arguments.body, event_id) if arguments.body else None
    with context.etcd() as etcd:
        records = Records(etcd, name)
        found = records.get(event_id)
        remaining_s = records.remaining_s(found.lease) if found else None
    document: dict[str, object] = {
        "service": name,
        "id": event_id,
        "key": record_key(name, event_id).decode(),
        "found": found is not None,
    }
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
    texts = [
        ("state", record.state),
        ("time", _time(record.time, context.now_s())),
        ("replica", plain(_replica(record)) or "none: it was not written by this library"),
        ("digest", plain(record.digest)),
        ("claim" if record.state == CLAIMED else "kept", _remaining(record, remaining_s)),
    ]
    if record.state == PUBLISHING:
        texts += [("publishes", plain(each.body.decode())) for each in record.events]
    if body is not None:
        same = body.digest == record.digest
        document |= {"body_digest": body.digest, "same_event": same}
        conflict = "a conflict: another event with this id, which would be parked"
        texts.append(("body", "the same event" if same else conflict))
    return Report(document, "\n".join(f"{label:<10}{text}" for label, text in texts))


def _body(path: Path, event_id: str) -> Event:
    try:
        event = decode(path.read_bytes())
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}") from None
    except InvalidEvent as error:
        raise CommandError(f"{path} is no event: {error}") from None
    if event.id != event_id:
        raise CommandError(f"{path} has the id '{plain(event.id)}', not '{plain(event_id)}'")
    return event


def _replica(record: Record) -> str:
    """Return the part of a record's token that its process drew at its start, and logged."""
    return record.token.partition("/")[0]


def age_s(time: str, now_s: float) -> float | None:
    """Return how many seconds ago a record was written, or None where its time is no time."""
    try:
        return max(0, now_s - datetime.fromisoformat(time).timestamp())
    except ValueError:
        return None


def _time(text: str, now_s: float) -> str:
    ago_s = age_s(text, now_s)
    return "unknown" if ago_s is None else f"{text} ({duration(ago_s)} ago)"


def _remaining(record: Record, remaining_s: int | None) -> str:
    if remaining_s is None:
        return "for good"
    # Both are under the lease that a replica keeps alive for all its claims.
    renewed = record.state in (CLAIMED, RELEASED)
    return f"for another {duration(remaining_s)}" + ", unless its replica renews it" * renewed


def _forget(arguments: argparse.Namespace, context: Context) -> Report:
    """Delete a record as it was seen. Raises CommandError where there is none, or another now."""
    name, event_id = arguments.service, plain(arguments.id)
    with context.etcd() as etcd:
        records = Records(etcd, name)
        found = records.get(arguments.id)
        if found is None:
            raise CommandError(f"{name} has no record of '{event_id}': it is new to it already")
        record, state = found.record, found.record.state
        if state == CLAIMED and not arguments.force:
            remaining = duration(records.remaining_s(found.lease) or 0)
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
        if not records.forget(arguments.id, record):
            raise CommandError(
                f"the record of '{event_id}' has changed meanwhile and was not deleted: look again"
            )
    return Report(
        {"service": name, "id": arguments.id, "forgotten": True, "state": state},
        f"{name} has forgotten '{event_id}'. Running replicas learn it from their watch of etcd, "
        "in a moment; the effects of the first time stay. Publish the event to have it processed.",
    )
