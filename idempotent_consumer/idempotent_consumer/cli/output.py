"""How things are written for people: numbers, times, tables, and texts from strangers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_UNITS_S = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))


def duration(seconds: float) -> str:
    """Write seconds in their two largest units, as ``2h 5m``."""
    left, parts = int(seconds), []
    for unit, unit_s in _UNITS_S:
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
    """Return a text for a terminal, cut short: a stranger's id could hold its control codes."""
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: width + 1]
    )
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Write rows under a header, each column as wide as its widest cell."""
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
