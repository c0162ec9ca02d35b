"""Fixtures: the cluster instead of single servers, replicas, and their trials."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import pytest

from chaos.rig import Rig
from chaos.trial import Result
from cluster.cluster import Cluster, start_cluster
from cluster.trial import Replica, Trial

StartReplicas = Callable[..., list[Replica]]
StartTrial = Callable[..., Trial]


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
