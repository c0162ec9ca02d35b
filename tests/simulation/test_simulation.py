from __future__ import annotations

import time
from collections import Counter

import pytest

from simulation.run import OF_DATA, PER_MESSAGE, PER_REQUEST
from simulation.world import TIMED, run_seeds, simulate

# In one process of pytest-xdist: what has fired in all runs is looked at in the end.
pytestmark = pytest.mark.xdist_group("simulation")

SEEDS = 1000
CHUNK = 50
CHUNKS = [range(first, first + CHUNK) for first in range(0, SEEDS, CHUNK)]

EVERY_FAULT = {
    *(*PER_REQUEST, *PER_MESSAGE, *TIMED, *OF_DATA, "frozen"),
    *("killed between two steps", "killed within a step", "heartbeats missed", "redelivered"),
    *("confirm lost", "confirm never", "publish returned", "published again"),
    *("applied after a later request was answered", "claim ended by its lease"),
    *("killed in a call that reached the outside", "call cut off", "calls repeated"),
    *("killed in a call that did not reach the outside", "calls overlapped"),
    "held by a circuit breaker",
}


@pytest.fixture(scope="module")
def fired() -> Counter[str]:
    """Give what has fired in all runs of this module so far."""
    return Counter()


@pytest.mark.parametrize("seeds", CHUNKS, ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}")
def test_nothing_is_lost_and_nothing_is_done_twice(seeds: range, fired: Counter[str]) -> None:
    found, broken = run_seeds(seeds)
    fired.update(found)
    if broken is not None:
        report = simulate(broken).run.report()
        pytest.fail(f"{report}\nreplay: make simulation SEED={broken}", pytrace=False)
    assert found["confirmed"] > 15 * found["runs"]
    assert found["acked"] >= found["confirmed"]


def test_every_fault_has_fired(fired: Counter[str]) -> None:
    if fired["runs"] < SEEDS:
        pytest.skip("only with all the runs")
    assert {kind for kind in EVERY_FAULT if not fired[kind]} == set()


def test_one_seed_is_one_run_and_reads_no_clock_but_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A record holds the time of its writing, and whether two are equal can decide a run."""

    def read() -> float:
        raise AssertionError("the clock on the wall")

    reports = [simulate(seed).run.report() for seed in range(10)]
    monkeypatch.setattr(time, "time", read)
    assert [simulate(seed).run.report() for seed in range(10)] == reports
