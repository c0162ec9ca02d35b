"""RabbitMQ in memory: a service's queue, its retry queues and its dead-letter queue."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

from simulation.agenda import Agenda
from simulation.auditor import Auditor
from simulation.keys import SERVICE
from simulation.life import Life
from simulation.plan import Plan
from simulation.trace import Trace

DEAD_LETTERS = "order.dead-letter"


@dataclass(eq=False)
class Message:
    """A message in a queue. ``deliveries`` is how often it has been given out.

    ``given_s`` is when it was first given to each process.
    """

    number: int
    body: bytes
    properties: Any
    deliveries: int = 0
    given_s: dict[Life, float] = field(default_factory=dict)


class Consumer(Protocol):
    """A session that takes messages of the service's queue."""

    unacked: dict[int, Message]

    @property
    def room(self) -> int:
        """How many more it may be given."""
        ...

    def deliver(self, message: Message) -> None:
        """Give it one."""
        ...


class Broker:
    """The queues. Sessions, one for each connection, take from them and put into them."""

    def __init__(
        self, agenda: Agenda, rng: Random, plan: Plan, trace: Trace, auditor: Auditor
    ) -> None:
        self.agenda, self.rng, self.plan = agenda, rng, plan
        self.trace, self.auditor = trace, auditor
        self.retry_s = {
            f"{SERVICE}.retry.{delay}": seconds for delay, seconds in plan.settings.retry_delays
        }
        self.declared: set[str] = set()
        self.ready: list[Message] = []
        self.waiting: dict[str, int] = dict.fromkeys(self.retry_s, 0)
        self.dead: list[Message] = []
        self.published: dict[bytes, list[float]] = {}
        self.given_out_s: dict[bytes, float] = {}
        self.consumers: list[Consumer] = []
        self.sessions: list[Consumer] = []
        self.away_until_s = self.alarm_until_s = 0.0
        self.faulty = True
        self._messages: dict[int, Message] = {}

    @property
    def away(self) -> bool:
        """Whether it takes no connections."""
        return self.agenda.now_s < self.away_until_s

    @property
    def drained(self) -> bool:
        """Whether every message has been settled for good."""
        return (
            not self.ready
            and not any(self.waiting.values())
            and not any(session.unacked for session in self.sessions)
        )

    def happens(self, fault: str) -> bool:
        """Return whether a fault hits one message."""
        rate = self.plan.rate(fault)
        return self.faulty and rate > 0 and self.rng.random() < rate

    def put(self, queue: str, body: bytes, properties: Any) -> None:
        """Store a message."""
        message = Message(len(self._messages) + 1, body, properties)
        self._messages[message.number] = message
        self.trace.note("broker", f"has {queue} #{message.number}", body)
        if queue == SERVICE:
            # A property that is kept where a message is sent on: its copy tells whose copy it is.
            message.properties = copy(properties)
            message.properties.message_id = str(message.number)
            self.ready.append(message)
            self.dispatch()
            return
        self.auditor.sent_on(body)
        if queue == DEAD_LETTERS:
            self.dead.append(message)
            return
        self.waiting[queue] += 1
        self.agenda.later(self.retry_s[queue], self._ends_waiting(queue, message))

    def put_event(self, body: bytes, properties: Any) -> None:
        """Store an event that a service publishes; its own queue takes all events."""
        self.published.setdefault(body, []).append(self.agenda.now_s)
        self.auditor.published(body)
        self.put(SERVICE, body, properties)

    def origin(self, properties: Any) -> Message | None:
        """Return the message that a copy was made of, where the copy still tells."""
        return self._messages[int(properties.message_id)] if properties.message_id else None

    def take_back(self, messages: list[Message]) -> None:
        """Make what a lost session had ready again, before what has never been given out."""
        self.ready[:0] = messages
        if len(self.ready) > 1 and self.happens("reordered"):
            self.trace.fault("reordered", "broker")
            self.rng.shuffle(self.ready)
        self.dispatch()

    def dispatch(self) -> None:
        """Give out what can be given out."""
        while self.ready:
            free = [consumer for consumer in self.consumers if consumer.room > 0]
            if not free:
                return
            at = 0
            if len(self.ready) > 1 and self.happens("reordered"):
                self.trace.fault("reordered", "broker")
                at = self.rng.randrange(len(self.ready))
            message = self.ready.pop(at)
            if message.deliveries:
                self.trace.fault("redelivered", "broker", f"#{message.number}")
            message.deliveries += 1
            self.given_out_s[message.body] = self.agenda.now_s
            self.rng.choice(free).deliver(message)

    def _ends_waiting(self, queue: str, message: Message) -> Callable[[], None]:
        def back() -> None:
            self.waiting[queue] -= 1
            self.put(SERVICE, message.body, message.properties)
            if self.happens("dead-lettered twice"):
                self.trace.fault("dead-lettered twice", "broker", f"#{message.number}")
                self.put(SERVICE, message.body, message.properties)

        return back
