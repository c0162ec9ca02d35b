"""Latencies under load: from when an event was due, and only where its publisher kept the rate."""

import pytest

from .figures import Spread
from .loads import Load, latencies_ms, reached_per_s
from .percentiles import by_rate


def load(recorded_ms: list[float], *, per_s: float = 100.0) -> Load:
    """Return a round that was due at 100/s."""
    return Load(100, per_s, late_ms=0.1, recorded_ms=recorded_ms)


def test_a_latency_begins_when_its_event_was_due() -> None:
    """Event 3 of 2/s is due 1.5 s after the start, whenever sent; the first second is out."""
    recorded_s = {0: 1000.5, 1: 1000.6, 2: 1001.25, 3: 1002.0}

    assert latencies_ms(2, 4, 1000.0, recorded_s) == pytest.approx([250.0, 500.0])


def test_the_rate_reached_counts_intervals_and_not_events() -> None:
    """Eleven events, one each tenth of a second, take one second."""
    assert reached_per_s(11, 1.0) == 10.0


@pytest.mark.parametrize(("per_s", "kept"), [(100.0, True), (99.1, True), (98.9, False)])
def test_a_publisher_keeps_its_rate_within_a_hundredth(per_s: float, kept: bool) -> None:
    assert load([1.0], per_s=per_s).kept is kept


def test_percentiles_are_of_all_rounds_together() -> None:
    """Each round has enough samples for a median of its own, only together they have for p99."""
    (found,) = by_rate([load([1.0] * 60), load([3.0] * 40)])

    assert found.samples == 100
    assert found.ms == {"p50": Spread(1.0, 1.0, 3.0), "p99": Spread(3.0, 3.0, 3.0), "p99.9": None}


def test_a_rate_that_was_not_kept_has_no_percentile() -> None:
    """One round is enough: what it would have found is what is not known."""
    (found,) = by_rate([load([1.0] * 5000), load([1.0] * 5000, per_s=80.0)])

    assert not found.kept
    assert found.slowest_per_s == 80.0
    assert set(found.ms.values()) == {None}
