"""``dead-letters show``: the whole of some, which stay where they are."""

from __future__ import annotations

import argparse
import base64
from typing import Any

import orjson

from .context import Context
from .dead_letter_queue import Letter
from .errors import CommandError
from .listing import facts_of, look_costs
from .output import duration, plain
from .report import Report
from .selecting import add_selection, selection

_LIMIT = 1
_SHOWN_CHARACTERS = 20_000


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "show", parents=[common], help="show bodies and headers; none is removed"
    )
    add_selection(parser, _LIMIT)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, context: Context) -> Report:
    """Show letters. Raises CommandError where none is meant."""
    chosen, shown, meant = selection(arguments), [], 0
    with context.letters(arguments.service) as letters:
        for meant, letter in enumerate(chosen.meant(letters), 1):
            if meant <= arguments.limit:
                shown.append(_whole(letter, context.now_s()))
    if not shown:
        raise CommandError(f"no such dead letter of {arguments.service}")
    warning = look_costs(arguments.service, context)
    parts = ["\n\n".join(map(_text, shown))]
    if meant > len(shown):
        parts.append(f"\n{len(shown)} of {meant:,} shown; --limit says how many")
    if warning:
        parts.append(f"warning: {warning}")
    document = {"service": arguments.service, "total": meant, "letters": shown, "warning": warning}
    return Report(document, "\n".join(parts))


def _whole(letter: Letter, now_s: float) -> dict[str, Any]:
    headers = {name: _header(value) for name, value in (letter.properties.headers or {}).items()}
    try:
        body, encoding = letter.body.decode(), "text"
    except UnicodeDecodeError:
        body, encoding = base64.b64encode(letter.body).decode(), "base64"
    return {**facts_of(letter, now_s), "headers": headers, "body": body, "body_encoding": encoding}


def _header(value: object) -> object:
    """Return a header as JSON can have it: AMQP has times, decimals and bytes too."""
    try:
        orjson.dumps(value)
        return value
    except TypeError:
        return str(value)


def _text(shown: dict[str, Any]) -> str:
    age_s = shown["age_s"]
    lines = [
        (name, "-" if shown[name] is None else plain(str(shown[name]), 1000))
        for name in ("id", "type", "reason", "error", "attempts")
    ]
    lines.append(("age", "unknown" if age_s is None else f"{duration(age_s)}, {shown['since']}"))
    lines += [
        (plain(name, 40), plain(str(value), 1000)) for name, value in shown["headers"].items()
    ]
    lines.append(("body", plain(shown["body"], _SHOWN_CHARACTERS)))
    return "\n".join(f"{name:<18}{text}" for name, text in lines)
