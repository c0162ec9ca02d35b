"""etcd on a bad day: its data, and a network that the seed decides."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

from grpc import StatusCode

from idempotent_consumer.etcd import CALL_TIMEOUT_S
from idempotent_consumer.records import DONE, PUBLISHING, decode
from idempotent_consumer.testing.etcd import CLOSED, TIMED_OUT, Call, FakeEtcd, Fate, refused
from idempotent_consumer.testing.loop import Agenda
from idempotent_consumer.testing.store import Change, Data, Store
from simulation.plan import Plan
from simulation.process import Life
from simulation.trace import Trace

_READ_AFTER_S = 10.0
"""So long a request can wait in the socket of an etcd that does not read."""


class Lineage:
    """One life of etcd's data: each change with its time, and what is done by record key.

    ``recorded`` also has what is not done yet, since events of it have still to be published.
    ``wiped`` says how it ended, where it has: with a wipe and not with a restore.
    """

    def __init__(self) -> None:
        self.wiped = False
        self.steps: list[tuple[float, Change]] = []
        self.recorded: dict[bytes, str] = {}
        self.done: dict[bytes, str] = {}

    def copy(self) -> Lineage:
        """Return what a snapshot keeps."""
        other = Lineage()
        other.steps, other.done = list(self.steps), dict(self.done)
        other.recorded = dict(self.recorded)
        return other


class HistoricStore(Store):
    """The etcd in memory, with each of its lives kept."""

    def __init__(self, agenda: Agenda, max_txn_ops: int, trace: Trace) -> None:
        super().__init__(agenda.time, max_txn_ops)
        self._agenda, self._trace = agenda, trace
        self.lineages = [Lineage()]

    @property
    def lineage(self) -> Lineage:
        """Return the present life."""
        return self.lineages[-1]

    def start_anew(self, revision: int) -> None:
        """Start with an empty data directory, in which others have written up to a revision."""
        self.wipe()
        self._data.revision = revision
        self.lineage.wiped = True
        self.lineages.append(Lineage())

    def take_snapshot(self) -> tuple[Data, Lineage]:
        """Return the present state with its history."""
        return self.snapshot(), self.lineage.copy()

    def go_back(self, snapshot: tuple[Data, Lineage]) -> None:
        """Restore a snapshot."""
        self.restore(snapshot[0])
        self.lineages.append(snapshot[1].copy())

    def lease_of_claims(self, rng: Random) -> int | None:
        """Return a lease whose end takes no record that is done, or None."""
        kept = {
            kv.lease
            for kv in map(self.get, self.keys("/service/"))
            if decode(kv.value, 0).state in (DONE, PUBLISHING)
        }
        leases = sorted(set(self.leases) - kept)
        return rng.choice(leases) if leases else None

    def _end_lease(self, lease: int) -> None:
        known = len(self.history)
        super()._end_lease(lease)
        for change in self.history[known:]:
            self._trace.fault("claim ended by its lease", "etcd", change.key)

    def _committed(self, changes: list[Change]) -> None:
        super()._committed(changes)
        for change in changes:
            self.lineage.steps.append((self._agenda.now_s, change))
            if change.key.startswith(b"/service/") and change.value is not None:
                self._note(change, decode(change.value, 0))

    def _note(self, change: Change, record: Any) -> None:
        # Of the process, four of its digits: enough to tell who, beside its "starts" line.
        writer = record.token[:4] + record.token[32:]
        self._trace.note("etcd", record.state, change.key, change.revision, "by", writer)
        if record.state in (PUBLISHING, DONE):
            self.lineage.recorded[change.key] = record.digest
        if record.state == DONE:
            self.lineage.done[change.key] = record.digest


class SimulatedEtcd(FakeEtcd):
    """What all processes share: the data, whether etcd can be reached, and each request's fate."""

    store: HistoricStore

    def __init__(
        self, agenda: Agenda, store: HistoricStore, rng: Random, plan: Plan, trace: Trace
    ) -> None:
        super().__init__(agenda, store)
        self.rng, self.plan, self.trace = rng, plan, trace
        self.away_until_s = self.applies_until_s = 0.0
        self.faulty = True
        self.fate = self._fate
        self.latency_s = lambda: rng.expovariate(1 / plan.latency_s)

    @property
    def away(self) -> bool:
        """Whether nothing reaches it."""
        return self.agenda.now_s < self.away_until_s

    def happens(self, fault: str) -> bool:
        """Return whether a fault hits one request."""
        rate = self.plan.rate(fault)
        return self.faulty and rate > 0 and self.rng.random() < rate

    def send(self, call: Call, answered: Callable[[Any], None]) -> None:
        """Take a request, and remember what its process is told."""
        life: Any = call.loop
        life.sent += 1
        # Wiped or restored, it is another server: what was under way went with the connections.
        number, sent_to = life.sent, len(self.store.lineages)

        def told(outcome: Any) -> None:
            if outcome is None or (call.outcome is outcome and self.away):
                self.trace.fault("reply lost", life.name, call.method)
                self.agenda.later(0.5, partial(answered, TIMED_OUT), life)
                return
            if call.outcome is outcome and not isinstance(outcome, Exception):
                _tell(life, call, number, sent_to - 1)
            answered(outcome)

        call.context = (number, sent_to)
        super().send(call, told)

    def apply(self, call: Call) -> None:
        """Do what a request says, if it still can."""
        number, sent_to = call.context
        life: Any = call.loop
        if sent_to != len(self.store.lineages):
            return
        if self.away:
            # It waits in a socket until etcd reads on, or was lost with it.
            if self.rng.random() < 0.5:
                wait_s = self.away_until_s - self.agenda.now_s
                again = partial(self._apply_after, call)
                self.agenda.later(min(wait_s, _READ_AFTER_S), again)
            return
        if number < life.last_answered:
            self.trace.fault("applied after a later request was answered", life.name)
        super().apply(call)

    def _apply_after(self, call: Call) -> None:
        if not self.away:
            self.apply(call)

    def watch(self, watch: Any, request: Any) -> Callable[[], None]:
        """Open a watch, if it can be reached."""
        if not self.away:
            return super().watch(watch, request)
        self.agenda.later(self.rng.uniform(0.0, CALL_TIMEOUT_S), partial(watch.end, CLOSED))
        return lambda: None

    def _fate(self, call: Call) -> Fate:
        """Let the network do what it does to a request."""
        rng, name = self.rng, call.loop.name
        arrives_s = self.latency_s()
        returns_s = arrives_s + self.latency_s()
        fails_s = rng.choice([0.01, rng.uniform(0.0, CALL_TIMEOUT_S), CALL_TIMEOUT_S])
        if self.away or self.happens("request lost"):
            self.trace.fault("request lost", name, call.method)
            return Fate(None, fails_s, TIMED_OUT)
        if self.happens("refused"):
            self.trace.fault("refused", name, call.method)
            error = refused("too many requests", StatusCode.RESOURCE_EXHAUSTED).error
            return Fate(None, returns_s, error)
        if self.happens("refused login"):
            self.trace.fault("refused login", name, call.method)
            error = refused("invalid auth token", StatusCode.UNAUTHENTICATED).error
            return Fate(None, returns_s, error)
        if self.happens("reply lost"):
            self.trace.fault("reply lost", name, call.method)
            return Fate(arrives_s, max(fails_s, arrives_s), TIMED_OUT)
        if self.happens("applied late"):
            self.trace.fault("applied late", name, call.method)
            late_s = rng.uniform(0.0, rng.choice([3.0, 30.0]))
            applies_s = self.agenda.now_s + fails_s + late_s
            self.applies_until_s = max(self.applies_until_s, applies_s)
            return Fate(fails_s + late_s, fails_s, TIMED_OUT)
        if self.happens("answered late"):
            self.trace.fault("answered late", name, call.method)
            returns_s = arrives_s + rng.uniform(0.0, CALL_TIMEOUT_S)
        return Fate(arrives_s, returns_s)


def _tell(life: Life, call: Call, number: int, lineage: int) -> None:
    """Remember what a process is told: it knows how these records stand from now on."""
    life.answered += 1
    life.last_answered = max(life.last_answered, number)
    life.highest_revision = max(life.highest_revision, call.outcome.header.revision)
    if call.method == "Txn":
        if life.lineage is None:
            life.lineage = lineage
        if call.outcome.succeeded:
            for operation in call.request.success:
                key = getattr(operation, operation.WhichOneof("request")).key
                life.told_s[key] = life.agenda.now_s
