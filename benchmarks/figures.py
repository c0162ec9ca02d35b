"""What a run has found, its arithmetic, and how it is judged.

A figure is a list with one value a round, and empty where there is none. A table has figures by
row and column.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from statistics import median

Table = dict[str, dict[str, list[float]]]

_ALLOWED_FALL = 0.20


class NotMeasuredError(Exception):
    """The run gave no figure; the message says why."""


@dataclass
class Report:
    """The tables of a run by their headings; `machine` is what the figures hold for."""

    machine: str
    rounds: int
    events: int
    tables: dict[str, Table]

    def write(self, path: Path) -> None:
        """Keep it as JSON, a line a row."""
        text = json.dumps(asdict(self), ensure_ascii=False)
        path.write_text(text.replace('}, "', '},\n"') + "\n")

    @classmethod
    def read(cls, path: Path) -> "Report":
        """Read what was kept; raises OSError, or ValueError for what is no JSON."""
        return cls(**json.loads(path.read_text()))


@dataclass(frozen=True)
class Mark:
    """A figure to watch: a cell of a table, over that of a reference row if one is named.

    Round by round: a machine that is slower for a minute is so for both. The median of such ratios
    is not the ratio of the medians. An empty `row` is the last. It is judged where it has a bound.
    What is `kept` is compared with later runs, and more of it is better.
    """

    name: str
    row: str
    column: str
    reference: str = ""
    kept: bool = False
    at_least: float = -inf
    at_most: float = inf

    def values(self, table: Table) -> list[float]:
        """Return the figure."""
        values = table[self.row or list(table)[-1]][self.column]
        return ratio(values, table[self.reference][self.column]) if self.reference else values

    @property
    def target(self) -> str:
        """The bound in words; empty where there is none."""
        least = "" if self.at_least == -inf else f"at least {self.at_least:g}"
        return least or ("" if self.at_most == inf else f"at most {self.at_most:g}")

    def met(self, table: Table) -> bool | None:
        """Return whether the median is within the bounds; None where there is no figure."""
        values = self.values(table)
        return self.at_least <= median(values) <= self.at_most if values else None


def ratio(values: Sequence[float], references: Sequence[float]) -> list[float]:
    """Return each value over its reference, round by round."""
    return [value / reference for value, reference in zip(values, references, strict=True)]


def add_shares(table: Table, reference: str, column: str) -> Table:
    """Add to each row its events/s over those of a reference row."""
    for row in table.values():
        row[column] = ratio(row["events/s"], table[reference]["events/s"])
    return table


def percentile(values: Sequence[float], per_mille: int) -> float | None:
    """Return the value that so many of a thousand samples do not exceed, by its rank.

    None where there are too few samples for one of them to lie beyond it: the p99.9 of less than
    a thousand would be their greatest by another name.
    """
    if len(values) * (1000 - per_mille) < 1000:
        return None
    rank = -(-len(values) * per_mille // 1000)
    return sorted(values)[rank - 1]


def pooled(rounds: Sequence[Sequence[float]], per_mille: int) -> list[float]:
    """Return the percentile of all rounds together, between the least and the greatest of them.

    It always lies between these, so it is the median of the three. It is alone where a round has
    too few samples for a percentile of its own, and there is none where all together have.
    """
    whole = percentile([value for values in rounds for value in values], per_mille)
    own = [found for values in rounds if (found := percentile(values, per_mille)) is not None]
    if whole is None:
        return []
    return [min(own), whole, max(own)] if len(own) == len(rounds) else [whole]


def medians(marks: Sequence[tuple[Mark, Table]]) -> dict[str, float]:
    """Return what of the marks is kept."""
    return {mark.name: round(median(mark.values(table)), 4) for mark, table in marks if mark.kept}


def compare(kept: Mapping[str, float], now: Mapping[str, float]) -> list[tuple[bool, str]]:
    """Return for each ratio whether it has neither fallen nor got lost, and a line that says so.

    In the order in which they were kept; what is new comes last, and passes.
    """
    found = []
    for name, before in kept.items():
        if name not in now:
            found.append((False, f"MISSING  {name}: kept {before:.3f}, not measured now"))
            continue
        passes = now[name] >= (1 - _ALLOWED_FALL) * before
        change = f"kept {before:.3f}, now {now[name]:.3f} ({100 * (now[name] / before - 1):+.0f} %)"
        found.append((passes, f"{'ok  ' if passes else 'FELL'}     {name}: {change}"))
    return found + [
        (True, f"new      {name}: {now[name]:.3f}, not kept yet: make bench keeps it")
        for name in now
        if name not in kept
    ]
