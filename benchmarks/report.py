"""What a run has found, how it is judged, and its page of tables in Markdown.

A figure is a list with one value a round, and empty where there is none.
"""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import NamedTuple

Table = dict[str, dict[str, list[float]]]
"""Figures by row and column."""
_ALLOWED_FALL = 0.20
_NONE = "-"


class Report(NamedTuple):
    """The tables of a run by their headings; `machine` is what the figures hold for."""

    machine: str
    rounds: int
    events: int
    tables: dict[str, Table]


class Mark(NamedTuple):
    """A figure to watch: a cell of a table, over that of a reference row if one is named.

    Round by round: a machine that is slower for a minute is so for both. The median of such ratios
    is not the ratio of the medians. An empty `row` is the last. It is judged where it has a
    `target`, "at least" or "at most" so much. What is `kept` is compared with later runs, and more
    of it is better.
    """

    name: str
    row: str
    column: str
    reference: str = ""
    target: str = ""
    kept: bool = False

    def values(self, table: Table) -> list[float]:
        """Return the figure."""
        values = table[self.row or list(table)[-1]][self.column]
        return ratio(values, table[self.reference][self.column]) if self.reference else values

    def met(self, table: Table) -> bool | None:
        """Return whether the median is within the target; None without one, or without a figure."""
        if not self.target or not (values := self.values(table)):
            return None
        bound, limit = self.target.rsplit(maxsplit=1)
        over = median(values) - float(limit)
        return over >= 0 if bound == "at least" else over <= 0


Marks = Sequence[tuple[Mark, Table]]
"""Marks, each with the table that it is of."""


def ratio(values: Sequence[float], references: Sequence[float]) -> list[float]:
    """Return each value over its reference, round by round."""
    return [value / reference for value, reference in zip(values, references, strict=True)]


def medians(marks: Marks) -> dict[str, float]:
    """Return what of the marks is kept."""
    return {mark.name: round(median(mark.values(table)), 4) for mark, table in marks if mark.kept}


def compare(kept: Mapping[str, float], now: Mapping[str, float]) -> Iterator[tuple[bool, str]]:
    """Yield for each ratio whether it has neither fallen nor got lost, and a line that says so."""
    for name, was in kept.items():
        if name not in now:
            yield False, f"MISSING  {name}: kept {was:.3f}, not measured now"
        else:
            passes = now[name] >= (1 - _ALLOWED_FALL) * was
            told = f"kept {was:.3f}, now {now[name]:.3f} ({100 * (now[name] / was - 1):+.0f} %)"
            yield passes, f"{'ok  ' if passes else 'FELL'}     {name}: {told}"
    for name in (name for name in now if name not in kept):
        yield True, f"new      {name}: {now[name]:.3f}, not kept yet: make bench keeps it"


def page(title: str, report: Report, marks: Marks, notes: Mapping[str, str]) -> str:
    """Return the marks and all tables, each with its note below its heading."""
    met = {True: "yes", False: "NO", None: _NONE}
    judged = [
        [mark.name, _figure(mark.values(table)), mark.target or _NONE, met[mark.met(table)]]
        for mark, table in marks
    ]
    events = f", of {report.events:,} events (slow consumers get fewer)" if report.events else ""
    how_to_read = (
        f"Rounds: {report.rounds}{events}. Each figure is a median (least to greatest). "
        f"{_NONE}: there is no figure. MB are 10⁶ bytes."
    )
    parts = [f"# {title}", f"{report.machine}.", how_to_read]
    if judged:
        parts += ["## Marks", _grid([["mark", "figure", "target", "met"], *judged])]
    for heading, table in report.tables.items():
        parts += filter(None, (f"## {heading}", notes.get(heading), _table(table)))
    return "\n\n".join(parts)


def _table(table: Table) -> str:
    """Return a table with a line a row; one that is much wider than long is turned."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    rows = [
        [name, *(_figure(row.get(each, [])) for each in columns)] for name, row in table.items()
    ]
    lines = [["", *columns], *rows]
    is_wide = len(columns) > 2 * len(table)
    return _grid(list(map(list, zip(*lines, strict=True))) if is_wide else lines)


def _figure(values: Sequence[float]) -> str:
    """Write `median (least to greatest)`, each with three digits and all before the point."""
    if not values:
        return _NONE
    middle, least, greatest = (
        f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
        for value in (median(values), min(values), max(values))
    )
    return f"{middle} ({least} to {greatest})" if least != greatest else middle


def _grid(lines: Sequence[Sequence[str]]) -> str:
    """Return the lines below the first, its head; all columns but the first hold numbers."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        f"| {' | '.join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])])} |"
        for first, *others in (lines[0], rule, *lines[1:])
    )
