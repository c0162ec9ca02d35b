"""etcd on a bad day: its data, the network, and when it is away or full."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial
from typing import cast

from grpc import StatusCode
from grpc.aio import AioRpcError

from idempotent_consumer.etcd import CALL_TIMEOUT_S
from idempotent_consumer.testing.etcd import (
    CLOSED,
    TIMED_OUT,
    Call,
    Change,
    FakeEtcd,
    Fate,
    Store,
    Watch,
    refused,
)
from simulation.process import Life
from simulation.run import RECORDED, RECORDS, Run

_READ_WITHIN_S = 10.0
"""So long a request can wait in the socket of an etcd that does not read."""


def records(changes: Iterable[Change]) -> Iterator[tuple[Change, dict[str, str]]]:
    """Yield each put of a record, with its value."""
    for change in changes:
        if change.key.startswith(RECORDS) and change.value is not None:
            yield change, json.loads(change.value)


class NotedStore(Store):
    """The etcd in memory, with its changes in the account of the run."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.agenda.time, run.plan.settings.etcd_max_txn_ops)
        self._run = run

    def leases_of_claims(self) -> list[int]:
        """Return the leases whose end takes no record that is there for good."""
        live = [self.get(key) for key in self.keys(RECORDS.decode())]
        kept = {kv.lease for kv in live if json.loads(kv.value)["state"] in RECORDED}
        return sorted(set(self.leases) - kept)

    def _committed(self, changes: list[Change]) -> None:
        super()._committed(changes)
        for change in changes:
            if change.value is None:
                self._run.fault("claim ended by its lease", "etcd", change.key)
        for change, record in records(changes):
            # Of the process, four of its digits: enough to tell who, beside its "starts" line.
            writer = record["token"][:4] + record["token"][32:]
            self._run.note("etcd", record["state"], change.key, change.revision, "by", writer)


class SimulatedEtcd(FakeEtcd):
    """What all processes share: the data, whether etcd can be reached, and each request's fate."""

    store: NotedStore

    def __init__(self, run: Run) -> None:
        super().__init__(run.agenda, NotedStore(run))
        self.run, self.away, self.applies_until_s = run, False, 0.0
        self.fate, self.latency_s = self._fate, run.latency_s
        self._unread: list[tuple[float, Call]] = []

    def be_full(self, full: bool) -> None:
        self.store.out_of_space = full

    def be_away(self, away: bool) -> None:
        self.away = away
        if away and self.run.rng.random() < 0.5:
            self.end_watches()
        if not away:
            unread, self._unread = self._unread, []
            for since_s, call in unread:
                if self.agenda.now_s - since_s < _READ_WITHIN_S:
                    self.apply(call)

    # A request.

    def send(self, call: Call) -> None:
        """Take a request, and note which of its process it is, and to which life of the data."""
        life = cast("Life", call.loop)
        life.sent += 1
        # Wiped or restored, it is another server: what was under way went with the connections.
        call.context = (life.sent, len(self.store.lives))
        super().send(call)

    def answer(self, call: Call, error: AioRpcError | None = None) -> None:
        """Let a process have its answer, if it gets through, and remember what it is told."""
        life = cast("Life", call.loop)
        if error is None and (call.outcome is None or self.away):
            self.run.fault("reply lost", life.name, call.method)
            self.agenda.later(0.5, partial(self.answer, call, TIMED_OUT), life)
            return
        if error is None and not isinstance(call.outcome, AioRpcError):
            number, lives = call.context
            life.hear(call, number, lives - 1)
        super().answer(call, error)

    def apply(self, call: Call) -> None:
        """Do what a request says, if it still can."""
        number, lives = call.context
        life = cast("Life", call.loop)
        if lives != len(self.store.lives):
            return
        if self.away:
            # It waits in a socket until etcd reads on, or was lost with it.
            if self.run.rng.random() < 0.5:
                self._unread.append((self.agenda.now_s, call))
            return
        if number < life.last_answered:
            self.run.fault("applied after a later request was answered", life.name)
        super().apply(call)

    def watch(self, watch: Watch) -> None:
        """Open a watch, if it can be reached."""
        if self.away:
            wait_s = self.run.rng.uniform(0.0, CALL_TIMEOUT_S)
            self.agenda.later(wait_s, partial(watch.deliver, CLOSED))
        else:
            super().watch(watch)

    def _fate(self, call: Call) -> Fate:
        """Let the network do what it does to a request."""
        rng = self.run.rng
        arrives_s = self.latency_s()
        returns_s = arrives_s + self.latency_s()
        fails_s = rng.choice([0.01, rng.uniform(0.0, CALL_TIMEOUT_S), CALL_TIMEOUT_S])

        def happens(fault: str) -> bool:
            return self.run.happens(fault, cast("Life", call.loop).name, call.method)

        if self.away or happens("request lost"):
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
