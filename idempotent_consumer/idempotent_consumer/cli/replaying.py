"""``dead-letters replay``: send them back, and remove each once the broker has confirmed it."""

from __future__ import annotations

import argparse
from typing import Any

from .. import names
from ..etcd import EtcdError
from .broker import BrokerError
from .context import Context
from .dead_letter_queue import Letter
from .errors import CommandError
from .etcd import Asking, Records
from .output import counted, duration, plain
from .report import Report
from .selecting import add_all, add_selection, selection


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = verbs.add_parser("replay", parents=[common], help="send them back to their service")
    add_selection(parser)
    add_all(parser)
    parser.add_argument(
        "--force",
        action="store_true",
        help="also what may have been processed before the window: it would be "
        "processed again; etcd is not asked",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, context: Context) -> Report:
    """Replay, and say what was held back. Not ok where something was."""
    chosen, replayed = selection(arguments), 0
    held: list[dict[str, object]] = []
    try:
        with context.etcd() as etcd, context.letters(arguments.service) as letters:
            for letter in chosen.of(letters):
                why = None if arguments.force else _risk(letter, arguments.service, context, etcd)
                if why is None:
                    letters.resend(letter)
                    replayed += 1
                else:
                    held.append({"id": letter.event.id if letter.event else None, "why": why})
    except (BrokerError, EtcdError) as error:
        raise CommandError(
            f"{error}; sent back before that: {replayed}, the others stay", {"replayed": replayed}
        ) from None
    if not replayed and not held:
        raise CommandError(f"no such dead letter of {arguments.service}")
    document: dict[str, object] = {"service": arguments.service, "replayed": replayed, "held": held}
    return Report(document, _text(arguments.service, replayed, held), not held)


def _risk(letter: Letter, service: str, context: Context, etcd: Asking) -> str | None:
    """Return why a replay could process an event a second time, or None where it cannot.

    A record that is there decides by itself when the letter comes. One that is not may have been
    there and have ended with its window, unless that would be too long for the letter's age: what
    failed had no record when it was parked. A conflict had one, by another body.
    """
    if letter.event is None or Records(etcd, service).get(letter.event.id) is not None:
        return None
    if letter.reason == names.CONFLICT:
        return "the record that it was in conflict with is gone: it would be processed as new"
    window_s = context.settings.dedup_window_s
    if not window_s:
        return None
    if letter.since is None:
        return "nothing says how long it has been here, so its record may be gone with the window"
    age_s = context.now_s() - letter.since.timestamp()
    if age_s >= window_s:
        return (
            f"it has been here for {duration(age_s)}, and the window is "
            f"{duration(window_s)}: a record of it would be gone"
        )
    return None


def _text(service: str, replayed: int, held: list[dict[str, object]]) -> str:
    lines = [f"{counted(replayed, 'dead letter')} sent back to {service}"]
    lines += [f"held back: {plain(str(each['id']))}: {each['why']}" for each in held]
    if held:
        lines.append("--force replays these too: whatever was done for them once is done again")
    return "\n".join(lines)
