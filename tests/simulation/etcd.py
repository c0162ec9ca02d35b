"""etcd on a bad day: its data, the network, and when it is away or full."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from grpc import StatusCode

from idempotent_consumer.etcd import CALL_TIMEOUT_S
from idempotent_consumer.records import DONE, PUBLISHING, decode
from idempotent_consumer.testing.etcd import (
    CLOSED,
    TIMED_OUT,
    Call,
    Change,
    Data,
    FakeEtcd,
    Fate,
    Store,
    refused,
)
from simulation.process import Life
from simulation.run import RECORDS, Run

_READ_AFTER_S = 10.0
"""So long a request can wait in the socket of an etcd that does not read."""


class Lineage:
    """One life of etcd's data: each change with its time, and what is done by record key.

    ``recorded`` also has what is not done yet, since events of it have still to be published.
    ``wiped`` says how it ended, where it has: with a wipe and not with a restore.
    """

    def __init__(self, before: Lineage | None = None) -> None:
        self.wiped = False
        self.steps: list[tuple[float, Change]] = list(before.steps) if before else []
        self.recorded: dict[bytes, str] = dict(before.recorded) if before else {}
        self.done: dict[bytes, str] = dict(before.done) if before else {}


class HistoricStore(Store):
    """The etcd in memory, with each of its lives kept."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.agenda.time, run.plan.settings.etcd_max_txn_ops)
        self._run = run
        self.lineages = [Lineage()]

    @property
    def lineage(self) -> Lineage:
        return self.lineages[-1]

    def start_anew(self, revision: int) -> None:
        """Start with an empty data directory, in which others have written up to a revision."""
        self.wipe()
        self._data.revision = revision
        self.lineage.wiped = True
        self.lineages.append(Lineage())

    def take_snapshot(self) -> tuple[Data, Lineage]:
        """Return the present state with its history."""
        return self.snapshot(), Lineage(self.lineage)

    def go_back(self, snapshot: tuple[Data, Lineage]) -> None:
        self.restore(snapshot[0])
        self.lineages.append(Lineage(snapshot[1]))

    def lease_of_claims(self) -> int | None:
        """Return a lease whose end takes no record that is done, or None."""
        kept = {
            kv.lease
            for kv in map(self.get, self.keys("/service/"))
            if decode(kv.value).state in (DONE, PUBLISHING)
        }
        leases = sorted(set(self.leases) - kept)
        return self._run.rng.choice(leases) if leases else None

    def _end_lease(self, lease: int) -> None:
        known = len(self.history)
        super()._end_lease(lease)
        for change in self.history[known:]:
            self._run.fault("claim ended by its lease", "etcd", change.key)

    def _committed(self, changes: list[Change]) -> None:
        super()._committed(changes)
        for change in changes:
            self.lineage.steps.append((self._run.agenda.now_s, change))
            if change.key.startswith(RECORDS) and change.value is not None:
                self._note(change, decode(change.value))

    def _note(self, change: Change, record: Any) -> None:
        # Of the process, four of its digits: enough to tell who, beside its "starts" line.
        writer = record.token[:4] + record.token[32:]
        self._run.note("etcd", record.state, change.key, change.revision, "by", writer)
        if record.state in (PUBLISHING, DONE):
            self.lineage.recorded[change.key] = record.digest
        if record.state == DONE:
            self.lineage.done[change.key] = record.digest


