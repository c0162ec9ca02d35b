"""How long faults last and how often they come: CHAOS_FULL, CHAOS_MINUTES and CHAOS_SEED."""

import os
import random
from typing import Any

import pytest

FULL = bool(os.environ.get("CHAOS_FULL"))
"""Whether each row is run with all its durations, and not with the shortest alone."""

MINUTES = float(os.environ.get("CHAOS_MINUTES") or 0)
SEED = int(os.environ.get("CHAOS_SEED", "") or random.randrange(1 << 32))
"""How long the soak is and which seed it has."""


def lasting(shortest: float, *longer: float) -> tuple[float, ...]:
    """Return the durations in seconds that a row is run with, for `parametrize`."""
    return (shortest, *longer) if FULL else (shortest,)


def rate(lasts_s: float, most: float = 200.0) -> float:
    """Return how many events a second a load may have that lasts about so long.

    Every record is read again whenever a trial looks what is done: a long load is a thin one.
    """
    return min(most, 12_000 / lasts_s)


def often(times: int, full: int) -> int:
    return full if FULL else times


def quick(*values: Any) -> Any:
    """Return values for `parametrize` with which a row is run by `make integration-test` too."""
    return pytest.param(*values, marks=pytest.mark.quick)
