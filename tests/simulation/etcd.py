"""etcd on a bad day: its data, and one process's client on a network that the seed decides."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import Any

from idempotent_consumer.ledger.etcd import CALL_TIMEOUT_S, Answered, EtcdError, Failure
from idempotent_consumer.ledger.records import DONE, PUBLISHING, decode
from idempotent_consumer.testing.store import Change, Data, Store
from simulation.agenda import Agenda
from simulation.life import Life
from simulation.plan import Plan
from simulation.trace import Trace

APPLIED_AT_THE_LATEST_S = 40.0
"""No request applies later than this after it was sent."""

_TIMED_OUT = EtcdError(Failure.UNKNOWN, "Deadline Exceeded")


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
        super().__init__(agenda.time_s, max_txn_ops)
        self._agenda, self._trace = agenda, trace
        self.lineages = [Lineage()]
        self.changed = self._note

    @property
    def lineage(self) -> Lineage:
        """Return the present life."""
        return self.lineages[-1]

    def wipe(self, revision: int = 1) -> None:
        """Start anew with an empty data directory, in which others have written up to here."""
        super().wipe()
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
            self._note(change)

    def _note(self, change: Change) -> None:
        self.lineage.steps.append((self._agenda.now_s, change))
        if change.key.startswith(b"/service/") and change.value is not None:
            record = decode(change.value, 0)
            # Of the process, four of its bits: enough to tell who, beside its "starts" line.
            writer = record.token[:4] + record.token[32:]
            self._trace.note("etcd", record.state, change.key, change.revision, "by", writer)
            if record.state in (PUBLISHING, DONE):
                self.lineage.recorded[change.key] = record.digest
            if record.state == DONE:
                self.lineage.done[change.key] = record.digest


class Server:
    """What all clients share: the data, and whether etcd can be reached."""

    def __init__(
        self, agenda: Agenda, store: HistoricStore, rng: Random, plan: Plan, trace: Trace
    ) -> None:
        self.agenda, self.store, self.rng, self.plan = agenda, store, rng, plan
        self.trace = trace
        self.away_until_s = 0.0
        self.faulty = True

    @property
    def away(self) -> bool:
        """Whether nothing reaches it."""
        return self.agenda.now_s < self.away_until_s

    def happens(self, fault: str) -> bool:
        """Return whether a fault hits one request."""
        rate = self.plan.rate(fault)
        return self.faulty and rate > 0 and self.rng.random() < rate


class Client:
    """One process's client."""

    def __init__(self, server: Server, life: Life) -> None:
        self._server, self._life = server, life
        self._sent = self.answered = self.last_answered = 0
        self.highest_revision = 0

    def call(self, method: str, request: Any, answered: Answered) -> None:
        """Send a request, as the ledger's Client."""
        self._life.act()
        self._sent += 1
        _Request(self._server, self, self._life, (method, request, answered), self._sent).send()
        self._life.act()

    def close(self) -> None:
        """Nothing to end: the process goes with it."""

    def note_answer(self, number: int, reply: Any) -> None:
        """Remember what this process has been told."""
        self.answered += 1
        self.last_answered = max(self.last_answered, number)
        self.highest_revision = max(self.highest_revision, reply.header.revision)


class _Request:
    """One request: it applies at most once, and ends with a reply or with an error."""

    def __init__(
        self,
        server: Server,
        client: Client,
        life: Life,
        call: tuple[str, Any, Answered],
        number: int,
    ) -> None:
        self._server, self._client, self._life = server, client, life
        self._method, self._request, self._answered = call
        self._number = number
        # Wiped or restored, it is another server: what was under way went with the connections.
        self._life_of_data = len(server.store.lineages)
        self._outcome: tuple[Any, EtcdError | None] | None = None
        self._over = False

    def send(self) -> None:
        """Let the network do what it does to this request."""
        server, rng = self._server, self._server.rng
        arrives_s = rng.expovariate(1 / server.plan.latency_s)
        returns_s = arrives_s + rng.expovariate(1 / server.plan.latency_s)
        fails_s = rng.choice([0.01, rng.uniform(0.0, CALL_TIMEOUT_S), CALL_TIMEOUT_S])
        who, later = self._life.name, server.agenda.later
        if server.away or server.happens("request lost"):
            server.trace.fault("request lost", who, self._method)
            later(fails_s, self._fail)
        elif server.happens("refused"):
            later(returns_s, lambda: self._fail("etcdserver: too many requests"))
            server.trace.fault("refused", who, self._method)
        elif server.happens("refused login"):
            later(returns_s, lambda: self._fail("invalid auth token", Failure.AUTHENTICATION))
            server.trace.fault("refused login", who, self._method)
        elif server.happens("reply lost"):
            server.trace.fault("reply lost", who, self._method)
            later(arrives_s, self._apply)
            later(max(fails_s, arrives_s), self._fail)
        elif server.happens("applied late"):
            server.trace.fault("applied late", who, self._method)
            later(fails_s, self._fail)
            later(fails_s + rng.uniform(0.0, rng.choice([3.0, 30.0])), self._apply)
        else:
            if server.happens("answered late"):
                server.trace.fault("answered late", who, self._method)
                returns_s = arrives_s + rng.uniform(0.0, CALL_TIMEOUT_S)
            later(arrives_s, self._apply)
            later(min(returns_s, CALL_TIMEOUT_S), self._return)

    def _apply(self) -> None:
        server = self._server
        if len(server.store.lineages) != self._life_of_data:
            return
        if server.away:
            # It waits in a socket until etcd reads on, or was lost with it.
            if server.rng.random() < 0.5:
                wait_s = server.away_until_s - server.agenda.now_s
                server.agenda.later(min(wait_s, APPLIED_AT_THE_LATEST_S / 4), self._apply_after)
            return
        if self._number < self._client.last_answered:
            server.trace.fault("applied after a later request was answered", self._life.name)
        try:
            self._outcome = server.store.apply(self._method, self._request), None
        except EtcdError as error:
            self._outcome = None, error

    def _apply_after(self) -> None:
        if not self._server.away:
            self._apply()

    def _return(self) -> None:
        if self._outcome is None or self._server.away:
            self._server.trace.fault("reply lost", self._life.name, self._method)
            self._server.agenda.later(0.5, self._fail)
        else:
            self._end(*self._outcome)

    def _fail(self, why: str = "", failure: Failure = Failure.UNKNOWN) -> None:
        self._end(None, EtcdError(failure, why) if why else _TIMED_OUT)

    def _end(self, reply: Any, error: EtcdError | None) -> None:
        if not self._over and self._life.alive:
            self._over = True
            if reply is not None:
                self._client.note_answer(self._number, reply)
                if self._method == "Txn" and reply.succeeded:
                    # Before the answer itself, in the process's own step: it may be frozen.
                    self._life.call_soon(partial(_note_told, self._life, self._request))
            self._answered(reply, error)


def _note_told(life: Life, request: Any) -> None:
    """Remember that a process now knows how these records stand."""
    now_s = life.agenda.now_s
    for operation in request.success:
        life.told_s[getattr(operation, operation.WhichOneof("request")).key] = now_s
