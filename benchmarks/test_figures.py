"""Medians, ratios and percentiles of made-up figures."""

import pytest

from .figures import Spread, cpu_us, per_s, percentile, ratio
from .progress import Rate, Rates


def rates(**per_second: float) -> Rates:
    """Return a round with these events per second."""
    return {
        name: Rate(events_per_s, 1e6 / events_per_s) for name, events_per_s in per_second.items()
    }


def test_a_ratio_is_taken_round_by_round() -> None:
    """The machine is ten times slower in the second round: the ratio of the medians is 0.8."""
    rounds = [rates(a=50, b=100), rates(a=8, b=10), rates(a=60, b=100)]

    assert ratio(rounds, "a", "b") == Spread(0.6, 0.5, 0.8)


def test_a_round_that_a_subject_took_no_part_in_does_not_count() -> None:
    rounds = [rates(a=10, b=100), rates(b=50), rates(a=30)]

    assert per_s(rounds, "a") == Spread(20, 10, 30)
    assert cpu_us(rounds, "b") == Spread(15_000, 10_000, 20_000)
    assert ratio(rounds, "a", "b") == Spread(0.1, 0.1, 0.1)


@pytest.mark.parametrize(
    ("samples", "per_mille", "expected"),
    [
        (1000, 500, 500),
        (1000, 990, 990),
        (1000, 999, 999),
        (100, 990, 99),
        (101, 990, 100),
        (3, 500, 2),
    ],
)
def test_a_percentile_is_the_sample_that_so_many_do_not_exceed(
    samples: int, per_mille: int, expected: int
) -> None:
    values = [float(number) for number in range(samples, 0, -1)]

    assert percentile(values, per_mille) == expected


@pytest.mark.parametrize(("samples", "per_mille"), [(999, 999), (99, 990), (1, 500), (0, 500)])
def test_too_few_samples_give_no_percentile(samples: int, per_mille: int) -> None:
    assert percentile([1.0] * samples, per_mille) is None
