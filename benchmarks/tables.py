"""A run as a page of tables, in Markdown, to read on a terminal too."""

from collections.abc import Mapping, Sequence
from statistics import median

from .figures import Mark, Report, Table

_NONE = "-"
_HOW_TO_READ = (
    f"Each figure is a median (least to greatest). {_NONE}: there is no figure. MB are 10⁶ bytes."
)


def page(
    title: str,
    report: Report,
    marks: Sequence[tuple[Mark, Table]],
    notes: Mapping[str, str],
) -> str:
    """Return the marks and all tables, each with its note below its heading."""
    ratios = {m.name: {"ratio, round by round": m.values(table)} for m, table in marks if m.kept}
    sections = {
        "Marks": _marks(marks),
        **{heading: _table(table) for heading, table in report.tables.items()},
        "Ratios": _table(ratios),
    }
    events = f", of {report.events:,} events (slow consumers get fewer)" if report.events else ""
    rounds = f"Rounds: {report.rounds}{events}."
    parts = [f"# {title}", f"{report.machine}.", f"{rounds} {_HOW_TO_READ}"]
    for heading, lines in sections.items():
        if lines:
            parts += filter(None, (f"## {heading}", notes.get(heading), lines))
    return "\n\n".join(parts)


def number(value: float) -> str:
    """Write a figure with three digits, and all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _marks(marks: Sequence[tuple[Mark, Table]]) -> str:
    lines = [["mark", "median", "target", "met"]]
    for mark, table in marks:
        if mark.target:
            values, met = mark.values(table), {True: "yes", False: "NO", None: _NONE}
            shown = number(median(values)) if values else _NONE
            lines.append([mark.name, shown, mark.target, met[mark.met(table)]])
    return _grid(lines)


def _table(table: Table) -> str:
    """Return a table with a line a row; one that is much wider than long is turned."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    lines = [["", *columns]]
    for name, row in table.items():
        lines.append([name, *(_figure(row.get(column, [])) for column in columns)])
    is_wide = len(columns) > 2 * len(table)
    return _grid(list(map(list, zip(*lines, strict=True))) if is_wide else lines)


def _figure(values: Sequence[float]) -> str:
    """Write `median (least to greatest)`."""
    if not values:
        return _NONE
    middle, least, greatest = map(number, (median(values), min(values), max(values)))
    return f"{middle} ({least} to {greatest})" if least != greatest else middle


def _grid(lines: Sequence[Sequence[str]]) -> str:
    """Return the lines below the first, its head; all columns but the first hold numbers."""
    if len(lines) < 2:
        return ""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        f"| {' | '.join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])])} |"
        for first, *others in (lines[0], rule, *lines[1:])
    )
