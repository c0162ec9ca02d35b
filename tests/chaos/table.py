"""The results of a run as a table."""

from collections import defaultdict
from collections.abc import Iterable
from statistics import median

from chaos.trial import Result

_HEAD = (
    "fault",
    "runs",
    "injected",
    "confirmed",
    "lost",
    "double",
    "acks checked",
    "unchecked",
    "early",
    "recovery",
)


def table(results: Iterable[Result]) -> str:
    """Return a line for each fault and one for all; recovery is the median and the greatest."""
    by_fault: dict[str, list[Result]] = defaultdict(list)
    everything = list(results)
    for result in everything:
        by_fault[result.fault].append(result)
    rows = [_HEAD, *(_row(fault, found) for fault, found in sorted(by_fault.items()))]
    rows.append(_row("all", everything))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _row(fault: str, results: list[Result]) -> tuple[str, ...]:
    recoveries = [r.recovery_s for r in results if r.recovery_s is not None]
    numbers = (
        len(results),
        *(
            sum(getattr(r, name) for r in results)
            for name in (
                "injected",
                "confirmed",
                "lost",
                "double",
                "acks",
                "unchecked_acks",
                "early_acks",
            )
        ),
    )
    recovery = f"{median(recoveries):.1f} s, {max(recoveries):.1f} s" if recoveries else "-"
    return (fault, *map(str, numbers), recovery)
