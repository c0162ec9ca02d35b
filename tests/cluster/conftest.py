"""The cluster in place of the single servers, what a trial needs, and the tables at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from typing import Any

import pytest

from chaos.trial import aligned
from cluster.cluster import Cluster, start_cluster
from cluster.trial import RESULT, Progress, Replica, Trial
from servers.counters import listen_statsd
from servers.etcd import Store
from servers.servers import docker_available
from servers.services import Service

StartReplicas = Callable[..., list[Replica]]
StartTrial = Callable[..., Trial]
Measured = Callable[[str, str, int, int], None]
Rows = list[Sequence[str]]

_tables = pytest.StashKey[dict[str, Rows]]()


def pytest_configure(config: pytest.Config) -> None:
    """Make the tables that the tests leave their results in."""
    sizes = ("number", "at", "by the formula", "measured")
    tables: dict[str, Rows] = {"trials": [RESULT], "sizes": [sizes]}
    config.stash[_tables] = tables


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
    cluster: Cluster, start_replicas: StartReplicas, store: Store, request: pytest.FixtureRequest
) -> Iterator[StartTrial]:
    """Begin a trial: `trial("queue's leader killed")`, with three replicas of order or others."""
    endpoints = [member.endpoint for member in cluster.members]
    with ExitStack() as stack:

        def begin(fault: str, replicas: list[Replica] | None = None) -> Trial:
            at_work = replicas or start_replicas()
            watching = Progress(at_work[0].service.name, endpoints, store.since + 1)
            progress = stack.enter_context(closing(watching))
            results = request.config.stash[_tables]["trials"]
            return Trial(fault, cluster, at_work, store, progress, results)

        yield begin


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Measured:
    """Note what has been measured of a number that decides the size, beside its formula."""

    def note(number: str, point: str, formula: int, found: int) -> None:
        row = (number, point, f"{formula:,}", f"{found:,}")
        request.config.stash[_tables]["sizes"].append(row)

    return note


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the tables, where tests have left something in them."""
    for title, (head, *rows) in config.stash[_tables].items():
        if rows:
            terminalreporter.section(title)
            terminalreporter.write_line(aligned([head, *rows]))
