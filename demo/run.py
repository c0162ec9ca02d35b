"""A run as it is reported: its story, and its numbers over time."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from demo.play import BREAKERS, COUNTERS, Play
from demo.screen import Entry
from demo.stage import NO_ANSWER, SERVICES, Stage
from demo.watch import Watch

_HALF_S = 0.5
"""A point counts the second before its flush, whose time is rounded: this is its middle."""

Line = Sequence[tuple[float, float]]
"""A number over time: from each time on (Unix, in seconds) it has the value beside it."""


@dataclass(frozen=True)
class Run:
    """All that the report shows."""

    story: Sequence[Entry]
    place: str
    versions: Sequence[str]
    counted_by: str
    totals: dict[str, Line]
    """By counter: its sum so far."""
    waiting: dict[str, Line]
    """By queue: the messages that no consumer has."""
    breakers: dict[str, Line]
    """By service: how many of its circuit breakers are open."""
    ended_at: float


def run_of(play: Play, watch: Watch) -> Run:
    """Put together what has been told and seen, while the stage still answers."""
    samples = list(watch.samples)
    stored = _stored(play.stage)
    sampled = {name: _known((s.at, s.counts[name]) for s in samples) for name in COUNTERS}
    return Run(
        story=list(play.screen.story),
        place=play.stage.place,
        versions=_versions(play.stage),
        counted_by="Graphite's render API" if stored else "samples taken twice a second",
        totals=stored or sampled,
        waiting={name: _known((s.at, s.waiting[name]) for s in samples) for name in SERVICES},
        breakers={name: _known((s.at, s.breakers[name]) for s in samples) for name in BREAKERS},
        ended_at=time.time(),
    )


def _stored(stage: Stage) -> dict[str, Line] | None:
    totals: dict[str, Line] = {}
    for counter in COUNTERS:
        try:
            points = stage.points(counter)
        except NO_ANSWER:
            return None
        if not points:
            return None
        middles = (at - _HALF_S for at, _ in points)
        sums = accumulate(increase for _, increase in points)
        totals[counter] = list(zip(middles, sums, strict=True))
    return totals


def _known(values: Iterable[tuple[float, int | None]]) -> Line:
    return [(at, value) for at, value in values if value is not None]


def _versions(stage: Stage) -> list[str]:
    try:
        return stage.versions()
    except NO_ANSWER:
        return []
