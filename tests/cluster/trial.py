"""A trial on the cluster: a fault of a node under load, the stall it causes, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import chaos.trial
from chaos.checks import lines
from chaos.load import Load
from chaos.rig import Rig
from chaos.trial import RECOVERY_TIMEOUT_S, Result
from cluster.cluster import Cluster
from servers.broker import Broker, Event
from servers.counters import StatsdListener
from servers.services import Service
from servers.wait import eventually, lasts

_NOUNS = {"order": "orders", "notify": "notifications"}

STALL_AT_MOST_S = 10.0
"""The longest time without a record after the loss of a node."""

WORKS = 150
"""The number of new records that shows that work goes on."""


@dataclass(frozen=True)
class Replica:
    """One process, and its counters under a prefix of its own."""

    service: Service
    statsd: StatsdListener
    prefix: str

    def count(self, outcome: str) -> int:
        return self.statsd.count(f"{self.prefix}.{_NOUNS[self.service.name]}_{outcome}")

    def settled(self) -> int:
        """Return the number of deliveries that it has processed or skipped."""
        return self.count("processed") + self.count("processed_skipped")

    def processed_at(self) -> list[datetime]:
        """Return the times at which it has recorded and acked events, by its log."""
        return [
            datetime.fromisoformat(line["timestamp"])
            for line in lines(self.service, "")
            if line["event"] == "processed" or line.get("processed")
        ]

    def node(self) -> str:
        """Return the address of the broker from which it consumes, or did last."""
        connected = [
            line["node"]
            for line in lines(self.service, "connected to RabbitMQ")
            if line["connection"] == "rabbitmq"
        ]
        found: str = connected[-1].partition(":")[0] if connected else ""
        return found


class Trial(chaos.trial.Trial):
    """A trial of several replicas. Its recovery is the longest time without a record."""

    def __init__(
        self, fault: str, rig: Rig, results: list[Result], cluster: Cluster, replicas: list[Replica]
    ) -> None:
        super().__init__(fault, replicas[0].service.name, rig, results)
        self.cluster, self.replicas = cluster, replicas

    def done(self) -> int:
        """Return how many events the replicas have recorded, whichever nodes answer."""
        return sum(replica.count("processed") for replica in self.replicas)

    def publish(self, events: list[Event], timeout_s: float = RECOVERY_TIMEOUT_S) -> list[Event]:
        """Publish events to a node that is up, and return the confirmed ones."""
        self.broker = Broker(next(one for one in self.cluster.brokers if one.state == "up"))
        return super().publish(events, timeout_s)

    @contextmanager
    def load(self, rate_per_s: float = 60, seed: int = 1) -> Iterator[Load]:
        """Publish to each node, so that events arrive whatever node is lost; yield one load.

        All of them publish the same events, and each repeats some: an event arrives at least
        three times, often at several replicas at once.
        """
        with ExitStack() as stack:
            loads = [
                stack.enter_context(Load(Broker(broker), rate_per_s, seed + number))
                for number, broker in enumerate(self.cluster.brokers)
            ]
            yield loads[0]
            for load in loads:
                self.finish(load)

    @contextmanager
    def under_load(self, rate_per_s: float = 60, **judged: Any) -> Iterator[Load]:
        """Run a fault, which begins in the block, under load, and measure its stall; then judge.

        Events are recorded before and after it, and at the end every replica works.
        """
        with self.load(rate_per_s) as load:
            self.works()
            with self.stall_measured():
                yield load
                self.cluster.heal()
                self.probed()
            self.all_work()
        self.judge(**judged)

    def survives(
        self,
        fault: AbstractContextManager[None],
        shows: Callable[[], object],
        *,
        lasts_s: float = 0.0,
        rate_per_s: float = 60,
    ) -> None:
        """Let a fault begin, last and end under load while work goes on; then judge.

        The fault has happened once `shows` raises no AssertionError or OSError.
        """
        with self.under_load(rate_per_s), fault:
            eventually(shows, also=(OSError,))
            lasts(lasts_s)
            self.fired()
            self.works()

    @contextmanager
    def stall_measured(self) -> Iterator[None]:
        """Measure the longest time without a record in the block, which begins with the fault."""
        since = datetime.now(UTC)
        yield
        until = datetime.now(UTC)
        recorded = (at for replica in self.replicas for at in replica.processed_at())
        moments = [since, *sorted(at for at in recorded if since < at < until), until]
        longest = max(after - before for before, after in pairwise(moments))
        self.recoveries_s.append(longest.total_seconds())

    def works(self, events: int = WORKS, timeout_s: float = RECOVERY_TIMEOUT_S) -> None:
        super().works(events, timeout_s)

    def all_work(self, timeout_s: float = 90.0) -> None:
        """Wait until each replica has settled another delivery."""
        before = [replica.settled() for replica in self.replicas]

        def each_has() -> None:
            now = [replica.settled() for replica in self.replicas]
            assert all(map(int.__gt__, now, before)), f"idle: {before} to {now}"

        eventually(each_has, timeout_s)

    def judge(self, **judged: Any) -> Result:
        """Judge as a single server's trial does; raises AssertionError for a long stall too."""
        result = super().judge(**{"at_least": 2 * WORKS, **judged})
        print("settled by each replica:", *(replica.settled() for replica in self.replicas))
        assert (result.recovery_s or 0.0) <= STALL_AT_MOST_S, f"no record for {result.recovery_s} s"
        return result
