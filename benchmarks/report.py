"""A run's figures, how they are judged, and their page of tables in Markdown.

A figure is a list with one value for each round; it is empty if there is no figure.
"""

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

Table = dict[str, dict[str, list[float]]]
"""Figures by row and column."""
_ALLOWED_FALL = 0.20
_NONE = "-"


class Report(NamedTuple):
    """The tables of a run by their headings, and the machine that they were measured on."""

    machine: str
    rounds: int
    events: int
    tables: dict[str, Table]


class Mark(NamedTuple):
    """A figure to watch, as described in scenarios.toml; it is judged if it has a target."""

    name: str
    values: list[float]
    target: str = ""
    kept: bool = True

    @property
    def met(self) -> bool | None:
        """Whether the median meets the target; None without a target or a figure."""
        if not self.target or not self.values:
            return None
        bound, limit = self.target.rsplit(maxsplit=1)
        over = median(self.values) - float(limit)
        return over >= 0 if bound == "at least" else over <= 0


def marks(
    table: Table,
    column: str = "events/s",
    name: str = "{column}",
    rows: str = "",
    over: str = "",
    **more: Any,
) -> Iterator[Mark]:
    """Yield a mark of scenarios.toml for each row of a table that it names.

    A ratio is taken round by round, since a machine that is slow for a minute slows both. The
    median of such ratios is not the ratio of the medians.
    """
    for row in fnmatch.filter(table, rows) if rows else list(table)[-1:]:
        values = table[row][column]
        figure = ratio(values, table[over][column]) if over else values
        yield Mark(name.format(row=row, column=column), figure, **more)


def ratio(values: Sequence[float], references: Sequence[float]) -> list[float]:
    """Return each value over its reference, round by round."""
    return [value / reference for value, reference in zip(values, references, strict=True)]


def medians(found: Iterable[Mark]) -> dict[str, float]:
    """Return the medians of the marks that are kept."""
    return {mark.name: median(mark.values) for mark in found if mark.kept}


def compare(kept: Mapping[str, float], now: Mapping[str, float]) -> Iterator[tuple[bool, str]]:
    """Yield for each ratio whether it passes, and a line; it fails if it is gone or has fallen."""
    for name in {**kept, **now}:
        if name not in now:
            yield False, f"MISSING  {name}: kept {kept[name]:.3f}, not measured now"
        elif name not in kept:
            yield True, f"new      {name}: {now[name]:.3f}, not kept yet: make bench keeps it"
        else:
            change = now[name] / kept[name] - 1
            told = f"kept {kept[name]:.3f}, now {now[name]:.3f} ({100 * change:+.0f} %)"
            passes = change >= -_ALLOWED_FALL
            yield passes, f"{'ok  ' if passes else 'FELL'}     {name}: {told}"


def page(title: str, report: Report, watched: Sequence[Mark], notes: Mapping[str, str]) -> str:
    met = {True: "yes", False: "NO", None: _NONE}
    judged = [
        [mark.name, _figure(mark.values), mark.target or _NONE, met[mark.met]] for mark in watched
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
    """Return a table in Markdown, with rows and columns swapped if it is much wider than long."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    rows = [
        [name, *(_figure(row.get(each, [])) for each in columns)] for name, row in table.items()
    ]
    lines = [["", *columns], *rows]
    is_wide = len(columns) > 2 * len(table)
    return _grid(list(map(list, zip(*lines, strict=True))) if is_wide else lines)


def _figure(values: Sequence[float]) -> str:
    """Return `median (least to greatest)`, each with at least three digits."""
    if not values:
        return _NONE
    middle, least, greatest = (
        f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
        for value in (median(values), min(values), max(values))
    )
    return f"{middle} ({least} to {greatest})" if least != greatest else middle


def _grid(lines: Sequence[Sequence[str]]) -> str:
    """Return lines as a table; the first is its head, and all columns but the first are numbers."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        f"| {' | '.join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])])} |"
        for first, *others in (lines[0], rule, *lines[1:])
    )
