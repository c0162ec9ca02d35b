"""A figure taken several times: its median, and how far the others lie from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import NamedTuple

from .progress import Rates


class Spread(NamedTuple):
    """The median of some values, and the least and the greatest."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return the spread of at least one value."""
        ordered = sorted(values)
        return cls(median(ordered), ordered[0], ordered[-1])


def per_s(rounds: Sequence[Rates], name: str) -> Spread:
    """Return a subject's events per second, over the rounds that it took part in."""
    return Spread.of(rates[name].events_per_s for rates in rounds if name in rates)


def cpu_us(rounds: Sequence[Rates], name: str) -> Spread:
    """Return a subject's CPU microseconds per event."""
    return Spread.of(rates[name].cpu_us for rates in rounds if name in rates)


def ratio(rounds: Sequence[Rates], name: str, reference: str) -> Spread:
    """Return a subject's rate over a reference's.

    Each round gives one ratio of two runs that lie close together: a machine that is slower for
    a minute is so for both. The median of these is not the ratio of the medians.
    """
    return Spread.of(
        rates[name].events_per_s / rates[reference].events_per_s
        for rates in rounds
        if name in rates and reference in rates
    )


def percentile(values: Sequence[float], per_mille: int) -> float | None:
    """Return the value that so many of a thousand samples do not exceed, by its rank.

    None where there are too few samples for one of them to lie beyond it: the p99.9 of less than
    a thousand would be their greatest by another name.
    """
    if len(values) * (1000 - per_mille) < 1000:
        return None
    rank = -(-len(values) * per_mille // 1000)
    return sorted(values)[rank - 1]


def show(spread: Spread, number_format: Callable[[float], str]) -> str:
    """Write `median (least to greatest)`."""
    return (
        f"{number_format(spread.median)} "
        f"({number_format(spread.least)} to {number_format(spread.greatest)})"
    )
