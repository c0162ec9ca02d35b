"""Everything that one run has found."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from .latency import Latencies
from .loads import Load
from .progress import Rates


@dataclass
class Results:
    """One run. `events` are of one series of one subject; each list has one entry a round."""

    machine: str
    events: int
    consuming: Sequence[Rates]
    calls: Sequence[Rates]
    publishing: Sequence[Rates]
    idle: Latencies
    sweep: Sequence[Rates] = field(default_factory=list)
    loads: Sequence[Load] = field(default_factory=list)
