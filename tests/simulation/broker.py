"""RabbitMQ on a bad day, each of whose acks is judged as it comes."""

from __future__ import annotations

from collections import Counter
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
from idempotent_consumer.testing.etcd import Store
from simulation.etcd import records
from simulation.process import Life
from simulation.run import EXCHANGE, RECORDED, SERVICE, Run, record_key
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

    def __init__(self, run: Run, store: Store) -> None:
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
        self._silent: dict[ServerChannel, list[bool]] = {}
        self.queues[SERVICE] = Queue(SERVICE, queue_arguments(SERVICE, ())[SERVICE])

    @property
    def dead(self) -> list[Message]:
        return self.queues[DEAD_LETTERS].ready if DEAD_LETTERS in self.queues else []

    @property
    def unsettled(self) -> list[Message]:
        """The messages that have not been settled for good: not acked, or in a queue but one."""
        queues = [queue for name, queue in self.queues.items() if name != DEAD_LETTERS]
        return [*self.unacked, *(message for queue in queues for message in queue.ready)]

    @property
    def idle_retry_queues(self) -> list[str]:
        """The queues for retries that have no message."""
        kept = (SERVICE, DEAD_LETTERS)
        return [n for n, queue in self.queues.items() if n not in kept and not queue.ready]

    @property
    def consumers(self) -> list[Consumer]:
        return [consumer for channel in self.channels for consumer in channel.consumers.values()]

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
        name, wait_s = _name(channel), 0.0
        if self.run.happens("confirm late", name):
            wait_s = self.rng.uniform(0.1, 20.0)
            if wait_s > _NEVER_S:
                self.run.fault("confirm never", name)
                self._silent.setdefault(channel, []).append(channel.unconfirmed.pop(number))
                return
        self.agenda.later(wait_s, partial(self._confirm, channel, number))

    def ended(self, channel: ServerChannel) -> None:
        """Learn that a channel has ended: what is not confirmed never will be."""
        for stored in (*channel.unconfirmed.values(), *self._silent.pop(channel, [])):
            if stored:
                self.run.fault("confirm lost", _name(channel))

    def _confirm(self, channel: ServerChannel, number: int) -> None:
        if not channel.alive or number not in channel.unconfirmed:
            return
        multiple = (
            channel not in self._silent
            and all(taken for n, taken in channel.unconfirmed.items() if n <= number)
            and self.rng.random() < 0.5
        )
        channel.confirm(number, multiple)

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
        return any(
            record["state"] in RECORDED and record["digest"] != sent.digest
            for data in self._store.lives
            for _, record in records(data.by_key.get(record_key(sent.event_id), ()))
        )

    # What is consumed.

    def pick(self, queue: Queue) -> tuple[Message, Consumer] | None:
        """Take out the next message, or any other one, for any consumer that has room."""
        free = [consumer for consumer in queue.consumers if consumer.room]
        if not queue.ready or not free:
            return None
        at = 0
        if len(queue.ready) > 1 and self.run.happens("reordered", "broker"):
            at = self.rng.randrange(len(queue.ready))
        message, consumer = queue.ready.pop(at), self.rng.choice(free)
        if message.returns:
            self.run.fault("redelivered", "broker", f"#{message.number}")
        self.given_out_s[message.body] = self.agenda.now_s
        self._given_s.setdefault((message.number, _life(consumer)), self.agenda.now_s)
        return message, consumer

    def take_back(self, queue: Queue, messages: list[Message]) -> None:
        """Make messages ready again, in any order at times."""
        if len(messages) > 1 and self.run.happens("reordered", "broker"):
            self.rng.shuffle(messages)
        super().take_back(queue, messages)

    def settled(self, consumer: Consumer, message: Message) -> None:
        """Judge an ack: the record is there and done, or a copy of the message is safe."""
        life, sent = _life(consumer), self.sent[message.body]
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
            name = _name(consumer)
            self.run.violation("a delivery was handed back", name, message.number)
        super().rejected(consumer, message)

    def refused(self, channel: ServerChannel, error: ChannelError) -> None:
        """Judge what the broker closes a channel for: the library never asks for it."""
        self.run.violation(str(error), _name(channel))

    def dead_letter(self, queue: Queue, message: Message, reason: str) -> None:
        """Move a message at the end of its wait, or twice."""
        super().dead_letter(queue, message, reason)
        if self.run.happens("dead-lettered twice", "broker", f"#{message.number}"):
            super().dead_letter(queue, message, reason)

    def _is_done(self, life: Life, sent: Sent) -> bool:
        """Return whether an event is done, in the data that a process has reached or what follows.

        What comes after a wipe is another etcd, with which this process has no part.
        """
        lives = self._store.lives[life.lineage :] if life.lineage is not None else []
        for data in lives:
            if any(
                (record["state"], record["digest"]) == ("done", sent.digest)
                for _, record in records(data.by_key.get(record_key(sent.event_id), ()))
            ):
                return True
            if data.wiped:
                break
        return False

    # Connections.

    def leave(self, life: Life) -> None:
        """End the connections of a process that is gone; what it had not written yet is lost."""
        for connection in self.connections_of(life):
            written = self.rng.randint(0, connection.to_broker.under_way)
            self.lose(connection, (written, 0), (self.rng.expovariate(20), 0.0))

    def go_silent(self, life: Life, seconds: float) -> None:
        """Give up the connections of a process that is frozen, where it is for long."""
        for connection in self.connections_of(life):
            if connection.session.alive and seconds >= HEARTBEATS_S:
                self.agenda.later(HEARTBEATS_S, partial(self._give_up, connection))

    def be_away(self, away: bool) -> None:
        """Restart: connections are lost, and refused until it is back."""
        self.away = away
        if away:
            for connection in list(self.connections):
                self.cut(connection)

    def close(self, channel: ServerChannel) -> None:
        """Close a channel, as after an error of the broker's own."""
        self.run.note(_name(channel), "loses its channel")
        channel.session.close_channel(channel, ChannelError(541, "INTERNAL_ERROR"))

    def cancel(self, consumer: Consumer) -> None:
        """Cancel a consumer, as where its queue gets another leader."""
        self.run.note(_name(consumer), "loses its consumer")
        consumer.channel.cancelled_by_broker(consumer)

    def _give_up(self, connection: Connection) -> None:
        if connection.session.alive:
            self.run.fault("heartbeats missed", _name(connection))
            self.lose(connection, (0, connection.to_client.under_way))

    def cut(self, connection: Connection) -> None:
        """Lose a connection: each side notices it in its own time, and some frames arrive."""
        rng = self.rng
        kept = [rng.randint(0, w.under_way) for w in (connection.to_broker, connection.to_client)]
        noticed_s = [rng.uniform(0, rng.choice([0.01, HEARTBEATS_S])) for _ in kept]
        lost = self.lose(connection, (kept[0], kept[1]), (noticed_s[0], noticed_s[1]))
        self.run.note(_name(connection), f"loses a connection, and {lost} frames with it")


def _life(of: Connection | ServerChannel | Consumer) -> Life:
    """Return the process at the other end."""
    if isinstance(of, Consumer):
        of = of.channel
    return cast("Life", (of.session.connection if isinstance(of, ServerChannel) else of).loop)


def _name(of: Connection | ServerChannel | Consumer) -> str:
    return _life(of).name
