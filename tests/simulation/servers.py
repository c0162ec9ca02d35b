"""RabbitMQ and etcd with faults. Each ack is judged as it arrives."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from grpc.aio import AioRpcError

from idempotent_consumer.amqp import with_headers
from idempotent_consumer.bus import queue_arguments
from idempotent_consumer.etcd import CALL_TIMEOUT_S
from idempotent_consumer.event import decode
from idempotent_consumer.names import CONFLICT, FAILED, REASON_HEADER
from idempotent_consumer.testing import broker as amqp
from idempotent_consumer.testing import etcd
from idempotent_consumer.testing.broker import ChannelError, Connection, Message, Queue, Session
from idempotent_consumer.testing.etcd import CLOSED, TIMED_OUT, Call, Change, Data, Fate
from idempotent_consumer.testing.loop import Loop
from simulation.run import EXCHANGE, PER_REQUEST, RECORDED, RECORDS, SERVICE, Run, records
from simulation.workload import Sent

if TYPE_CHECKING:
    from simulation.world import Life

DEAD_LETTERS = "order.dead-letter"
HEARTBEATS_S = 20.0
"""The broker closes a connection after so long without a heartbeat."""

_COPY_OF = "copy-of"
_NEVER_S = 15.0
"""A confirm later than this never comes, as from a queue that has no leader."""

_READ_WITHIN_S = 10.0
"""A request can wait this long in the socket of an etcd that does not read."""


class SimulatedEtcd(etcd.FakeEtcd):
    """The etcd of all processes. The seed decides each request's fate."""

    def __init__(self, run: Run) -> None:
        max_txn_ops = run.plan.settings.etcd_max_txn_ops
        super().__init__(run.agenda, etcd.Store(run.agenda.time, max_txn_ops))
        self.run, self.away, self.applies_until_s = run, False, 0.0
        self.fate, self.latency_s, self.store.committed = self._fate, run.latency_s, self._note
        self._unread: list[tuple[float, Call]] = []

    def leases_of_claims(self) -> list[int]:
        """Return the leases that hold no record that is done or publishing."""
        live = [self.store.get(key) for key in self.store.keys(RECORDS.decode())]
        kept = {kv.lease for kv in live if json.loads(kv.value)["state"] in RECORDED}
        return sorted(set(self.store.leases) - kept)

    def _note(self, changes: list[Change]) -> None:
        """Note in the run's account what is committed."""
        for change in changes:
            if change.value is None:
                self.run.fault("claim ended by its lease", "etcd", change.key)
        for change, record in records(changes):
            # Four digits are enough to tell the processes apart.
            writer = record["token"][:4] + record["token"][32:]
            self.run.note("etcd", record["state"], change.key, change.revision, "by", writer)

    def be_away(self, away: bool) -> None:
        self.away = away
        if away and self.run.rng.random() < 0.5:
            self.store.end_watches()
        if not away:
            unread, self._unread = self._unread, []
            for since_s, call in unread:
                if self.agenda.now_s - since_s < _READ_WITHIN_S:
                    self.apply(call)

    def apply(self, call: Call) -> None:
        if not self.away:
            super().apply(call)
            if call.outcome is not None and call.number < call.loop.last_answered:
                self.run.fault("applied after a later request was answered", call.loop.name)
        elif self.run.rng.random() < 0.5:
            # It waits in a socket until etcd reads again. The others are lost.
            self._unread.append((self.agenda.now_s, call))

    def answer(self, call: Call, error: AioRpcError | None = None) -> None:
        if error is None and (call.outcome is None or self.away):
            self.run.fault("reply lost", call.loop.name, call.method)
            self.agenda.later(0.5, partial(self.answer, call, TIMED_OUT), call.loop)
            return
        # A process does not hear a reply after the time-out.
        if error is None and not (call.answer.done() or isinstance(call.outcome, AioRpcError)):
            call.loop.hear(call)
        super().answer(call, error)

    def watch(self, watch: etcd.Watch) -> None:
        if self.away:
            wait_s = self.run.rng.uniform(0.0, CALL_TIMEOUT_S)
            self.agenda.later(wait_s, partial(watch.deliver, CLOSED))
        else:
            super().watch(watch)

    def _fate(self, call: Call) -> Fate:
        run, arrives_s = self.run, self.latency_s()
        fails_s = run.rng.choice([0.01, run.rng.uniform(0.0, CALL_TIMEOUT_S), CALL_TIMEOUT_S])
        if self.away:
            return Fate(None, fails_s, TIMED_OUT)
        for fault, fate_of in PER_REQUEST.items():
            if run.happens(fault, call.loop.name, call.method):
                fate = fate_of(run.rng, arrives_s, fails_s)
                applies_at_s = self.agenda.now_s + (fate.applies_s or 0.0)
                self.applies_until_s = max(self.applies_until_s, applies_at_s)
                return fate
        return Fate(arrives_s, arrives_s + self.latency_s())


