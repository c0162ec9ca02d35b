"""``dead-letters list`` leaves them where they are."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from .. import names
from ..bus import queue_arguments
from .context import Context
from .dead_letter_queue import Letter
from .output import counted, duration, plain, table
from .report import Report
from .selecting import add_selection, selection

_LIMIT = 100


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = verbs.add_parser("list", parents=[common], help="list them; none is removed")
    add_selection(parser, _LIMIT)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, context: Context) -> Report:
    """List the letters that are ready."""
    chosen, reasons = selection(arguments), Counter[str]()
    with context.letters(arguments.service) as letters:

        def noted() -> Any:
            for letter in letters:
                reasons[letter.reason] += 1
                yield letter

        # What is listed is kept, not the letters: each holds a body of up to a megabyte.
        facts = [facts_of(letter, context.now_s()) for letter in chosen.of(noted())]
    warning = look_costs(arguments.service, context)
    document = {
        "service": arguments.service,
        "total": reasons.total(),
        "reasons": dict(reasons),
        "letters": facts,
        "warning": warning,
    }
    return Report(document, _text(arguments.service, facts, reasons, warning))


def facts_of(letter: Letter, now_s: float) -> dict[str, Any]:
    """Return what a letter is, without its body."""
    event, since = letter.event, letter.since
    return {
        "id": event.id if event else None,
        "type": event.type if event else None,
        "reason": letter.reason,
        "error": letter.error,
        "attempts": letter.attempts,
        "since": since.isoformat() if since else None,
        "age_s": max(0, round(now_s - since.timestamp())) if since else None,
        "bytes": len(letter.body),
    }


def look_costs(service: str, context: Context) -> str | None:
    """Return a warning where each look brings a letter nearer to its queue's delivery limit."""
    queue = names.dead_letter_queue(service)
    with context.rabbitmq() as rabbitmq:
        arguments = queue_arguments(service, ())[queue]
        if rabbitmq.depth(queue) is None or not rabbitmq.differs(queue, arguments):
            return None
    return (
        f"{queue} is of an older version: RabbitMQ drops a letter from it after some 20 looks, "
        "of which this was one. idempotent-consumer doctor says what to do"
    )


def _text(
    service: str, facts: list[dict[str, Any]], reasons: Counter[str], warning: str | None
) -> str:
    parts = []
    if facts:
        parts.append(table(("ID", "TYPE", "REASON", "ATTEMPTS", "AGE", "ERROR"), map(_row, facts)))
    by_reason = ", ".join(f"{number} {plain(reason, 40)}" for reason, number in reasons.items())
    total = f"{counted(reasons.total(), 'dead letter')} of {service}"
    parts.append(f"{total}: {by_reason}; {len(facts)} listed" if reasons else f"no {total[2:]}")
    if warning:
        parts.append(f"warning: {warning}")
    return "\n".join(parts)


def _row(facts: dict[str, Any]) -> list[str]:
    age_s, attempts = facts["age_s"], facts["attempts"]
    return [
        plain(facts["id"] or "-", 40),
        plain(facts["type"] or "-", 24),
        plain(facts["reason"], 16),
        "-" if attempts is None else str(attempts),
        "?" if age_s is None else duration(age_s),
        plain(facts["error"], 80),
    ]
