"""The rate of a consumer, from how many messages are ready."""

import pytest

from .progress import NotMeasuredError, Sample, rate


def steady(first_s: float, ready: int, per_s: float, cpu_us: float, step: int = 1) -> list[Sample]:
    """Return a queue that runs empty from a time on, `step` messages at once."""
    return [
        Sample(first_s + done / per_s, ready - done // step * step, done * cpu_us / 1e6)
        for done in range(ready + 1)
    ]


def test_the_rate_is_that_of_the_inner_tenths() -> None:
    """A start that takes ten seconds and a slow end are in the outer ones."""
    whole = steady(10.0, 1000, per_s=500.0, cpu_us=20.0)
    slow_end = [sample._replace(at_s=sample.at_s + 100) for sample in whole if sample.ready < 50]
    samples = [Sample(0.0, 1000, 0.0), *(s for s in whole if s.ready >= 50), *slow_end]

    assert tuple(rate(samples, 1000)) == pytest.approx((500.0, 20.0))


def test_what_the_prefetch_window_takes_at_once_does_not_count() -> None:
    """400 of 1,000 leave the queue before the first ack."""
    window = [Sample(0.0, 1000, 0.0), Sample(0.001, 700, 0.0), Sample(0.002, 600, 0.0)]
    samples = [*window, *steady(5.0, 600, per_s=100.0, cpu_us=50.0)]

    assert tuple(rate(samples, 1000, prefetch=400)) == pytest.approx((100.0, 50.0))
    assert rate(samples, 1000).events_per_s != pytest.approx(100.0)


def test_each_of_two_series_has_its_own_rate() -> None:
    first = [s._replace(ready=s.ready + 1000) for s in steady(0.0, 1000, 100.0, 10.0)]
    samples = [*first, *steady(10.0, 1000, 400.0, 2.0)]

    assert tuple(rate(samples, 1000, behind=1000)) == pytest.approx((100.0, 10.0))
    assert tuple(rate(samples, 1000)) == pytest.approx((400.0, 2.0))


def test_a_staircase_is_measured_from_edge_to_edge() -> None:
    """Acks come 90 at a time: a step cut in two would give up to a ninth too much or too little."""
    samples = steady(0.0, 1000, 100.0, 10.0, step=90)

    assert tuple(rate(samples, 1000)) == pytest.approx((100.0, 10.0))


def test_too_few_samples_give_no_rate() -> None:
    samples = [Sample(0.0, 1000, 0.0), Sample(1.0, 500, 0.1), Sample(2.0, 0, 0.2)]

    with pytest.raises(NotMeasuredError):
        rate(samples, 1000)
