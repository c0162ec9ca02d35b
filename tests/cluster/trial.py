"""One trial: a fault of one node under load, how long it stalled, and the verdict on it."""

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
"""After the loss of one node."""

WORKS = 150
"""Events whose records show that work goes on."""

ENOUGH = 2 * WORKS
"""Events that a verdict needs: before the fault and after it."""


@dataclass(frozen=True)
class Replica:
    """One process, and what it counts under a prefix of its own."""

    service: Service
    statsd: StatsdListener
    prefix: str

    def count(self, outcome: str) -> int:
        return self.statsd.count(f"{self.prefix}.{_NOUNS[self.service.name]}_{outcome}")

    def settled(self) -> int:
        """Return how many deliveries it has processed or skipped."""
        return self.count("processed") + self.count("processed_skipped")

    def processed_at(self) -> list[datetime]:
        """Return when it has recorded and acked events, by its log."""
        return [
            datetime.fromisoformat(line["timestamp"])
            for line in lines(self.service, "")
            if line["event"] == "processed" or line.get("processed")
        ]

    def node(self) -> str:
        """Return the address of the broker that it was last connected to for consuming."""
        connected = [
            line["node"]
            for line in lines(self.service, "connected to RabbitMQ")
            if line["connection"] == "rabbitmq"
        ]
        found: str = connected[-1].partition(":")[0] if connected else ""
        return found


class Trial(chaos.trial.Trial):
    """A trial of a service's replicas, whose recovery is the longest time without a record."""

    def __init__(
        self, fault: str, rig: Rig, results: list[Result], cluster: Cluster, replicas: list[Replica]
    ) -> None:
        super().__init__(fault, replicas[0].service.name, rig, results)
        self.cluster, self.replicas = cluster, replicas

    def done(self) -> int:
        """Return how many events the replicas have recorded, whichever nodes answer."""
        return sum(replica.count("processed") for replica in self.replicas)

    def publish(self, events: list[Event], timeout_s: float = RECOVERY_TIMEOUT_S) -> list[Event]:
        """Publish events at a node that is up, and return the confirmed ones."""
        self.broker = Broker(next(one for one in self.cluster.brokers if one.state == "up"))
        return super().publish(events, timeout_s)

    @contextmanager
    def load(self, rate_per_s: float = 60, seed: int = 1) -> Iterator[Load]:
        """Publish at each node, so that some go on whatever node is lost; yields one of these.

        All of them publish the same events, and each repeats some: an event comes three times or
        more, often to several replicas at once.
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
        """Let a fault happen in the block, under load, and measure its stall; then judge.

        Events are recorded before it and after it, and in the end every replica is at work.
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
        """Let a fault begin, last and end under load, and judge: during it work goes on.

        It has happened once `shows` returns.
        """
        with self.under_load(rate_per_s), fault:
            eventually(shows, also=(OSError,))
            lasts(lasts_s)
            self.fired()
            self.works()

    @contextmanager
    def stall_measured(self) -> Iterator[None]:
        """Measure the longest time without a record from the fault (now) to the block's end."""
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
        """Wait until each replica has settled something from now on."""
        before = [replica.settled() for replica in self.replicas]

        def each_has() -> None:
            now = [replica.settled() for replica in self.replicas]
            assert all(map(int.__gt__, now, before)), f"idle: {before} to {now}"

        eventually(each_has, timeout_s)

    def judge(self, **judged: Any) -> Result:
        """Drain, judge, and keep the result; raises AssertionError, for too long a stall too."""
        result = super().judge(**{"at_least": ENOUGH, **judged})
        print("settled by each replica:", *(replica.settled() for replica in self.replicas))
        assert (result.recovery_s or 0.0) <= STALL_AT_MOST_S, f"no record for {result.recovery_s} s"
        return result