class SimulatedBroker(amqp.FakeBroker):
    """The broker of all processes. The seed decides what becomes of each message.

    ``sent`` has every body that was sent, ``dead`` the parked messages, and ``must_not_ack`` the
    processes that know of a loss of etcd's data. ``published_s`` has the times at which each of the
    service's own events was published, ``given_out_s`` when a body was last delivered.
    """

    def __init__(self, run: Run, store: etcd.Store) -> None:
        super().__init__(run.agenda)
        self.run, self.rng, self._store = run, run.rng, store
        self.latency_s = run.latency_s
        self.nacks = partial(run.happens, "publish refused")
        self.sent: dict[bytes, Sent] = {}
        self.must_not_ack: set[Life] = set()
        self.published_s: dict[bytes, list[float]] = {}
        self.given_out_s: dict[bytes, float] = {}
        self._sent_on: Counter[bytes] = Counter()
        self._rested_on_copies: Counter[bytes] = Counter()
        self._given_s: dict[tuple[int, Life], float] = {}
        self._silent: set[Session] = set()
        self.queues = {n: Queue(n, each) for n, each in queue_arguments(SERVICE, ()).items()}
        self.dead = self.queues[DEAD_LETTERS].ready

    @property
    def idle_retries(self) -> list[str]:
        kept = (SERVICE, DEAD_LETTERS)
        return [n for n, queue in self.queues.items() if n not in kept and not queue.ready]

    # What is published.

    def publishing(self, session: Session, message: Message) -> None:
        """Judge a copy of a delivery that a process retries or parks.

        A failure counts only once the record has been read, and a conflict only with a body that is
        recorded: a claim decides nothing, for its holder may die or fail.
        """
        if message.exchange:
            return
        life = session.loop
        if message.routing_key not in self.queues:
            self.run.fault("publish returned", life.name, message.routing_key)
        if not (number := message.headers.get(_COPY_OF)):
            return
        sent, reason = self.sent[message.body], message.headers.get(REASON_HEADER)
        if reason == CONFLICT and not self.is_conflict(sent):
            self.run.violation("parked as a conflict with nothing", life.name, sent.body)
        looked_s, given_s = life.told_s.get(sent.key, 0.0), self._given_s.get((number, life), 0.0)
        if reason in (None, FAILED) and looked_s < given_s:
            self.run.violation(
                "taken for a failure without a look at its record", life.name, sent.body
            )

    def put(self, queue: Queue, message: Message) -> None:
        self.run.note("broker", f"has {queue.name} #{message.number}", message.body)
        if message.exchange == EXCHANGE:
            # One of the service's own events, for which it has no handler.
            self.published_s.setdefault(message.body, []).append(self.agenda.now_s)
            event = decode(message.body)
            self.sent[message.body] = Sent(message.body, event.id, event.type, event.digest)
        if queue.name == SERVICE:
            # The library keeps this header in its copy, which so tells what it is a copy of.
            message.encoded = with_headers(message.encoded, {_COPY_OF: message.number})
        else:
            self._sent_on[message.body] += 1
            if message.body not in self.sent:
                self.run.violation("a body was changed on its way", message.body)
        super().put(queue, message)

    def confirm(self, session: Session, number: int) -> None:
        """Confirm a message, or all up to it; soon, late or never."""
        wait_s = 0.0
        if self.run.happens("confirm late", session.loop.name):
            wait_s = self.rng.uniform(0.1, 20.0)
            if wait_s > _NEVER_S:
                self.run.fault("confirm never", session.loop.name)
                self._silent.add(session)
                return

        def confirm() -> None:
            if number not in session.unconfirmed:
                return  # It was confirmed with a later one.
            if not session.is_open:
                self.run.fault("confirm lost", session.loop.name)
                return
            multiple = (
                session not in self._silent
                and all(taken for n, taken in session.unconfirmed.items() if n <= number)
                and self.rng.random() < 0.5
            )
            session.confirm(number, multiple)

        self.agenda.later(wait_s, confirm)

    def is_conflict(self, sent: Sent) -> bool:
        """Return whether another body is recorded under an event's id."""
        return any(
            record["state"] in RECORDED and record["digest"] != sent.digest
            for record in _of(sent, self._store.lives)
        )

    # What is consumed.

    def pick(self, queue: Queue, free: list[Session]) -> tuple[Message, Session]:
        """Remove the next message, or if reordered any, for any consumer with room."""
        at = 0
        if len(queue.ready) > 1 and self.run.happens("reordered", "broker"):
            at = self.rng.randrange(len(queue.ready))
        message, session = queue.ready.pop(at), self.rng.choice(free)
        if message.returns:
            self.run.fault("redelivered", "broker", f"#{message.number}")
        self.given_out_s[message.body] = self.agenda.now_s
        self._given_s.setdefault((message.number, session.loop), self.agenda.now_s)
        return message, session

    def take_back(self, queue: Queue, messages: list[Message]) -> None:
        if len(messages) > 1 and self.run.happens("reordered", "broker"):
            self.rng.shuffle(messages)
        super().take_back(queue, messages)

    def settled(self, session: Session, message: Message) -> None:
        """Judge an ack: the record must be done, or a copy of the message in another queue."""
        life, sent = session.loop, self.sent[message.body]
        self.run.note("broker", f"gets an ack of #{message.number} from {life.name}")
        super().settled(session, message)
        if life in self.must_not_ack:
            self.run.violation(
                "an ack although etcd is not the one seen before", life.name, sent.body
            )
        # It must be done in the data that the process first reached, or in a later life, up to a
        # wipe: what follows is another etcd, which this process must not use.
        lives = [] if life.lineage is None else self._store.lives[life.lineage :]
        wiped = next((n for n, data in enumerate(lives, 1) if data.wiped), None)
        done = ("done", sent.digest)
        is_done = sent.handled and any(
            (record["state"], record["digest"]) == done for record in _of(sent, lives[:wiped])
        )
        if is_done or (sent.digest and not sent.handled):
            return
        self._rested_on_copies[sent.body] += 1
        if self._rested_on_copies[sent.body] > self._sent_on[sent.body]:
            self.run.violation("early ack", life.name, sent.body)

    def refused(self, session: Session, error: ChannelError) -> None:
        """Judge an error for which the broker closes a channel: the library never causes one."""
        self.run.violation(error.args[1], session.loop.name)

    def dead_letter(self, queue: Queue, message: Message, reason: str) -> None:
        super().dead_letter(queue, message, reason)
        if self.run.happens("dead-lettered twice", "broker", f"#{message.number}"):
            super().dead_letter(queue, message, reason)

    # Connections.

    def gone(self, loop: Loop) -> None:
        """End the connections of a dead process; some of what it has written is lost."""
        for connection in self.connections_of(loop):
            written = self.rng.randint(0, connection.to_broker.under_way)
            self.lose(connection, (written, 0), (self.rng.expovariate(20), 0.0))

    def go_silent(self, life: Life, seconds: float) -> None:
        """Close the connections of a process that stays frozen for longer than its heartbeats."""

        def give_up(connection: Connection) -> None:
            if connection.session in self.sessions:
                self.run.fault("heartbeats missed", life.name)
                self.lose(connection, (0, connection.to_client.under_way))

        if seconds >= HEARTBEATS_S:
            for connection in self.connections_of(life):
                self.agenda.later(HEARTBEATS_S, partial(give_up, connection))

    def be_away(self, away: bool) -> None:
        """Restart: connections are lost, and refused until the broker is back."""
        self.away = away
        if away:
            for connection in list(self.connections):
                self.cut(connection)

    def cut(self, connection: Connection) -> None:
        """Lose a connection: each side notices at a time of its own, and some frames arrive."""
        rng = self.rng
        kept = [rng.randint(0, w.under_way) for w in (connection.to_broker, connection.to_client)]
        noticed_s = [rng.uniform(0, rng.choice([0.01, HEARTBEATS_S])) for _ in kept]
        lost = self.lose(connection, kept, noticed_s)
        self.run.note(connection.loop.name, f"loses a connection, and {lost} frames with it")


def _of(sent: Sent, lives: Iterable[Data]) -> Iterable[dict[str, str]]:
    """Return the values of an event's record in these lives of etcd's data."""
    return (record for data in lives for _, record in records(data.by_key.get(sent.key, ())))
