"""The results of a run as a table."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.trial import Result

_HEAD = ("fault", "injected", "confirmed", "stall", "lost", "double", "replicas settled")


def table(results: Iterable[Result]) -> str:
    """Return a line for each trial, in order. Stalls are in seconds."""
    rows = [_HEAD, *map(_row, results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def _row(result: Result) -> tuple[str, ...]:
    stall = "waits" if result.stall_s is None else f"{result.stall_s:.1f} s"
    settled = " + ".join(map(str, result.shares))
    return (result.fault, str(result.injected), str(result.confirmed), stall, str(result.lost),
            str(result.double), settled)
