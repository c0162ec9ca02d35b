"""One trial: a fault of one node under load, how long it stalled, and the verdict on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count

from cluster.cluster import Cluster
from cluster.progress import Progress
from cluster.replicas import Replica
from integration.judging import judge_service, passes, wait_drained
from integration.load import Load, order
from servers.broker import Broker
from servers.publisher import Event
from servers.store import Store
from servers.wait import eventually, lasts

STALL_AT_MOST_S = 10.0
"""After the loss of one node, from the issue that asks for clusters."""

RECOVERS_WITHIN_S = 30.0

WORKS = 150
"""Events whose records show that work goes on."""

ENOUGH = 2 * WORKS
"""Events that a verdict needs: before the fault and after it."""


@dataclass(frozen=True)
class Result:
    """What one trial has shown. `stall_s` is None where everything had to wait."""

    fault: str
    injected: int
    confirmed: int
    stall_s: float | None
    lost: int
    double: int
    shares: list[int]


class Trial:
    """Publishes to a service's replicas while a fault happens, and judges by etcd's history."""

    def __init__(
        self,
        fault: str,
        cluster: Cluster,
        replicas: list[Replica],
        store: Store,
        progress: Progress,
        results: list[Result],
    ) -> None:
        self.fault, self.cluster, self.replicas = fault, cluster, replicas
        self.service = replicas[0].service.name
        self.store, self.progress = store, progress
        self._results = results
        self._sent: list[Event] = []
        self._confirmed: list[Event] = []
        self._probes = count()
        self._injected = 0
        self._stalls_s: list[float] = []

    def publish(self, events: list[Event], timeout_s: float = RECOVERS_WITHIN_S) -> list[Event]:
        """Publish events at a node that is up, and return the confirmed ones."""
        broker = next(broker for broker in self.cluster.brokers if broker.state == "up")
        self._sent += events
        confirmed = Broker(broker).publish(events, timeout_s=timeout_s)
        self._confirmed += confirmed
        return confirmed

    @contextmanager
    def load(self, rate_per_s: float = 60) -> Iterator[None]:
        """Publish at each node, so that some go on whatever node is lost.

        All of them publish the same events, and each repeats some: an event comes three times or
        more, often to several replicas at once.
        """
        with ExitStack() as stack:
            loads = [
                stack.enter_context(Load(Broker(broker), rate_per_s, seed))
                for seed, broker in enumerate(self.cluster.brokers)
            ]
            yield
            for load in loads:
                self._confirmed += load.finish()
                self._sent += load.sent

    @contextmanager
    def under_load(self, rate_per_s: float = 60) -> Iterator[None]:
        """Let a fault happen in the block, under load, and measure its stall.

        Events are recorded before it and after it, and in the end every replica is at work.
        """
        with self.load(rate_per_s):
            self.works()
            with self.stall_measured():
                yield
                self.cluster.heal()
                self.recovers()
            self.all_work()

    def survives(
        self,
        fault: AbstractContextManager[None],
        shows: Callable[[], object],
        *,
        lasts_s: float = 0.0,
        rate_per_s: float = 60,
    ) -> None:
        """Let a fault begin, last and end under load, and judge: during it work goes on.

        It has happened once `shows` returns.
        """
        with self.under_load(rate_per_s), fault:
            eventually(shows, also=(OSError,))
            lasts(lasts_s)
            self.fired()
            self.works()
        self.judge()

    @contextmanager
    def stall_measured(self) -> Iterator[None]:
        """Measure the longest time without a record from the fault (now) to the block's end."""
        since_s = time.monotonic()
        yield
        self._stalls_s.append(self.progress.longest_gap_s(since_s, time.monotonic()))

    def works(self, events: int = WORKS, timeout_s: float = RECOVERS_WITHIN_S) -> None:
        """Wait until so many more events are recorded than are now."""
        passes(self.progress.count, self.progress.count() + events - 1, timeout_s)

    def all_work(self, timeout_s: float = 90.0) -> None:
        """Wait until each replica has settled something from now on."""
        before = [replica.settled() for replica in self.replicas]

        def each_has() -> None:
            now = [replica.settled() for replica in self.replicas]
            assert all(map(int.__gt__, now, before)), f"idle: {before} to {now}"

        eventually(each_has, timeout_s)

    def fired(self, times: int = 1) -> None:
        """Say that the fault was seen to happen, so many times."""
        self._injected += times

    def recovers(self) -> None:
        """Wait until an event published from now on is recorded."""
        probe = order(f"probe-{next(self._probes)}")
        until_s = time.monotonic() + RECOVERS_WITHIN_S
        while not self.publish([probe]):
            assert time.monotonic() < until_s, "the broker confirms nothing"

        def recorded() -> None:
            assert self.progress.shows(probe["id"]), "no event is recorded"

        eventually(recorded, until_s - time.monotonic())

    def judge(self) -> Result:
        """Drain, judge, and keep the result; raises AssertionError on any fault of the service."""
        broker = Broker(self.cluster.rabbitmq)
        wait_drained(broker, self.service)
        assert broker.ready(f"{self.service}.dead-letter") == 0, "something is parked"
        verdict = judge_service(
            self.service, self.store, sent=self._sent, confirmed=self._confirmed
        )
        stall_s = max(self._stalls_s) if self._stalls_s else None
        shares = [replica.settled() for replica in self.replicas]
        result = Result(
            self.fault,
            self._injected,
            verdict.confirmed,
            stall_s,
            len(verdict.lost),
            len(verdict.double),
            shares,
        )
        self._results.append(result)
        assert self._injected, f"{self.fault}: the fault never happened"
        verdict.require(confirmed_at_least=ENOUGH)
        assert stall_s is None or stall_s <= STALL_AT_MOST_S, f"no record for {stall_s:.1f} s"
        return result
