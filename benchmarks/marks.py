"""The marks: what the figures must reach for the project's promise of speed to hold."""

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from .figures import ratio
from .latency import Latencies
from .subjects import BARE, CEILING, NAIVE
from .throughput import Rates


class Mark(NamedTuple):
    """One figure and what it is held against."""

    what: str
    value: float
    target: str
    met: bool


def judge(rounds: Sequence[Rates], latencies: Latencies) -> list[Mark]:
    """Return every mark with its verdict. Ratios of one run: a rate alone says little."""
    over_naive = ratio(rounds, BARE, NAIVE).median
    over_ceiling = ratio(rounds, BARE, CEILING).median
    idle_ms = median(latencies.recorded_ms)
    return [
        Mark("durable, no effect / naive", over_naive, "at least 10", over_naive >= 10),
        Mark("durable, no effect / ceiling", over_ceiling, "at least 0.35", over_ceiling >= 0.35),
        Mark("idle, publish to recorded, median ms", idle_ms, "less than 15", idle_ms < 15),
    ]
