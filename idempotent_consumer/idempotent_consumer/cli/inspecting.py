"""``inspect``: one event's record."""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson

from ..event import Event, InvalidEvent, decode
from ..names import record_key
from ..records import CLAIMED, PUBLISHING, RELEASED, Record
from .arguments import service
from .context import Context
from .errors import CommandError
from .etcd import Records
from .output import duration, plain
from .report import Report


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = verbs.add_parser("inspect", parents=[common], help="show an event's record")
    parser.add_argument("service", type=service, metavar="SERVICE")
    parser.add_argument("id", metavar="ID", help="the event's id")
    parser.add_argument(
        "--body",
        type=Path,
        metavar="FILE",
        help="say whether this body is the same event, or a conflict",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, context: Context) -> Report:
    """Show a record. Raises CommandError where there is none."""
    body = _body(arguments.body, arguments.id) if arguments.body else None
    with context.etcd() as etcd:
        records = Records(etcd, arguments.service)
        found = records.get(arguments.id)
        remaining_s = records.remaining_s(found.lease) if found else None
    key = record_key(arguments.service, arguments.id)
    document: dict[str, object] = {
        "service": arguments.service,
        "id": arguments.id,
        "key": key.decode(),
    }
    if found is None:
        raise CommandError(
            f"{arguments.service} has no record of '{plain(arguments.id)}': it has not been "
            "recorded, or its window has passed; the event is new to it",
            {**document, "found": False},
        )
    record = found.record
    document |= {"found": True, **_facts(record), "remaining_s": remaining_s}
    lines = [f"{name:<10}{text}" for name, text in _texts(record, remaining_s, context.now_s())]
    if body is not None:
        same = body.digest == record.digest
        document |= {"body_digest": body.digest, "same_event": same}
        lines.append(f"{'body':<10}{'the same event' if same else _CONFLICT}")
    return Report(document, "\n".join(lines))


_CONFLICT = "a conflict: another event with this id, which would be parked"


def replica(record: Record) -> str:
    """Return the part of a record's token that its process drew at its start, and logged."""
    return record.token.partition("/")[0]


def _facts(record: Record) -> dict[str, object]:
    return {
        "state": record.state,
        "time": record.time,
        "replica": replica(record),
        "token": record.token,
        "digest": record.digest,
        "mod_revision": record.mod_revision,
        "events": [orjson.loads(body) for body in record.events],
    }


def _texts(record: Record, remaining_s: int | None, now_s: float) -> list[tuple[str, str]]:
    held = "claim" if record.state == CLAIMED else "kept"
    # Both are under the lease that a replica keeps alive for all its claims.
    renewed = record.state in (CLAIMED, RELEASED)
    texts = [
        ("state", record.state),
        ("time", _time(record.time, now_s)),
        ("replica", plain(replica(record)) or "none: it was not written by this library"),
        ("digest", plain(record.digest)),
        (
            held,
            "for good"
            if remaining_s is None
            else f"for another {duration(remaining_s)}"
            + (", unless its replica renews it" if renewed else ""),
        ),
    ]
    if record.state == PUBLISHING:
        texts += [("publishes", plain(body.decode())) for body in record.events]
    return texts


def _time(text: str, now_s: float) -> str:
    try:
        ago_s = now_s - datetime.fromisoformat(text).timestamp()
    except ValueError:
        return "unknown"
    return f"{text} ({duration(max(0, ago_s))} ago)"


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
