"""How long faults last: the shortest duration of a row, or all of them with CHAOS_FULL=1."""

import os

FULL = bool(os.environ.get("CHAOS_FULL"))


def lasting(shortest: float, *longer: float) -> tuple[float, ...]:
    """Return the durations in seconds that a row is run with, for `parametrize`."""
    return (shortest, *longer) if FULL else (shortest,)


def rate(lasts_s: float, most: float = 200.0) -> float:
    """Return how many events a second a load may have that lasts about so long.

    Every record is read again whenever a trial looks what is done: a long load is a thin one.
    """
    return min(most, 12_000 / lasts_s)


def often(times: int, full: int) -> int:
    """Return how often a fault is repeated."""
    return full if FULL else times
