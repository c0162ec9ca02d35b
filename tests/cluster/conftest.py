"""Fixtures: the cluster instead of single servers, trials, and the table of sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from typing import Any

import pytest

from chaos.rig import Rig
from chaos.trial import Result, aligned
from cluster.cluster import Cluster, start_cluster
from cluster.trial import Replica, Trial

StartReplicas = Callable[..., list[Replica]]
StartTrial = Callable[..., Trial]
Measured = Callable[[str, str, int, int], None]

_sizes = pytest.StashKey[list[Sequence[str]]]()


def pytest_configure(config: pytest.Config) -> None:
    """Start the table of sizes."""
    head = ("number", "at", "by the formula", "measured")
    config.stash[_sizes] = list[Sequence[str]]([head])


@pytest.fixture(scope="session")
def servers() -> Iterator[Cluster]:
    """Start the cluster for the session; a test may stop, kill and cut off its nodes."""
    with start_cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(clean: Cluster) -> Cluster:
    return clean


@pytest.fixture
def start_replicas(rig: Rig) -> StartReplicas:
    """Start replicas and wait until each is ready: `start_replicas("order", 3)`."""
    prefixes = map("replica-{}".format, count())

    def start(name: str = "order", number: int = 3, **settings: Any) -> list[Replica]:
        return [
            Replica(rig.start(name, STATSD_PREFIX=prefix, **settings), rig.statsd, prefix)
            for prefix in islice(prefixes, number)
        ]

    return start


@pytest.fixture
def trial(
    cluster: Cluster, start_replicas: StartReplicas, rig: Rig, results: list[Result]
) -> StartTrial:
    """Begin a trial: `trial("queue's leader killed")`, by default of three replicas of order."""

    def begin(fault: str, replicas: list[Replica] | None = None) -> Trial:
        return Trial(fault, rig, results, cluster, replicas or start_replicas())

    return begin


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Measured:
    """Add to the table a number of the sizing guide, by its formula and as measured."""

    def note(number: str, point: str, formula: int, found: int) -> None:
        request.config.stash[_sizes].append((number, point, f"{formula:,}", f"{found:,}"))

    return note


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if len(rows := config.stash[_sizes]) > 1:
        terminalreporter.section("sizes")
        terminalreporter.write_line(aligned(rows))
