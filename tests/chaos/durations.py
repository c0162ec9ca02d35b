"""How long faults last: the shortest duration of a row, or all of them with CHAOS_FULL=1."""

import os

FULL = bool(os.environ.get("CHAOS_FULL"))


def lasting(shortest: float, *longer: float) -> tuple[float, ...]:
    """Return the durations in seconds that a row is run with, for `parametrize`."""
    return (shortest, *longer) if FULL else (shortest,)


def often(times: int, full: int) -> int:
    """Return how often a fault is repeated."""
    return full if FULL else times
