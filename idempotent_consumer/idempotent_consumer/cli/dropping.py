"""``dead-letters drop``: remove them for good."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from .context import Context
from .errors import CommandError
from .output import counted
from .report import Report
from .selecting import add_all, add_selection, selection


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = verbs.add_parser("drop", parents=[common], help="remove them for good; asks first")
    add_selection(parser)
    add_all(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, context: Context) -> Report:
    """Remove what was there when it was asked about, and nothing that came while it was.

    Nothing is in hand meanwhile: nobody answers RabbitMQ's heartbeats while a person thinks.
    """
    chosen, name, dropped = selection(arguments), arguments.service, 0
    with context.letters(name) as letters:
        seen = Counter(letter.fingerprint for letter in chosen.of(letters))
    if not seen:
        raise CommandError(f"no such dead letter of {name}")
    context.confirm(
        f"Remove {counted(seen.total(), 'dead letter')} of {name} for good?", arguments.yes
    )
    with context.letters(name) as letters:
        for letter in letters:
            if seen[letter.fingerprint]:
                seen[letter.fingerprint] -= 1
                letters.remove(letter)
                dropped += 1
    return Report(
        {"service": name, "dropped": dropped},
        f"{counted(dropped, 'dead letter')} of {name} removed",
    )
