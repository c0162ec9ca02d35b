"""Calls to the outside, when a replica leaves in the middle of them, or etcd's leader is lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import pytest

from chaos.accounts import account
from chaos.outages import killed
from chaos.timed_sink import Span, TimedSink, listen_timed
from cluster.cluster import Cluster
from cluster.conftest import StartTrial
from cluster.replicas import Replica, StartReplicas
from integration.judging import passes
from servers.store import Store

pytestmark = pytest.mark.timeout(300)

RATE_PER_S = 20
LEASE_S = 15


@pytest.fixture
def sink() -> Iterator[TimedSink]:
    """Give a receiver that takes a while for each call, so that faults fall into calls."""
    with listen_timed() as running:
        yield running


@pytest.fixture
def replicas(start_replicas: StartReplicas, sink: TimedSink) -> list[Replica]:
    """Give three replicas of notify, which call as r0, r1 and r2."""
    return [
        replica
        for number in range(3)
        for replica in start_replicas("notify", 1, NOTIFY_URL=sink.url_for(f"r{number}"))
    ]


def test_a_replica_is_killed_in_its_calls(
    trial: StartTrial, replicas: list[Replica], sink: TimedSink, store: Store
) -> None:
    """Its calls are made again by the others once its lease has ended, and no others are."""
    attempt = trial("notify's replica killed in its calls", replicas)
    with attempt.load(RATE_PER_S):
        attempt.works()
        sink.hold()
        passes(partial(sink.number_under_way, "r0"), 3)
        with attempt.stall_measured():
            replicas[0].service.kill()
            killed_s = time.monotonic()
            sink.release()
            attempt.fired()
            attempt.works()
            attempt.recovers()
    attempt.replicas.pop(0)
    attempt.judge()

    def was_killed(before: Span, again: Span) -> bool:
        return before.caller == "r0" and not before.answered and again.began_s > killed_s

    repeated = account(sink.spans, store.done("notify"), was_killed)
    assert repeated
    began_s = [span.began_s for span in sink.spans if span.key in repeated and span.caller != "r0"]
    took_s = max(began_s) - killed_s
    print(f"{len(repeated)} calls were made again, the last one {took_s:.1f} s after the kill")
    assert took_s < LEASE_S + 5


def test_a_replica_is_stopped_in_its_calls(
    trial: StartTrial, replicas: list[Replica], sink: TimedSink, store: Store
) -> None:
    """It finishes them, and nobody repeats any."""
    attempt = trial("notify's replica stopped in its calls", replicas)
    with attempt.load(RATE_PER_S):
        attempt.works()
        passes(partial(sink.number_under_way, "r0"), 0)
        with attempt.stall_measured():
            assert replicas[0].service.terminate(10) == 0
            attempt.fired()
            attempt.works()
            attempt.recovers()
    attempt.replicas.pop(0)
    attempt.judge()
    assert account(sink.spans, store.done("notify"), lambda _before, _again: False) == set()


def test_etcds_leader_is_killed_under_calls(
    trial: StartTrial, cluster: Cluster, replicas: list[Replica], sink: TimedSink, store: Store
) -> None:
    """The claims outlast it: no call is repeated."""
    attempt = trial("etcd's leader killed under notify's calls", replicas)
    victim = cluster.etcd_leader()
    elsewhere = partial(cluster.etcd_leader, without=victim)
    attempt.survives(killed(victim), elsewhere, rate_per_s=RATE_PER_S)
    assert account(sink.spans, store.done("notify"), lambda _before, _again: False) == set()
