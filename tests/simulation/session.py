"""The broker's side of one connection."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Protocol

import pika

from simulation.broker import Broker, Message
from simulation.life import Life
from simulation.wire import Wire

_NEVER_S = 15.0
"""A confirm that is later than this does not come at all, as of a queue that has no leader."""


class Client(Protocol):
    """The other side, called by frames that arrive there."""

    life: Life
    to_client: Wire
    to_broker: Wire

    def on_deliver(self, tag: int, message: Message) -> None:
        """Take a delivery."""
        ...

    def on_confirm(self, frame: Any) -> None:
        """Take a confirm."""
        ...

    def on_return(self, queue: str) -> None:
        """Take back a message that no queue was there for."""
        ...

    def on_blocked(self, blocked: bool) -> None:
        """Learn of an alarm, or of its end."""
        ...

    def on_channel_closed(self, error: Exception) -> None:
        """Learn that the broker has closed the channel."""
        ...

    def on_cancelled(self) -> None:
        """Learn that the broker has ended the consumer."""
        ...


class Session:
    """One connection with its channel: what it was given, what it publishes."""

    def __init__(self, broker: Broker, client: Client) -> None:
        self._broker, self._client = broker, client
        self.alive = True
        self.has_channel = self.publishes = False
        self.unacked: dict[int, Message] = {}
        self._prefetch = self._tag = self._published = 0
        self._unconfirmed: dict[int, bool] = {}
        self._silent: list[bool] = []
        broker.sessions.append(self)

    def declare(self, queue: str) -> None:
        """Have a queue from now on."""
        self._broker.declared.add(queue)

    # Consuming.

    @property
    def consumes(self) -> bool:
        """Whether it is given messages."""
        return self in self._broker.consumers

    @property
    def room(self) -> int:
        """How many more messages it may be given."""
        return self._prefetch - len(self.unacked)

    def consume(self, prefetch: int) -> None:
        """Begin to be given messages."""
        if self.alive:
            self._prefetch = prefetch
            self._broker.consumers.append(self)
            self._broker.dispatch()

    def cancel(self) -> None:
        """Be given nothing more; what was given stays in hand."""
        if self.consumes:
            self._broker.consumers.remove(self)

    def deliver(self, message: Message) -> None:
        """Give a message out."""
        self._tag += 1
        tag = self._tag
        message.given_s.setdefault(self._client.life, self._broker.agenda.now_s)
        self.unacked[tag] = message
        self._client.to_client.send(lambda: self._client.on_deliver(tag, message))

    def ack(self, tag: int, multiple: bool) -> None:
        """Take an ack of one tag, or of all up to it."""
        if not self.alive:
            return
        life, trace = self._client.life, self._broker.trace
        if tag not in self.unacked:
            trace.violation("an ack of an unknown delivery tag", life.name, tag)
            return
        tags = [t for t in self.unacked if t <= tag] if multiple else [tag]
        for each in tags:
            message = self.unacked.pop(each)
            trace.note("broker", f"gets an ack of #{message.number} from {life.name}")
            self._broker.auditor.acked(life, message.body)
        self._broker.dispatch()

    def hand_back(self, tag: int) -> None:
        """Take a nack or a reject: each burns one of the deliveries that the limit allows."""
        self._broker.trace.violation("a delivery was handed back", self._client.life.name, tag)

    # Publishing.

    def publish(self, queue: str, body: bytes, properties: Any, *, is_event: bool = False) -> None:
        """Take a message, and confirm it, refuse it or send it back."""
        if not self.alive:
            return
        broker, trace, name = self._broker, self._broker.trace, self._client.life.name
        self._published += 1
        number, stored = self._published, True
        if queue not in broker.declared:
            trace.fault("publish returned", name, queue)
            self._client.to_client.send(lambda: self._client.on_return(queue))
        elif broker.happens("publish refused"):
            trace.fault("publish refused", name, queue)
            stored = False
        elif is_event:
            broker.put_event(body, properties)
        else:
            self._judge_copy(body, properties)
            broker.put(queue, body, properties)
        wait_s = 0.0
        if broker.happens("confirm late"):
            wait_s = broker.rng.uniform(0.1, 20.0)
            trace.fault("confirm late", name, round(wait_s, 1))
            if wait_s > _NEVER_S:
                trace.fault("confirm never", name)
                self._silent.append(stored)
                return
        self._unconfirmed[number] = stored
        broker.agenda.later(wait_s, lambda: self._confirm(number))

    def _judge_copy(self, body: bytes, properties: Any) -> None:
        origin = self._broker.origin(properties)
        if origin is not None:
            life = self._client.life
            self._broker.auditor.copied(life, body, properties.headers, origin.given_s.get(life))

    def _confirm(self, number: int) -> None:
        if not self.alive or number not in self._unconfirmed:
            return
        upto = [n for n in self._unconfirmed if n <= number]
        multiple = (
            not self._silent
            and all(self._unconfirmed[n] for n in upto)
            and self._broker.rng.random() < 0.5
        )
        stored = self._unconfirmed[number]
        for each in upto if multiple else [number]:
            del self._unconfirmed[each]
        method = (
            pika.spec.Basic.Ack(number, multiple)
            if stored
            else pika.spec.Basic.Nack(number, multiple)
        )
        self._client.to_client.send(lambda: self._client.on_confirm(SimpleNamespace(method=method)))

    def begin_to_publish(self) -> None:
        """Turn confirms on. In an alarm a connection that publishes is read no further."""
        self.publishes = True
        if self._broker.agenda.now_s < self._broker.alarm_until_s:
            self.block()

    def block(self) -> None:
        """Read nothing more until the alarm ends, and say so."""
        if self.alive and self.publishes:
            until_s = self._broker.alarm_until_s
            self._client.to_client.send(lambda: self._client.on_blocked(True))
            self._client.to_broker.hold(until_s)
            self._broker.agenda.later(until_s - self._broker.agenda.now_s, self._unblock)

    def _unblock(self) -> None:
        if self.alive:
            self._client.to_client.send(lambda: self._client.on_blocked(False))

    # The end.

    def close_channel(self, error: Exception) -> None:
        """Close the channel: what it had goes back."""
        if self.alive and self.has_channel:
            self.end()
            self._client.to_client.send(lambda: self._client.on_channel_closed(error))

    def cancel_consumer(self) -> None:
        """End the consumer, as when a delivery outlasts the consumer time-out."""
        self.cancel()
        self._client.to_client.send(self._client.on_cancelled)

    def end(self) -> None:
        """Take back what is not acked; what is not confirmed never will be."""
        if not self.alive:
            return
        self.alive = False
        self.cancel()
        self._broker.sessions.remove(self)
        for stored in (*self._unconfirmed.values(), *self._silent):
            if stored:
                self._broker.trace.fault("confirm lost", self._client.life.name)
        messages, self.unacked = list(self.unacked.values()), {}
        self._broker.trace.note(
            "broker", f"ends a session of {self._client.life.name},", f"{len(messages)} not acked"
        )
        self._broker.take_back(messages)
