"""The ratios of a run, the marks that it must reach, and how its ratios compare with those kept.

Ratios of one run, since a rate alone says more about the machine. More is better in all of them:
the latency's is of the bare steps to the service's time.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from .results import Bench, Growth, Sample, Size, Spread, Steady, per_s, ratio
from .subjects import (
    BARE,
    BARE_SMALL,
    CALLS,
    CEILING,
    CONFIRMED,
    DUPLICATES,
    HALF,
    NAIVE,
    ORDER,
    ORDER_SMALL,
    UNCONFIRMED,
    Calls,
)

_ALLOWED_FALL = 0.20
_SHORTEST_TO_JUDGE_S = 540
"""A third of it has to hold the window and two compactions; before that everything grows."""

_CONSUMING = {
    "durable, no effect / ceiling": (BARE.name, CEILING.name, 0.60),
    "durable, one effect / ceiling": (ORDER.name, CEILING.name, 0.50),
    "durable, no effect / ceiling, 128 operations": (BARE_SMALL.name, CEILING.name, 0.45),
    "durable, one effect / ceiling, 128 operations": (ORDER_SMALL.name, CEILING.name, 0.35),
    "half duplicates / ceiling": (HALF.name, CEILING.name, None),
    "all duplicates, cache warm / ceiling": (DUPLICATES, CEILING.name, 0.70),
    "durable, no effect / naive": (BARE.name, NAIVE.name, 25.0),
}
"""The subjects of each ratio, and the least that it must be."""
_PUBLISHING = {"confirmed publishing / pika without confirms": (CONFIRMED, UNCONFIRMED, 0.60)}
_AT_ONCE = 0.40
"""Of the client alone, to a receiver that answers at once."""
_SLOTS, _CLIENT = 0.9, 0.6
"""Of what the slots allow, or of the client alone, to a receiver that takes 100 ms: the less."""
IDLE = "bare steps / publish to recorded, idle, medians"
_IDLE_AT_MOST = 1.4
_GROWS_AT_MOST = 1.10

MEASURES: dict[str, tuple[Callable[[Sample], float], str]] = {
    "service MB": (lambda sample: sample.memory / 1e6, ",.1f"),
    "etcd MB": (lambda sample: sample.etcd.memory / 1e6, ",.0f"),
    "file MB": (lambda sample: sample.etcd.file / 1e6, ",.0f"),
    "in use MB": (lambda sample: sample.etcd.used / 1e6, ",.0f"),
    "records": (lambda sample: sample.etcd.keys, ",.0f"),
    "leases": (lambda sample: sample.etcd.leases, ",.0f"),
}
"""What must not grow in a steady run, and how it is written."""


class Mark(NamedTuple):
    """One figure and what it is held against."""

    what: str
    value: float
    target: str
    met: bool

    def __str__(self) -> str:
        return f"{'met' if self.met else 'MISSED'}: {self.what}: {self.value:.3g}, {self.target}"


def at_least(what: str, value: float, least: float) -> Mark:
    """Return a mark of what has to reach something."""
    return Mark(what, value, f"at least {least:g}", value >= least)


def at_most(what: str, value: float, most: float) -> Mark:
    """Return a mark of what has to stay below something."""
    return Mark(what, value, f"at most {most:g}", value <= most)


def verdict(marks: Sequence[Mark]) -> str:
    """Return the last line of a run."""
    missed = [mark.what for mark in marks if not mark.met]
    if not missed:
        return f"All {len(marks)} marks are met."
    return f"{len(missed)} of {len(marks)} marks MISSED: {'; '.join(missed)}"


def of_client(calls: Calls) -> str:
    """Return the name of the ratio of calls for events to the same calls by the client alone."""
    return f"calls / client alone: {calls.name}"


def of_slots(calls: Calls) -> str:
    """Return the name of the ratio of calls for events to those that their slots allow."""
    return f"calls / what the slots allow: {calls.name}"


def ratios(found: Bench) -> dict[str, Spread]:
    """Return each ratio by its name; the idle latency's is one of medians, without a spread."""
    bare_over_recorded = median(found.idle.bare_ms) / median(found.idle.recorded_ms)
    return {
        **{name: ratio(found.consuming, a, b) for name, (a, b, _) in _CONSUMING.items()},
        **{of_client(calls): ratio(found.calls, calls.name, calls.alone) for calls in CALLS},
        **{
            of_slots(calls): Spread(*(rate / most for rate in per_s(found.calls, calls.name)))
            for calls in CALLS
            if (most := calls.most_per_s)
        },
        **{name: ratio(found.publishing, a, b) for name, (a, b, _) in _PUBLISHING.items()},
        IDLE: Spread.of([bare_over_recorded]),
    }


