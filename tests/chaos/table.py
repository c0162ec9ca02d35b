"""The results of a run as a table."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import median

from chaos.trial import Result

_SUMS = {
    "injected": "injected",
    "confirmed": "confirmed",
    "held": "held",
    "lost": "lost",
    "double": "double",
    "acks checked": "acks",
    "unchecked": "unchecked_acks",
    "early": "early_acks",
}
"""Columns, and the attributes of the results that are summed up in them."""


def table(results: Iterable[Result]) -> str:
    """Return a line for each fault and one for all; recovery is the median and the greatest."""
    by_fault: dict[str, list[Result]] = defaultdict(list)
    everything = list(results)
    for result in everything:
        by_fault[result.fault].append(result)
    rows = [_row(fault, found) for fault, found in [*sorted(by_fault.items()), ("all", everything)]]
    return aligned([("fault", "runs", *_SUMS, "recovery"), *rows])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines with columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )


def _row(fault: str, results: list[Result]) -> tuple[str, ...]:
    sums = (sum(getattr(result, name) for result in results) for name in _SUMS.values())
    recoveries = [r.recovery_s for r in results if r.recovery_s is not None]
    recovery = f"{median(recoveries):.1f} s, {max(recoveries):.1f} s" if recoveries else "-"
    return (fault, str(len(results)), *map(str, sums), recovery)
