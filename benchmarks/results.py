"""What a run has found, its arithmetic, and the JSON that keeps it: a tuple is a list there."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import UnionType
from typing import Any, NamedTuple, Self, TypeVar, get_args, get_origin, get_type_hints

PER_MILLE = {"p50": 500, "p99": 990, "p99.9": 999}
"""The percentiles by their names."""

_DIGITS = 4

T = TypeVar("T")


class NotMeasuredError(Exception):
    """The run gave no figure; the message says why."""


class Rate(NamedTuple):
    """What one series of events gave, and the CPU time of the measured process for each."""

    events_per_s: float
    cpu_us: float


Rates = dict[str, Rate]
"""What one round gave, by the name of what was measured."""


class Spread(NamedTuple):
    """A figure taken several times: its median, and how far the others lie from it."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """Return the spread of at least one value."""
        ordered = sorted(values)
        return cls(median(ordered), ordered[0], ordered[-1])


class Idle(NamedTuple):
    """Latencies of single events, and of the steps that nobody can avoid; one of each a sample."""

    recorded_ms: list[float]
    round_trip_ms: list[float]
    put_ms: list[float]

    @property
    def bare_ms(self) -> list[float]:
        """What one event costs at the least: through the broker, then into etcd."""
        return [a + b for a, b in zip(self.round_trip_ms, self.put_ms, strict=True)]


class Load(NamedTuple):
    """One round at one rate: what the publisher reached, by how much it was late, the latencies."""

    due_per_s: int
    per_s: float
    late_ms: float
    recorded_ms: list[float]


@dataclass
class Percentiles:
    """What all rounds at one rate have found; `slowest_per_s` is the least that was reached.

    Each percentile is of all samples together, with the least and the greatest of the rounds
    where every round has enough samples for one of its own. None: too few in all, or a publisher
    that did not keep its rate, so that nobody knows the latency at that rate.
    """

    per_s: int
    samples: int
    slowest_per_s: float
    late_ms: Spread
    ms: dict[str, Spread | None]

    @property
    def kept(self) -> bool:
        """Whether the publisher kept its rate: else the latencies are those of its own trouble."""
        return self.slowest_per_s >= 0.99 * self.per_s

    @classmethod
    def of(cls, loads: Sequence[Load]) -> Self:
        """Return those of the rounds at one rate."""
        rounds = [load.recorded_ms for load in loads]
        slowest_per_s = min(load.per_s for load in loads)
        late_ms = Spread.of(load.late_ms for load in loads)
        ms = {name: _pooled(rounds, per_mille) for name, per_mille in PER_MILLE.items()}
        found = cls(loads[0].due_per_s, sum(map(len, rounds)), slowest_per_s, late_ms, ms)
        if not found.kept:
            found.ms = dict.fromkeys(PER_MILLE)
        return found


@dataclass
class Bench:
    """Of `bench`: rates round by round, of series of so many events."""

    machine: str
    events: int
    consuming: list[Rates]
    calls: list[Rates]
    publishing: list[Rates]
    idle: Idle
    sweep: list[Rates]
    loads: list[Percentiles]


class Gauges(NamedTuple):
    """What etcd says of itself. Sizes are in bytes; the last four are totals since its start.

    `memory` is its resident size, which includes what it has mapped of its file; `used` is what
    of the file is not free for new data; written are keys.
    """

    memory: int
    file: int
    used: int
    keys: int
    granted: int
    revoked: int
    written: int
    transactions: int

    @property
    def leases(self) -> int:
        """How many leases there are."""
        return self.granted - self.revoked


class Start(NamedTuple):
    """One start: process start to first record, the import, resident bytes afterwards."""

    first_ms: float
    import_s: float
    memory: int


@dataclass
class Size:
    """One length of the history; the transactions are those that etcd saw for the duplicates."""

    records: int
    etcd: Gauges
    starts: list[Start]
    duplicates: int
    transactions: int
    rate: Rate


@dataclass
class Growth:
    """Of `growth`: the sizes, the empty one first, and what a deletion adds to etcd's file."""

    machine: str
    sizes: list[Size]
    deletion_bytes: float


class Sample(NamedTuple):
    """What was seen at one time, in seconds since the load began. `memory` is the service's."""

    at_s: float
    memory: int
    ready: int
    etcd: Gauges


@dataclass
class Steady:
    """Of `steady`: samples under load; the last record and its space were gone so long after it."""

    machine: str
    window_s: int
    lease_s: int
    compaction: str
    samples: list[Sample]
    published: int
    recorded: int
    gone_s: float
    freed_s: float
    emptied: Gauges


def per_s(rounds: Sequence[Rates], name: str) -> Spread:
    """Return a subject's events per second, over the rounds that it took part in."""
    return Spread.of(rates[name].events_per_s for rates in rounds if name in rates)


def cpu_us(rounds: Sequence[Rates], name: str) -> Spread:
    """Return a subject's CPU microseconds per event."""
    return Spread.of(rates[name].cpu_us for rates in rounds if name in rates)


def ratio(rounds: Sequence[Rates], name: str, reference: str) -> Spread:
    """Return a subject's rate over a reference's, round by round.

    A machine that is slower for a minute is so for both. The median of these is not the ratio of
    the medians.
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


def _pooled(rounds: Sequence[Sequence[float]], per_mille: int) -> Spread | None:
    pooled = percentile([ms for values in rounds for ms in values], per_mille)
    if pooled is None:
        return None
    own = [ms for values in rounds if (ms := percentile(values, per_mille)) is not None]
    return Spread(pooled, *(min(own), max(own)) if len(own) == len(rounds) else (pooled, pooled))


def write(found: Bench | Growth | Steady, path: Path) -> None:
    """Keep a run, a line for each of its members."""
    text = json.dumps(asdict(found))
    rounded = json.loads(text, parse_float=lambda number: round(float(number), _DIGITS))
    lines = ",\n".join(f'"{name}": {json.dumps(value)}' for name, value in rounded.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{{\n{lines}\n}}\n")


def read(kind: type[T], path: Path) -> T:
    """Read what was kept; raises OSError, and what comes of a file that holds something else."""
    found: T = _typed(kind, json.loads(path.read_text()))
    return found


def _typed(kind: Any, found: Any) -> Any:
    """Give JSON the types that it was written from."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return None if found is None else _typed(arguments[0], found)
    if origin is list:
        return [_typed(arguments[0], each) for each in found]
    if origin is dict:
        return {name: _typed(arguments[1], each) for name, each in found.items()}
    if isinstance(found, dict):
        hints = get_type_hints(kind)
        return kind(**{name: _typed(hints[name], each) for name, each in found.items()})
    if isinstance(found, list):
        return kind(*map(_typed, get_type_hints(kind).values(), found))
    return found