def judge_bench(found: Bench) -> list[Mark]:
    """Return every mark with its verdict, by the median of its ratio."""
    of = {name: spread.median for name, spread in ratios(found).items()}
    marks = [
        at_least(name, of[name], least)
        for name, (_, _, least) in (_CONSUMING | _PUBLISHING).items()
        if least is not None
    ]
    for calls in CALLS:
        if calls.answer_ms == 0:
            marks.append(at_least(of_client(calls), of[of_client(calls)], _AT_ONCE))
        elif calls.answer_ms == 100:
            bound = f"({_SLOTS:g} of the slots or {_CLIENT:g} of the client alone)"
            slots, client = of[of_slots(calls)] / _SLOTS, of[of_client(calls)] / _CLIENT
            marks.append(at_least(f"calls / {bound}: {calls.name}", max(slots, client), 1))
    over_bare = 1 / of[IDLE]
    return [
        *marks,
        at_most("publish to recorded, idle / bare steps, medians", over_bare, _IDLE_AT_MOST),
    ]


def slowdown(found: Growth, size: Size) -> float:
    """Return how many times as long as with an empty history the first event takes."""
    first_ms = [median(start.first_ms for start in each.starts) for each in (size, found.sizes[0])]
    return first_ms[0] / first_ms[1]


def memory(size: Size) -> float:
    """Return a service's resident bytes after its import."""
    return median(start.memory for start in size.starts)


def memory_of_record(found: Growth, size: Size) -> float:
    """Return what a record adds to that, in bytes."""
    return (memory(size) - memory(found.sizes[0])) / size.records


def judge_growth(found: Growth) -> list[Mark]:
    """Return the marks that the longest history is held to."""
    longest = found.sizes[-1]
    name, asked = f"{longest.records:,} records", longest.transactions
    import_s = median(start.import_s for start in longest.starts)
    duplicates = f"{name}: transactions for {longest.duplicates:,} duplicates"
    return [
        at_most(f"{name}: first event recorded ÷ empty start", slowdown(found, longest), 1.5),
        at_most(f"{name}: import, s", import_s, 5),
        at_most(f"{name}: resident bytes a record", memory_of_record(found, longest), 100),
        Mark(duplicates, asked, "none", asked == 0),
    ]


def judge_steady(found: Steady) -> list[Mark]:
    """Hold the last third against the one before it; none where the run was too short.

    The first third is left out: there everything grows.
    """
    samples, third = found.samples, len(found.samples) // 3
    if samples[-1].at_s < _SHORTEST_TO_JUDGE_S:
        return []
    middle, last = samples[third : 2 * third], samples[2 * third :]
    grown = {
        name: median(map(of, last)) / median(map(of, middle)) for name, (of, _) in MEASURES.items()
    }
    slower = recorded_per_s(last) / recorded_per_s(middle)
    late_s = max(oldest_lease_s(samples)) - found.lease_s
    thirds = "last third ÷ the one before"
    return [
        *(at_most(f"{name}, {thirds}", value, _GROWS_AT_MOST) for name, value in grown.items()),
        at_least(f"events/s, {thirds}", slower, 0.9),
        at_most("the oldest lease, s over its time", late_s, 15),
    ]


def recorded_per_s(samples: Sequence[Sample]) -> float:
    """Return how many records were written a second."""
    first, last = samples[0], samples[-1]
    return (last.etcd.written - first.etcd.written) / (last.at_s - first.at_s)


def oldest_lease_s(samples: Sequence[Sample]) -> list[float]:
    """Return how old the oldest lease was at each sample, from above, to within two samples.

    Leases all last equally long, so the first that is not revoked yet is the oldest.
    """
    ages_s, before = [], 0
    for sample in samples:
        while before + 1 < len(samples) and samples[before + 1].etcd.granted <= sample.etcd.revoked:
            before += 1
        ages_s.append(max(0.0, sample.at_s - samples[before].at_s))
    return ages_s


def medians(found: Bench) -> dict[str, float]:
    """Return what of the ratios is kept."""
    return {name: round(spread.median, 4) for name, spread in ratios(found).items()}


def write_ratios(path: Path, kept: Mapping[str, float]) -> None:
    """Keep ratios."""
    path.write_text(json.dumps(kept, indent=1) + "\n")


def read_ratios(path: Path) -> dict[str, float]:
    """Read what is kept; raises OSError, or ValueError for what are no ratios."""
    kept: object = json.loads(path.read_text())
    if not isinstance(kept, dict) or not all(
        isinstance(value, int | float) and value > 0 for value in kept.values()
    ):
        raise ValueError(f"{path} does not hold ratios by name")
    return kept


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
