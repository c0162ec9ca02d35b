"""What a verb has to say, and how numbers, times, tables and texts from strangers are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..log import printable


class Report(NamedTuple):
    """A verb's result, as JSON and for people. ``ok`` False makes the exit code 1."""

    document: dict[str, object]
    text: str
    ok: bool = True


class CommandError(Exception):
    """A foreseeable thing went wrong; the message says in one line what, and what to do.

    ``document`` is what there is to tell of it as JSON, beside the message.
    """

    def __init__(self, message: str, document: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.document = dict(document or {})


class UsageError(Exception):
    """The command was called in a way that makes no sense."""


def ended(error: BaseException, done: str, document: Mapping[str, object]) -> BaseException:
    """Return what ends the command for this error, and says what was done before it."""
    if isinstance(error, KeyboardInterrupt):
        return KeyboardInterrupt(f"interrupted; {done}")
    return CommandError(f"{error}; {done}", document)


def duration(seconds: float) -> str:
    """Write seconds in their two largest units, as ``2h 5m``."""
    left, parts = int(seconds), []
    for unit, unit_s in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        number, left = divmod(left, unit_s)
        if number:
            parts.append(f"{number}{unit}")
    return " ".join(parts[:2]) or "0s"


def size(size_bytes: float) -> str:
    """Write a number of bytes, as ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.{0 if unit == 'B' else 1}f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} GiB"


def counted(number: int, noun: str) -> str:
    """Write how many there are, as ``1 event`` or ``2,000 events``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def plain(text: str, width: int = 200) -> str:
    """Return a stranger's text for one line on a terminal, cut short."""
    shown = printable(text[: width + 1])
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Write rows of cells by their headers, each column as wide as its widest cell.

    A number is written for people, and one that is not known as ``?``.
    """
    lines = [list(rows[0]), *(list(map(_cell, row.values())) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _cell(value: object) -> str:
    return "?" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
