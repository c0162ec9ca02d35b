"""One trial: a fault of one node under load, how long it stalled, and the verdict on it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
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
from servers.etcd import Change, EtcdClient, record_prefix
from servers.services import Service
from servers.wait import eventually, lasts

# A watch that was silent for so long is opened again, at the next revision: its member may be cut
# off without knowing it.
_SILENT_S = 3.0

_NOUNS = {"order": "orders", "notify": "notifications"}

STALL_AT_MOST_S = 10.0
"""After the loss of one node."""

WORKS = 150
"""Events whose records show that work goes on."""

ENOUGH = 2 * WORKS
"""Events that a verdict needs: before the fault and after it."""


@dataclass(frozen=True)
class Replica:
    """One process, and what it counts."""

    service: Service
    statsd: StatsdListener

    def settled(self) -> int:
        """Return how many deliveries it has processed or skipped."""
        noun = _NOUNS[self.service.name]
        counts = ("processed", "processed_skipped")
        return sum(self.statsd.count(f"{noun}_{name}") for name in counts)

    def node(self) -> str:
        """Return the address of the broker that it was last connected to for consuming."""
        connected = [
            line["node"]
            for line in lines(self.service, "connected to RabbitMQ")
            if line["connection"] == "rabbitmq"
        ]
        found: str = connected[-1].partition(":")[0] if connected else ""
        return found


class Progress:
    """The moments at which the records of a service appeared, for as long as it is not closed.

    A record counts from when the first member has shown it, so one that is down, cut off or
    behind delays nothing.
    """

    def __init__(self, service: str, endpoints: Iterable[str], first_revision: int) -> None:
        self._prefix = record_prefix(service)
        self._first = first_revision
        self._lock = threading.Lock()
        self._seen_s: dict[str, float] = {}
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=self._follow, args=(endpoint,), daemon=True)
            for endpoint in endpoints
        ]
        for thread in self._threads:
            thread.start()

    def count(self) -> int:
        """Return how many events are recorded."""
        with self._lock:
            return len(self._seen_s)

    def shows(self, event_id: str) -> bool:
        """Return whether an event is recorded."""
        with self._lock:
            return event_id in self._seen_s

    def longest_gap_s(self, since_s: float, until_s: float) -> float:
        """Return the longest time between two moments without a new record in between."""
        with self._lock:
            inside = sorted(at for at in self._seen_s.values() if since_s < at < until_s)
        return max(after - before for before, after in pairwise([since_s, *inside, until_s]))

    def close(self) -> None:
        """End the watches."""
        self._closing.set()
        for thread in self._threads:
            thread.join()

    def _follow(self, endpoint: str) -> None:
        client, revision = EtcdClient(endpoint), self._first
        while not self._closing.is_set():
            # A RuntimeError ends a watch, and a ValueError is a line that was cut off.
            with suppress(OSError, RuntimeError, ValueError):
                for changes in client.watch(revision, self._prefix, timeout_s=_SILENT_S):
                    for change in changes:
                        self._note(change)
                        revision = max(revision, change.revision + 1)
                    if self._closing.is_set():
                        return
            self._closing.wait(0.1)

    def _note(self, change: Change) -> None:
        if change.kind == "put" and json.loads(change.value)["state"] == "done":
            with self._lock:
                self._seen_s.setdefault(change.key.removeprefix(self._prefix), time.monotonic())


class Trial(chaos.trial.Trial):
    """A trial of a service's replicas, whose recovery is the longest time without a record."""

    def __init__(
        self,
        fault: str,
        rig: Rig,
        results: list[Result],
        cluster: Cluster,
        replicas: list[Replica],
        progress: Progress,
    ) -> None:
        super().__init__(fault, replicas[0].service.name, rig, results)
        self.cluster, self.replicas, self.progress = cluster, replicas, progress

    def done(self) -> int:
        """Return how many events are recorded."""
        return self.progress.count()

    def is_done(self, event_id: str) -> bool:
        """Return whether an event is recorded."""
        return self.progress.shows(event_id)

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
        since_s = time.monotonic()
        yield
        self.recoveries_s.append(self.progress.longest_gap_s(since_s, time.monotonic()))

    def works(self, events: int = WORKS, timeout_s: float = RECOVERY_TIMEOUT_S) -> None:
        """Wait until so many more events are recorded than are now."""
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
