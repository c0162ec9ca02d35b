"""What a long run is judged by."""

import pytest

from .gauges import gauges_of
from .steadily import Emptied, Run, Sample
from .steady_report import Setting, oldest_lease_s, report

SETTING = Setting(60, 66, "a flag")
EVERY_S = 5


def sample(at_s: float, *, granted: int = 0, revoked: int = 0, memory: int = 10**8) -> Sample:
    etcd = gauges_of("")._replace(
        granted=granted,
        revoked=revoked,
        keys=1000,
        memory=10**9,
        file=10**9,
        used=10**9,
        written=int(1000 * at_s),
    )
    return Sample(at_s, memory, 20_000, etcd)


def steady(lasts_s: int, late_s: int = 0, grows: int = 0) -> Run:
    """Return a run with a lease a second, revoked after its time and ``late_s``."""
    samples = [
        sample(at_s, granted=at_s, revoked=max(0, at_s - 66 - late_s), memory=10**8 + grows * at_s)
        for at_s in range(0, lasts_s + 1, EVERY_S)
    ]
    return Run(samples, 5, 5, Emptied(66, 130, gauges_of("")))


def test_the_oldest_lease_is_the_first_that_is_not_revoked() -> None:
    samples = [
        sample(0),
        sample(5, granted=2),
        sample(10, granted=4, revoked=2),
        sample(15, granted=6, revoked=3),
        sample(20, granted=6, revoked=6),
    ]
    assert oldest_lease_s(samples) == [0, 5, 5, 10, 0]


def test_what_stays_as_it_is_meets_every_mark() -> None:
    text, met = report("", SETTING, steady(1800))
    assert met
    assert "MISSED" not in text


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (steady(1800, grows=10**5), "MISSED: service MB"),
        (steady(1800, late_s=60), "MISSED: the oldest lease"),
    ],
)
def test_what_grows_is_said(run: Run, said: str) -> None:
    text, met = report("", SETTING, run)
    assert not met
    assert said in text


def test_a_short_run_is_not_judged() -> None:
    text, met = report("", SETTING, steady(120, grows=10**6))
    assert met
    assert "Too short" in text
