"""Many runs, on several cores."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context

from simulation.world import simulate

_CHUNK = 50


@dataclass
class Summary:
    """What some runs came to; ``broken`` is the seed of the first with a violation."""

    fired: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    confirmed: int = 0
    acks: int = 0
    broken: int | None = None

    def add(self, other: Summary) -> None:
        """Take in the summary of the runs after these."""
        self.fired.update(other.fired)
        self.runs += other.runs
        self.confirmed += other.confirmed
        self.acks += other.acks
        self.broken = other.broken if self.broken is None else self.broken


def run_seeds(seeds: range) -> Summary:
    """Run some seeds, up to the first violation."""
    summary = Summary()
    gc.disable()  # It takes a sixth of the time, and 50 runs leave some 60 MB.
    for seed in seeds:
        result = simulate(seed)
        summary.add(
            Summary(
                result.fired, 1, result.confirmed, result.acks, seed if result.violations else None
            )
        )
        if summary.broken is not None:
            break
    gc.enable()
    return summary


def run_on_cores(first: int, seeds: int, jobs: int) -> Iterator[Summary]:
    """Run seeds in several processes; yield a summary for each few of them, in their order."""
    last = first + seeds
    chunks = [range(start, min(start + _CHUNK, last)) for start in range(first, last, _CHUNK)]
    context = get_context("forkserver")
    context.set_forkserver_preload(["simulation.world"])
    # A process for each: what its runs have left goes with it, and nobody has to collect it.
    with context.Pool(jobs, maxtasksperchild=1) as pool:
        yield from pool.imap(run_seeds, chunks)
