"""RabbitMQ on a bad day, each of whose acks is judged as it comes."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import Any

from idempotent_consumer.amqp import with_headers
from idempotent_consumer.bus import queue_arguments
from idempotent_consumer.testing.broker import (
    ChannelError,
    Consumer,
    FakeBroker,
    Message,
    Queue,
    ServerChannel,
)
from idempotent_consumer.testing.loop import Agenda
from simulation.auditor import Auditor
from simulation.keys import EXCHANGE, SERVICE
from simulation.plan import Plan
from simulation.process import Life
from simulation.trace import Trace

DEAD_LETTERS = "order.dead-letter"
_COPY_OF = "copy-of"
_NEVER_S = 15.0
"""A confirm that is later than this does not come at all, as of a queue that has no leader."""


class SimulatedBroker(FakeBroker):
    """The queues, and what the seed decides of them.

    ``published`` has the times at which each event of the service's own was published,
    ``given_out_s`` when a message with a body was last given out.
    """

    def __init__(
        self, agenda: Agenda, rng: Random, plan: Plan, trace: Trace, auditor: Auditor
    ) -> None:
        super().__init__(agenda)
        self.rng, self.plan, self.trace, self.auditor = rng, plan, trace, auditor
        self.latency_s = lambda: rng.expovariate(1 / plan.latency_s)
        self.nacks = self._refuses
        self.away_until_s = self.alarm_until_s = 0.0
        self.faulty = True
        self.published_s: dict[bytes, list[float]] = {}
        self.given_out_s: dict[bytes, float] = {}
        self._given_s: dict[tuple[int, Life], float] = {}
        self._messages: dict[int, Message] = {}
        self._silent: dict[ServerChannel, list[bool]] = {}
        arguments = queue_arguments(SERVICE, plan.settings.retry_delays)
        self.queues[SERVICE] = Queue(SERVICE, arguments[SERVICE])
        self.retry_queues = sorted(set(arguments) - {SERVICE, DEAD_LETTERS})

    @property
    def dead(self) -> list[Message]:
        """The dead letters."""
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
        return sum(len(self.queues[n].ready) for n in self.retry_queues if n in self.queues)

    @property
    def drained(self) -> bool:
        """Whether every message has been settled for good."""
        return not (self.queues[SERVICE].ready or self.waiting or self.unacked)

    def happens(self, fault: str) -> bool:
        """Return whether a fault hits one message."""
        rate = self.plan.rate(fault)
        return self.faulty and rate > 0 and self.rng.random() < rate

    # What is published.

    def publishing(self, channel: ServerChannel, message: Message) -> None:
        """Judge a copy that a process sends on."""
        life: Any = channel.session.connection.loop
        if message.exchange:
            return
        if message.routing_key not in self.queues:
            self.trace.fault("publish returned", life.name, message.routing_key)
        if number := message.headers.get(_COPY_OF):
            given_s = self._given_s.get((number, life))
            self.auditor.copied(life, message.body, message.headers, given_s)

    def put(self, queue: Queue, message: Message) -> None:
        """Store a message."""
        self._messages[message.number] = message
        self.trace.note("broker", f"has {queue.name} #{message.number}", message.body)
        if message.exchange == EXCHANGE:
            self.published_s.setdefault(message.body, []).append(self.agenda.now_s)
            self.auditor.published(message.body)
        if queue.name == SERVICE:
            # A header that is kept where a message is sent on: its copy tells whose copy it is.
            message.encoded = with_headers(message.encoded, {_COPY_OF: message.number})
        else:
            self.auditor.sent_on(message.body)
        super().put(queue, message)

    def confirm(self, channel: ServerChannel, number: int) -> None:
        """Confirm a message, or all up to it; soon, late or never."""
        name, wait_s = channel.session.connection.loop.name, 0.0
        if self.happens("confirm late"):
            wait_s = self.rng.uniform(0.1, 20.0)
            self.trace.fault("confirm late", name, round(wait_s, 1))
            if wait_s > _NEVER_S:
                self.trace.fault("confirm never", name)
                self._silent.setdefault(channel, []).append(channel.unconfirmed.pop(number))
                return
        self.agenda.later(wait_s, partial(self._confirm, channel, number))

    def ended(self, channel: ServerChannel) -> None:
        """Learn that a channel has ended: what is not confirmed never will be."""
        name, silent = channel.session.connection.loop.name, self._silent.pop(channel, [])
        for stored in (*channel.unconfirmed.values(), *silent):
            if stored:
                self.trace.fault("confirm lost", name)

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
        refuses = self.happens("publish refused")
        if refuses:
            self.trace.fault("publish refused", "broker", queue)
        return refuses

    # What is consumed.

    def pick(self, queue: Queue) -> tuple[Message, Consumer] | None:
        """Take out the next message, or any other one, for any consumer that has room."""
        free = [consumer for consumer in queue.consumers if consumer.room]
        if not queue.ready or not free:
            return None
        at = 0
        if len(queue.ready) > 1 and self.happens("reordered"):
            self.trace.fault("reordered", "broker")
            at = self.rng.randrange(len(queue.ready))
        message, consumer = queue.ready.pop(at), self.rng.choice(free)
        if message.returns:
            self.trace.fault("redelivered", "broker", f"#{message.number}")
        life: Any = consumer.channel.session.connection.loop
        self.given_out_s[message.body] = self.agenda.now_s
        self._given_s.setdefault((message.number, life), self.agenda.now_s)
        return message, consumer

    def take_back(self, queue: Queue, messages: list[Message]) -> None:
        """Make messages ready again, in any order at times."""
        if len(messages) > 1 and self.happens("reordered"):
            self.trace.fault("reordered", "broker")
            self.rng.shuffle(messages)
        super().take_back(queue, messages)

    def settled(self, consumer: Consumer, message: Message) -> None:
        """Judge an ack."""
        life: Any = consumer.channel.session.connection.loop
        self.trace.note("broker", f"gets an ack of #{message.number} from {life.name}")
        self.auditor.acked(life, message.body)

    def rejected(self, consumer: Consumer, message: Message) -> None:
        """Judge a message that is handed back: each costs one of the returns that it has.

        pika itself does so with what arrives after the process has cancelled its consumer.
        """
        name = consumer.channel.session.connection.loop.name
        if consumer.tag not in consumer.channel.cancelled:
            self.trace.violation("a delivery was handed back", name, message.number)
        super().rejected(consumer, message)

    def refused(self, channel: ServerChannel, error: ChannelError) -> None:
        """Judge what the broker closes a channel for: the library never asks for it."""
        self.trace.violation(str(error), channel.session.connection.loop.name)

    def dead_letter(self, queue: Queue, message: Message, reason: str) -> None:
        """Move a message at the end of its wait, or twice."""
        super().dead_letter(queue, message, reason)
        if self.happens("dead-lettered twice"):
            self.trace.fault("dead-lettered twice", "broker", f"#{message.number}")
            super().dead_letter(queue, message, reason)
