"""The results of a run as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cluster.trial import Result

_FAULTS = ("fault", "injected", "confirmed", "stall", "lost", "double", "replicas settled")
_SIZES = ("number", "at", "by the formula", "measured")


class Size(NamedTuple):
    """One of the numbers that decide the size, at one point."""

    number: str
    point: str
    formula: int
    measured: int


def faults_table(results: Iterable[Result]) -> str:
    """Return a line for each trial, in order. Stalls are in seconds."""
    return _table(_FAULTS, map(_fault, results))


def sizes_table(sizes: Iterable[Size]) -> str:
    """Return a line for each point, in order."""
    rows = [(size.number, size.point, f"{size.formula:,}", f"{size.measured:,}") for size in sizes]
    return _table(_SIZES, rows)


def _table(head: Sequence[str], found: Iterable[Sequence[str]]) -> str:
    rows = [head, *found]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def _fault(result: Result) -> tuple[str, ...]:
    stall = "waits" if result.stall_s is None else f"{result.stall_s:.1f} s"
    settled = " + ".join(map(str, result.shares))
    return (
        result.fault,
        str(result.injected),
        str(result.confirmed),
        stall,
        str(result.lost),
        str(result.double),
        settled,
    )
