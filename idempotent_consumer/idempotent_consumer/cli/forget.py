"""``forget``: delete an event's record, so that the event is new again."""

from __future__ import annotations

import argparse
from typing import Any

from ..records import CLAIMED, PUBLISHING
from .arguments import service
from .context import Context
from .errors import CommandError
from .etcd import Found, Records
from .inspecting import replica
from .output import duration, plain
from .report import Report


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = verbs.add_parser("forget", parents=[common], help="make an event new again")
    parser.add_argument("service", type=service, metavar="SERVICE")
    parser.add_argument("id", metavar="ID", help="the event's id")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument(
        "--force", action="store_true", help="also a record that a replica is at work on"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, context: Context) -> Report:
    """Delete a record as it was seen. Raises CommandError where there is none, or another now."""
    name, event_id = arguments.service, plain(arguments.id)
    with context.etcd() as etcd:
        records = Records(etcd, name)
        found = records.get(arguments.id)
        if found is None:
            raise CommandError(f"{name} has no record of '{event_id}': it is new to it already")
        if not arguments.force:
            _refuse_work_under_way(found, records.remaining_s(found.lease), name, event_id)
        context.confirm(
            f"Delete the record of '{event_id}' ({found.record.state})? {name} will "
            "process the event anew when it comes again.",
            arguments.yes,
        )
        if not records.forget(arguments.id, found.record.mod_revision):
            raise CommandError(
                f"the record of '{event_id}' has changed meanwhile and was not deleted: look again"
            )
    return Report(
        {"service": name, "id": arguments.id, "forgotten": True, "state": found.record.state},
        f"{name} has forgotten '{event_id}'. Running replicas learn it from their watch of etcd, "
        "in a moment; the effects of the first time stay. Publish the event to have it processed.",
    )


def _refuse_work_under_way(found: Found, remaining_s: int | None, name: str, event_id: str) -> None:
    """Raise CommandError for a record that its replica has not finished."""
    record = found.record
    if record.state == CLAIMED:
        raise CommandError(
            f"{name} is at work on '{event_id}': its replica {replica(record)[:8]} has claimed it "
            f"for another {duration(remaining_s or 0)}, and renews that while it lives. Wait, or "
            "say --force: then its call may be made twice"
        )
    if record.state == PUBLISHING:
        raise CommandError(
            f"{name} has recorded '{event_id}' and is publishing its events. Wait, or say --force"
        )
