"""Rounds: everything that is compared takes its turn in each, so that all meet the same machine."""

import sys
from collections.abc import Callable, Sequence

from .progress import Rates

Run = Callable[[], Rates]


def run_rounds(what: str, runs: Sequence[Run], rounds: int) -> list[Rates]:
    """Run everything once a round, and tell of it on standard error.

    Each round begins with another run: what the one before leaves behind (a warm page cache, a
    broker that still writes) shall not always meet the same one.
    """
    results = []
    for number in range(rounds):
        turn = number % len(runs)
        rates: Rates = {}
        for run in (*runs[turn:], *runs[:turn]):
            for name, found in run().items():
                rates[name] = found
                print(f"{what}, round {number + 1} of {rounds}: {name:30} "
                      f"{found.events_per_s:9,.0f}/s", file=sys.stderr)
        results.append(rates)
    return results