class SimulatedEtcd(FakeEtcd):
    """What all processes share: the data, whether etcd can be reached, and each request's fate."""

    store: HistoricStore

    def __init__(self, run: Run, store: HistoricStore) -> None:
        super().__init__(run.agenda, store)
        self.run = run
        self.away_until_s = self.applies_until_s = 0.0
        self.fate, self.latency_s = self._fate, run.latency_s
        away, long_away = "etcd away", "etcd away for longer than a lease"
        self.timed_faults: dict[str, Callable[[], None]] = {
            away: lambda: self._be_away(away, 0.5, 8.0),
            long_away: lambda: self._be_away(long_away, 16.0, 45.0),
            "etcd out of space": self._run_out_of_space,
            "lease revoked": self._revoke,
        }

    @property
    def away(self) -> bool:
        """Whether nothing reaches it."""
        return self.agenda.now_s < self.away_until_s

    def heal(self) -> None:
        self.away_until_s, self.store.out_of_space = 0.0, False

    # A request.

    def send(self, call: Call, answered: Callable[[Any], None]) -> None:
        """Take a request, and remember what its process is told."""
        life = cast("Life", call.loop)
        life.sent += 1
        # Wiped or restored, it is another server: what was under way went with the connections.
        number, sent_to = call.context = (life.sent, len(self.store.lineages))

        def told(outcome: Any) -> None:
            if outcome is None or (call.outcome is outcome and self.away):
                self.run.fault("reply lost", life.name, call.method)
                self.agenda.later(0.5, partial(answered, TIMED_OUT), life)
                return
            if call.outcome is outcome and not isinstance(outcome, Exception):
                _tell(life, call, number, sent_to - 1)
            answered(outcome)

        super().send(call, told)

    def apply(self, call: Call) -> None:
        """Do what a request says, if it still can."""
        number, sent_to = call.context
        life = cast("Life", call.loop)
        if sent_to != len(self.store.lineages):
            return
        if self.away:
            # It waits in a socket until etcd reads on, or was lost with it.
            if self.run.rng.random() < 0.5:
                wait_s = min(self.away_until_s - self.agenda.now_s, _READ_AFTER_S)
                self.agenda.later(wait_s, lambda: None if self.away else self.apply(call))
            return
        if number < life.last_answered:
            self.run.fault("applied after a later request was answered", life.name)
        super().apply(call)

    def watch(self, watch: Any, request: Any) -> Callable[[], None]:
        """Open a watch, if it can be reached."""
        if not self.away:
            return super().watch(watch, request)
        wait_s = self.run.rng.uniform(0.0, CALL_TIMEOUT_S)
        self.agenda.later(wait_s, partial(watch.end, CLOSED))
        return lambda: None

    def _fate(self, call: Call) -> Fate:
        """Let the network do what it does to a request."""
        rng = self.run.rng
        arrives_s = self.latency_s()
        returns_s = arrives_s + self.latency_s()
        fails_s = rng.choice([0.01, rng.uniform(0.0, CALL_TIMEOUT_S), CALL_TIMEOUT_S])

        def happens(fault: str, anyway: bool = False) -> bool:
            if happens := anyway or self.run.happens(fault):
                self.run.fault(fault, cast("Life", call.loop).name, call.method)
            return happens

        if happens("request lost", self.away):
            return Fate(None, fails_s, TIMED_OUT)
        if happens("refused"):
            return refused("too many requests", StatusCode.RESOURCE_EXHAUSTED, returns_s)
        if happens("refused login"):
            return refused("invalid auth token", StatusCode.UNAUTHENTICATED, returns_s)
        if happens("reply lost"):
            return Fate(arrives_s, max(fails_s, arrives_s), TIMED_OUT)
        if happens("applied late"):
            applies_s = fails_s + rng.uniform(0.0, rng.choice([3.0, 30.0]))
            self.applies_until_s = max(self.applies_until_s, self.agenda.now_s + applies_s)
            return Fate(applies_s, fails_s, TIMED_OUT)
        if happens("answered late"):
            returns_s = arrives_s + rng.uniform(0.0, CALL_TIMEOUT_S)
        return Fate(arrives_s, returns_s)

    # Faults at a time.

    def _be_away(self, kind: str, least_s: float, most_s: float) -> None:
        seconds = self.run.rng.uniform(least_s, most_s)
        self.run.fault(kind, "etcd", round(seconds, 1))
        self.away_until_s = max(self.away_until_s, self.agenda.now_s + seconds)
        if self.run.rng.random() < 0.5:
            self.end_watches()

    def _run_out_of_space(self) -> None:
        seconds = self.run.rng.uniform(1.0, 10.0)
        self.run.fault("etcd out of space", "etcd", round(seconds, 1))
        self.store.out_of_space = True
        self.agenda.later(seconds, partial(setattr, self.store, "out_of_space", False))

    def _revoke(self) -> None:
        lease = self.store.lease_of_claims()
        if lease is not None:
            self.run.fault("lease revoked", "etcd", lease)
            self.store.revoke(lease)


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
