"""How long faults last and how often they occur: CHAOS_FULL, CHAOS_MINUTES and CHAOS_SEED."""

import os
import random
from typing import Any

import pytest

FULL = bool(os.environ.get("CHAOS_FULL"))
"""Whether each row runs with all its durations, and not only with the shortest."""

MINUTES = float(os.environ.get("CHAOS_MINUTES") or 0)
SEED = int(os.environ.get("CHAOS_SEED", "") or random.randrange(1 << 32))
"""The length of the soak, and its seed."""


def lasting(shortest: float, *longer: float) -> tuple[float, ...]:
    """Return the durations in seconds with which a row runs, for `parametrize`."""
    return (shortest, *longer) if FULL else (shortest,)


def rate(lasts_s: float, most: float = 200.0) -> float:
    """Return the events per second of a load that lasts about this long.

    A trial reads every record again each time it counts them, so a long load has to be thin.
    """
    return min(most, 12_000 / lasts_s)


def often(times: int, full: int) -> int:
    return full if FULL else times


def quick(*values: Any) -> Any:
    """Return values for `parametrize` with which `make integration-test` runs a row too."""
    return pytest.param(*values, marks=pytest.mark.quick)
