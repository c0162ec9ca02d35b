"""A verb's result, and how numbers, times, tables and strangers' texts are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

from ..log import printable


class Report(NamedTuple):
    """A verb's result, as JSON and as text. The exit code is 1 unless it is ``ok``."""

    document: dict[str, object]
    text: str
    ok: bool = True


class CommandError(Exception):
    """An error that a verb foresees; its one line says what went wrong and what to do.

    ``document`` has what --json prints beside that line.
    """

    def __init__(self, message: str, document: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.document = dict(document or {})


class UsageError(Exception):
    """The command was called in a way that makes no sense."""


def ended(error: BaseException, done: str, document: Mapping[str, object]) -> BaseException:
    """Return the error that ends the command and also says what was done before."""
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


def ago(since: datetime | None, now_s: float) -> str:
    """Write how long ago a time was, as ``2h 5m ago``; nothing for one that is not known."""
    return f"{duration(max(0, now_s - since.timestamp()))} ago" if since else ""


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
