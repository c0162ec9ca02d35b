"""The percentiles of the latencies, by load: of all rounds together, and how far rounds differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .figures import Spread, percentile
from .loads import Load

PER_MILLE = {"p50": 500, "p99": 990, "p99.9": 999}
"""The percentiles by their names."""


class Percentiles(NamedTuple):
    """What all rounds at one rate have found; `slowest_per_s` is what the publisher reached.

    Each percentile is of all samples together, with the least and the greatest of the rounds
    where every round has enough samples for one of its own. None: too few in all, or a publisher
    that did not keep its rate, so that nobody knows the latency at that rate.
    """

    per_s: int
    samples: int
    kept: bool
    slowest_per_s: float
    late_ms: Spread
    ms: dict[str, Spread | None]


def by_rate(loads: Sequence[Load]) -> list[Percentiles]:
    """Return the percentiles at each rate, lowest first."""
    rates = sorted({load.due_per_s for load in loads})
    return [_of([load for load in loads if load.due_per_s == per_s]) for per_s in rates]


def _of(rounds: Sequence[Load]) -> Percentiles:
    kept = all(load.kept for load in rounds)
    return Percentiles(
        per_s=rounds[0].due_per_s,
        samples=sum(len(load.recorded_ms) for load in rounds),
        kept=kept,
        slowest_per_s=min(load.per_s for load in rounds),
        late_ms=Spread.of(load.late_ms for load in rounds),
        ms={
            name: _spread([load.recorded_ms for load in rounds], per_mille) if kept else None
            for name, per_mille in PER_MILLE.items()
        },
    )


def _spread(rounds: Sequence[Sequence[float]], per_mille: int) -> Spread | None:
    pooled = percentile([ms for values in rounds for ms in values], per_mille)
    if pooled is None:
        return None
    own = [percentile(values, per_mille) for values in rounds]
    enough = [value for value in own if value is not None]
    if len(enough) < len(rounds):
        return Spread(pooled, pooled, pooled)
    return Spread(pooled, min(enough), max(enough))
