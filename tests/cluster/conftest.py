"""The cluster in place of the single servers, what a trial needs, and the tables at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from cluster.cluster import Cluster, start_cluster
from cluster.progress import watch_progress
from cluster.replicas import Replica, StartReplicas
from cluster.table import Size, faults_table, sizes_table
from cluster.trial import Result, Trial
from servers.engine import docker_available
from servers.services import Service
from servers.statsd import listen_statsd
from servers.store import Store

StartTrial = Callable[..., Trial]

_results = pytest.StashKey[list[Result]]()
_sizes = pytest.StashKey[list[Size]]()


def pytest_configure(config: pytest.Config) -> None:
    """Make the lists that the tests leave their results in."""
    config.stash[_results] = []
    config.stash[_sizes] = []


@pytest.fixture(scope="session")
def servers() -> Iterator[Cluster]:
    """Start the cluster for the session; a test may do to its nodes what it likes."""
    if not docker_available():
        pytest.skip("the cluster needs Docker, which does not answer")
    with start_cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(clean: Cluster) -> Cluster:
    """Give the cluster whole and empty."""
    return clean


@pytest.fixture
def start_replicas(start_service: Callable[..., Service]) -> Iterator[StartReplicas]:
    """Start replicas: `start_replicas("order", 3)`. Each waits until it is ready."""
    with ExitStack() as stack:

        def start(name: str = "order", number: int = 3, **settings: Any) -> list[Replica]:
            replicas = []
            for _ in range(number):
                statsd = stack.enter_context(listen_statsd())
                service = start_service(name, **{**statsd.settings(), **settings})
                replicas.append(Replica(service, statsd))
            return replicas

        yield start


@pytest.fixture
def trial(
    cluster: Cluster,
    start_replicas: StartReplicas,
    store: Store,
    request: pytest.FixtureRequest,
) -> Iterator[StartTrial]:
    """Begin a trial: `trial("queue's leader killed")`, with three replicas of order or others."""
    endpoints = [member.endpoint for member in cluster.members]
    with ExitStack() as stack:

        def begin(fault: str, replicas: list[Replica] | None = None) -> Trial:
            at_work = replicas or start_replicas()
            watch = watch_progress(at_work[0].service.name, endpoints, store.since + 1)
            results = request.config.stash[_results]
            return Trial(fault, cluster, at_work, store, stack.enter_context(watch), results)

        yield begin


@pytest.fixture
def sizes(request: pytest.FixtureRequest) -> list[Size]:
    """Give the list of what has been measured of sizes, to be added to."""
    return request.config.stash[_sizes]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the tables."""
    if results := config.stash[_results]:
        terminalreporter.section("trials")
        terminalreporter.write_line(faults_table(results))
    if sizes := config.stash[_sizes]:
        terminalreporter.section("sizes")
        terminalreporter.write_line(sizes_table(sizes))
