"""RabbitMQ on a bad day, each of whose acks is judged as it comes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import cast

from idempotent_consumer.amqp import with_headers
from idempotent_consumer.bus import queue_arguments
from idempotent_consumer.event import decode
from idempotent_consumer.names import CONFLICT, FAILED, REASON_HEADER
from idempotent_consumer.testing.broker import (
    ChannelError,
    Connection,
    Consumer,
    FakeBroker,
    Message,
    Queue,
    ServerChannel,
)
from simulation.etcd import HistoricStore
from simulation.process import Life
from simulation.run import EXCHANGE, SERVICE, Run, record_key
from simulation.workload import Sent

DEAD_LETTERS = "order.dead-letter"
HEARTBEATS_S = 20.0
"""A connection without a sign of life is given up after so long."""

_COPY_OF = "copy-of"
_NEVER_S = 15.0
"""A confirm that is later than this does not come at all, as of a queue that has no leader."""


class SimulatedBroker(FakeBroker):
    """The queues, and what the seed decides of them.

    ``sent`` has every body that was sent, and ``must_not_ack`` the processes that know better.
    ``published_s`` has the times at which each event of the service's own was published,
    ``given_out_s`` when a message with a body was last given out.
    """

    def __init__(self, run: Run, store: HistoricStore) -> None:
        super().__init__(run.agenda)
        self.run, self.rng, self._store = run, run.rng, store
        self.latency_s, self.nacks = run.latency_s, self._refuses
        self.away_until_s = self._alarm_until_s = 0.0
        self.sent: dict[bytes, Sent] = {}
        self.must_not_ack: set[Life] = set()
        self.published_s: dict[bytes, list[float]] = {}
        self.given_out_s: dict[bytes, float] = {}
        self._sent_on: Counter[bytes] = Counter()
        self._rested_on_copies: Counter[bytes] = Counter()
        self._given_s: dict[tuple[int, Life], float] = {}
        self._silent: dict[ServerChannel, list[bool]] = {}
        arguments = queue_arguments(SERVICE, run.plan.settings.retry_delays)
        self.queues[SERVICE] = Queue(SERVICE, arguments[SERVICE])
        self._retry_queues = sorted(set(arguments) - {SERVICE, DEAD_LETTERS})
        self.timed_faults: dict[str, Callable[[], None]] = {
            "connection lost": self._lose_one,
            "channel closed": self._close_channel,
            "consumer cancelled": self._cancel_consumer,
            "broker restarted": self._restart,
            "alarm": lambda: self.sound_alarm(1.0, 15.0),
            "queue deleted": self._delete_retry_queue,
        }

    @property
    def dead(self) -> list[Message]:
        return self.queues[DEAD_LETTERS].ready if DEAD_LETTERS in self.queues else []

    @property
    def unacked(self) -> list[Message]:
        """What has been given out and is not acked."""
        return [
            message
            for session in self.sessions
            for channel in session.channels.values()
            for _, message in channel.unacked.values()
        ]

    @property
    def waiting(self) -> int:
        """How many messages wait for a retry."""
        return sum(len(self.queues[n].ready) for n in self._retry_queues if n in self.queues)

    @property
    def drained(self) -> bool:
        """Whether every message has been settled for good."""
        return not (self.queues[SERVICE].ready or self.waiting or self.unacked)

    # What is published.

    def publishing(self, channel: ServerChannel, message: Message) -> None:
        """Judge a copy that a process sends on of a message it was given."""
        if message.exchange:
            return
        life = _life(channel)
        if message.routing_key not in self.queues:
            self.run.fault("publish returned", life.name, message.routing_key)
        if number := message.headers.get(_COPY_OF):
            self._judge_copy(life, message, self._given_s.get((number, life)))

    def put(self, queue: Queue, message: Message) -> None:
        self.run.note("broker", f"has {queue.name} #{message.number}", message.body)
        if message.exchange == EXCHANGE:
            # An event of the service's own, for which it has no handler itself.
            self.published_s.setdefault(message.body, []).append(self.agenda.now_s)
            event = decode(message.body)
            self.sent[message.body] = Sent(message.body, event.id, event.type, event.digest)
        if queue.name == SERVICE:
            # A header that is kept where a message is sent on: its copy tells whose copy it is.
            message.encoded = with_headers(message.encoded, {_COPY_OF: message.number})
        else:
            self._sent_on[message.body] += 1
            if message.body not in self.sent:
                self.run.violation("a body was changed on its way", message.body)
        super().put(queue, message)

    def confirm(self, channel: ServerChannel, number: int) -> None:
        """Confirm a message, or all up to it; soon, late or never."""
        name, wait_s = _life(channel).name, 0.0
        if self.run.happens("confirm late"):
            wait_s = self.rng.uniform(0.1, 20.0)
            self.run.fault("confirm late", name, round(wait_s, 1))
            if wait_s > _NEVER_S:
                self.run.fault("confirm never", name)
                self._silent.setdefault(channel, []).append(channel.unconfirmed.pop(number))
                return
        self.agenda.later(wait_s, partial(self._confirm, channel, number))

    def ended(self, channel: ServerChannel) -> None:
        """Learn that a channel has ended: what is not confirmed never will be."""
        for stored in (*channel.unconfirmed.values(), *self._silent.pop(channel, [])):
            if stored:
                self.run.fault("confirm lost", _life(channel).name)

    def _confirm(self, channel: ServerChannel, number: int) -> None:
        if not channel.alive or number not in channel.unconfirmed:
            return
        multiple = (
            channel not in self._silent
            and all(taken for n, taken in channel.unconfirmed.items() if n <= number)
            and self.rng.random() < 0.5
        )
        channel.confirm(number, multiple)

    def _refuses(self, queue: str) -> bool:
        refuses = self.run.happens("publish refused")
        if refuses:
            self.run.fault("publish refused", "broker", queue)
        return refuses

    def _judge_copy(self, life: Life, message: Message, given_s: float | None) -> None:
        """Judge a copy of a message that this process was first given at this time.

        A failure is one only where the record was looked at, and a conflict is one only with what
        is recorded: a claim is no verdict, its holder may die or fail.
        """
        sent, reason = self.sent[message.body], message.headers.get(REASON_HEADER)
        if reason == CONFLICT and not self.is_conflict(sent):
            self.run.violation("parked as a conflict with nothing", life.name, sent.body)
        looked_s = life.told_s.get(record_key(sent.event_id), 0.0)
        if reason in (None, FAILED) and given_s is not None and looked_s < given_s:
            self.run.violation(
                "taken for a failure without a look at its record", life.name, sent.body
            )

    def is_conflict(self, sent: Sent) -> bool:
        """Return whether another body is recorded under an event's id."""
        key, digest = record_key(sent.event_id), sent.digest
        return any(one.recorded.get(key, digest) != digest for one in self._store.lineages)

    # What is consumed.

    def pick(self, queue: Queue) -> tuple[Message, Consumer] | None:
        """Take out the next message, or any other one, for any consumer that has room."""
        free = [consumer for consumer in queue.consumers if consumer.room]
        if not queue.ready or not free:
            return None
        at = 0
        if len(queue.ready) > 1 and self.run.happens("reordered"):
            self.run.fault("reordered", "broker")
            at = self.rng.randrange(len(queue.ready))
        message, consumer = queue.ready.pop(at), self.rng.choice(free)
        if message.returns:
            self.run.fault("redelivered", "broker", f"#{message.number}")
        self.given_out_s[message.body] = self.agenda.now_s
        self._given_s.setdefault((message.number, _life(consumer.channel)), self.agenda.now_s)
        return message, consumer

    def take_back(self, queue: Queue, messages: list[Message]) -> None:
        """Make messages ready again, in any order at times."""
        if len(messages) > 1 and self.run.happens("reordered"):
            self.run.fault("reordered", "broker")
            self.rng.shuffle(messages)
        super().take_back(queue, messages)

    def settled(self, consumer: Consumer, message: Message) -> None:
        """Judge an ack: the record is there and done, or a copy of the message is safe."""
        life, sent = _life(consumer.channel), self.sent[message.body]
        self.run.note("broker", f"gets an ack of #{message.number} from {life.name}")
        super().settled(consumer, message)
        if life in self.must_not_ack:
            self.run.violation(
                "an ack although etcd is not the one seen before", life.name, sent.body
            )
        if (sent.digest and not sent.handled) or (sent.handled and self._is_done(life, sent)):
            return
        self._rested_on_copies[sent.body] += 1
        if self._rested_on_copies[sent.body] > self._sent_on[sent.body]:
            self.run.violation("early ack", life.name, sent.body)

    def rejected(self, consumer: Consumer, message: Message) -> None:
        """Judge a message that is handed back: each costs one of the returns that it has.

        pika itself does so with what arrives after the process has cancelled its consumer.
        """
        if consumer.tag not in consumer.channel.cancelled:
            name = _life(consumer.channel).name
            self.run.violation("a delivery was handed back", name, message.number)
        super().rejected(consumer, message)

    def refused(self, channel: ServerChannel, error: ChannelError) -> None:
        """Judge what the broker closes a channel for: the library never asks for it."""
        self.run.violation(str(error), _life(channel).name)

    def dead_letter(self, queue: Queue, message: Message, reason: str) -> None:
        """Move a message at the end of its wait, or twice."""
        super().dead_letter(queue, message, reason)
        if self.run.happens("dead-lettered twice"):
            self.run.fault("dead-lettered twice", "broker", f"#{message.number}")
            super().dead_letter(queue, message, reason)

    def _is_done(self, life: Life, sent: Sent) -> bool:
        key = record_key(sent.event_id)
        if life.lineage is None:
            return False
        for lineage in self._store.lineages[life.lineage :]:
            if lineage.done.get(key) == sent.digest:
                return True
            if lineage.wiped:
                break  # What came after it is another etcd, with which this process has no part.
        return False

    # What processes do.

    def leave(self, life: Life) -> None:
        """End the connections of a process that is gone; what it had not written yet is lost."""
        for connection in self._connections(life):
            written = self.rng.randint(0, connection.to_broker.under_way)
            self.lose(connection, (written, 0), (self.rng.expovariate(20), 0.0))

    def go_silent(self, life: Life, seconds: float) -> None:
        """Give up the connections of a process that is frozen, where it is for long."""
        for connection in self._connections(life):
            if connection.session.alive and seconds >= HEARTBEATS_S:
                self.agenda.later(HEARTBEATS_S, partial(self._give_up, connection))

    def _give_up(self, connection: Connection) -> None:
        if connection.session.alive:
            self.run.fault("heartbeats missed", _life(connection).name)
            self.lose(connection, (0, connection.to_client.under_way))

    def _connections(self, life: Life) -> list[Connection]:
        return [one for one in self.connections if one.loop is life]

    # Faults at a time.

    def heal(self) -> None:
        self.away = False

    def sound_alarm(self, least_s: float, most_s: float) -> None:
        """Run out of memory, or of disk: nothing more is read of what is sent."""
        seconds = self.rng.uniform(least_s, most_s)
        self.run.fault("alarm", "broker", round(seconds, 1))
        until_s = self._alarm_until_s = self.agenda.now_s + seconds
        self.set_alarm(True)

        def over() -> None:
            if self._alarm_until_s == until_s:
                self.set_alarm(False)

        self.agenda.later(seconds, over)

    def _cut(self, connection: Connection) -> None:
        """Lose a connection: each side notices it in its own time, and some frames arrive."""
        rng = self.rng
        kept = [rng.randint(0, w.under_way) for w in (connection.to_broker, connection.to_client)]
        noticed_s = [rng.uniform(0, rng.choice([0.01, HEARTBEATS_S])) for _ in kept]
        lost = self.lose(connection, (kept[0], kept[1]), (noticed_s[0], noticed_s[1]))
        self.run.note(_life(connection).name, f"loses a connection, and {lost} frames with it")

    def _one(self, fault: str, suits: Callable[[Connection], object]) -> Connection | None:
        """Choose a connection for a fault."""
        found = [one for one in self.connections if suits(one)]
        connection = self.rng.choice(found) if found else None
        if connection is not None:
            self.run.fault(fault, _life(connection).name)
        return connection

    def _lose_one(self) -> None:
        connection = self._one("connection lost", lambda _: True)
        if connection is not None:
            self._cut(connection)

    def _close_channel(self) -> None:
        connection = self._one("channel closed", _channels)
        if connection is not None:
            error = ChannelError(541, "INTERNAL_ERROR")
            connection.session.close_channel(_channels(connection)[0], error)

    def _cancel_consumer(self) -> None:
        def consumes(connection: Connection) -> bool:
            return any(channel.consumers for channel in _channels(connection))

        connection = self._one("consumer cancelled", consumes)
        if connection is not None:
            (channel,) = _channels(connection)
            channel.cancelled_by_broker(next(iter(channel.consumers.values())))

    def _restart(self) -> None:
        seconds = self.rng.uniform(0.5, 10.0)
        self.run.fault("broker restarted", "broker", round(seconds, 1))
        self.away, self.away_until_s = True, self.agenda.now_s + seconds
        for connection in list(self.connections):
            self._cut(connection)

        def back() -> None:
            if self.agenda.now_s >= self.away_until_s:
                self.away = False

        self.agenda.later(seconds, back)

    def _delete_retry_queue(self) -> None:
        queues = self.queues
        empty = [n for n in self._retry_queues if n in queues and not queues[n].ready]
        if empty:
            queue = self.rng.choice(empty)
            self.run.fault("queue deleted", "broker", queue)
            self.delete_queue(queue)


def _life(of: ServerChannel | Connection) -> Life:
    """Return the process at the other end."""
    return cast("Life", (of.session.connection if isinstance(of, ServerChannel) else of).loop)


def _channels(connection: Connection) -> list[ServerChannel]:
    """Return the channels that the broker has with a connection."""
    session = connection.session
    return list(session.channels.values()) if session.alive else []
