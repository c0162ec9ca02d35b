"""A RabbitMQ in memory, at the level of AMQP, and pika's connection and channel to it.

``tests/integration/test_broker_contract.py`` holds it against a real RabbitMQ. Methods that are
pika's or AMQP's do what its documentation says, as far as the library uses them.
"""

from __future__ import annotations

import asyncio
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, NamedTuple

import pika
from pika import frame, spec
from pika.exceptions import (
    AMQPConnectionError,
    ChannelClosedByBroker,
    ChannelClosedByClient,
    ChannelWrongStateError,
    ConnectionClosedByClient,
    ConnectionOpenAborted,
    ConnectionWrongStateError,
    StreamLostError,
)

from ..amqp import Properties, with_headers
from .loop import Agenda, Loop, Wire

Callback = Callable[..., object]
Answered = Callback | None


class Message:
    """A message in a queue; ``number`` counts all that were stored, ``returns`` its returns.

    ``encoded`` are its properties as they are on the wire.
    """

    def __init__(
        self, number: int, body: bytes, encoded: bytes, exchange: str, routing_key: str
    ) -> None:
        self.number, self.body, self.encoded = number, body, encoded
        self.exchange, self.routing_key, self.returns = exchange, routing_key, 0

    @cached_property
    def properties(self) -> Any:
        return Properties().decode(self.encoded)

    @property
    def headers(self) -> dict[str, Any]:
        return self.properties.headers or {}


class Queue:
    """A quorum queue, with the arguments that it was declared with."""

    def __init__(self, name: str, arguments: Mapping[str, Any]) -> None:
        self.name, self.arguments = name, dict(arguments)
        self.ready: list[Message] = []
        self.consumers: list[Consumer] = []

    @property
    def bodies(self) -> list[bytes]:
        return [message.body for message in self.ready]


class Consumer:
    """A consumer of a queue on a channel."""

    def __init__(self, channel: ServerChannel, queue: Queue, tag: str, prefetch: int) -> None:
        self.channel, self.queue, self.tag = channel, queue, tag
        self.prefetch, self.unacked = prefetch, 0

    @property
    def room(self) -> bool:
        return not self.prefetch or self.unacked < self.prefetch


class Ack(NamedTuple):
    """An ack: on the channel of which consumer, counted from 1, and the tags that it settles."""

    epoch: int
    tags: tuple[int, ...]
    multiple: bool


class ChannelError(Exception):
    """What the broker closes a channel for."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class FakeBroker:
    """RabbitMQ as a process reaches it, and as a test does.

    ``away`` refuses connections. ``confirms`` off holds confirms back, for the test to send them
    by ``ServerChannel.confirm``. ``nacks`` says of a queue's name whether it takes no message.
    ``sinks`` has exchanges whose messages all go to one queue. ``arrived`` is how many deliveries
    have come to each process, and ``consumed`` how many consumers there have been.
    A subclass can decide what else there is to decide, such as the order of deliveries.
    """

    def __init__(self, agenda: Agenda) -> None:
        self.agenda = agenda
        self.latency_s: Callable[[], float] = lambda: 0.0
        self.away, self.alarm, self.confirms = False, False, True
        self.nacks: Callable[[str], bool] = lambda _: False
        self.exchanges: dict[str, tuple[str, list[tuple[str, str]]]] = {}
        self.queues: dict[str, Queue] = {}
        self.sessions: list[Session] = []
        self.connections: list[Connection] = []
        self.sinks: dict[str, Queue] = {}
        self.published: list[Message] = []
        self.acked: list[Message] = []
        self.acks: list[Ack] = []
        self.consumed = 0
        self.arrived: Counter[Loop] = Counter()
        self._stored = 0

    # What a process reaches.

    def connect(self, parameters: Any, **callbacks: Callback) -> Connection:
        connection = Connection(self, parameters, **callbacks)
        self.connections.append(connection)
        return connection

    # What the test does.

    def publish(
        self, exchange: str, routing_key: str, body: bytes, properties: Any = None
    ) -> list[Queue]:
        """Publish as some other client would; return the queues that have it."""
        queues = self.route(exchange, routing_key)
        encoded = _encoded(properties)
        for queue in queues:
            self.put(queue, self.message(body, encoded, exchange, routing_key))
        return queues

    def delete_queue(self, name: str) -> None:
        """Delete a queue with its messages; its consumers are told."""
        queue = self.queues.pop(name)
        for _, bindings in self.exchanges.values():
            bindings[:] = [(key, bound) for key, bound in bindings if bound != name]
        for consumer in list(queue.consumers):
            consumer.channel.cancelled_by_broker(consumer)

    def set_alarm(self, alarm: bool) -> None:
        """Raise or end an alarm: in one, connections that publish are read no further."""
        self.alarm = alarm
        for session in list(self.sessions):
            session.unblock()

    def lose(self, connection: Connection) -> None:
        """Reset a connection: both sides know at once, and what is under way is lost."""
        connection.to_broker.cut(0)
        connection.to_client.cut(0)
        connection.session.end()
        error = StreamLostError("Stream connection lost: ConnectionResetError(104, 'reset')")
        self.agenda.later(0.0, partial(connection.lost, error), connection.loop)

    def gone(self, loop: Loop) -> None:
        """Learn that a process has died: what it has written arrives, and then its end."""
        for connection in [one for one in self.connections if one.loop is loop]:
            connection.to_broker.send(connection.session.end)

    # What the broker decides.

    def pick(self, queue: Queue) -> tuple[Message, Consumer] | None:
        """Take out the next message for a consumer that may have one; they take turns."""
        free = [consumer for consumer in queue.consumers if consumer.room]
        if not queue.ready or not free:
            return None
        queue.consumers.remove(free[0])
        queue.consumers.append(free[0])
        return queue.ready.pop(0), free[0]

    def publishing(self, channel: ServerChannel, message: Message) -> None:
        """Take note of a message before it is routed; its number counts its channel's."""
        self.published.append(message)

    def refused(self, channel: ServerChannel, error: ChannelError) -> None:
        """Take note of an error of the client's for which its channel is closed."""

    def ended(self, channel: ServerChannel) -> None:
        """Take note of the end of a channel, with what is unconfirmed on it."""

    def confirm(self, channel: ServerChannel, number: int) -> None:
        if self.confirms:
            channel.confirm(number)

    def settled(self, consumer: Consumer, message: Message) -> None:
        self.acked.append(message)

    def rejected(self, consumer: Consumer, message: Message) -> None:
        self.take_back(consumer.queue, [message])

    # The queues.

    def route(self, exchange: str, routing_key: str) -> list[Queue]:
        """Return the queues that a message goes to; raises ChannelError."""
        if exchange in self.sinks:
            return [self.sinks[exchange]]
        if not exchange:
            found = {routing_key}
        elif exchange in self.exchanges:
            kind, bindings = self.exchanges[exchange]
            found = {queue for key, queue in bindings if _matches(kind, key, routing_key)}
        else:
            raise ChannelError(404, f"NOT_FOUND - no exchange '{exchange}' in vhost '/'")
        return [queue for name, queue in self.queues.items() if name in found]

    def message(self, body: bytes, encoded: bytes, exchange: str, routing_key: str) -> Message:
        self._stored += 1
        return Message(self._stored, body, encoded, exchange, routing_key)

    def put(self, queue: Queue, message: Message) -> None:
        queue.ready.append(message)
        if "x-message-ttl" in queue.arguments:
            ttl_s = queue.arguments["x-message-ttl"] / 1000
            self.agenda.later(ttl_s, partial(self._expire, queue, message))
        self.dispatch(queue)

    def dispatch(self, queue: Queue) -> None:
        while (picked := self.pick(queue)) is not None:
            message, consumer = picked
            consumer.channel.deliver(consumer, message)

    def take_back(self, queue: Queue, messages: list[Message]) -> None:
        """Make messages ready again, behind other returned ones and ahead of the rest."""
        limit = queue.arguments.get("x-delivery-limit", 20)
        for message in messages:
            message.returns += 1
        returned = next((n for n, m in enumerate(queue.ready) if not m.returns), len(queue.ready))
        kept = [m for m in messages if limit < 0 or m.returns <= limit]
        queue.ready[returned:returned] = kept
        for message in messages:
            if 0 <= limit < message.returns:
                self.dead_letter(queue, message, "delivery_limit")
        if self.queues.get(queue.name) is queue:
            self.dispatch(queue)

    def dead_letter(self, queue: Queue, message: Message, reason: str) -> None:
        """Move a message to where its queue's dead letters go, if anywhere."""
        if "x-dead-letter-exchange" not in queue.arguments:
            return
        exchange = queue.arguments["x-dead-letter-exchange"]
        routing_key = queue.arguments.get("x-dead-letter-routing-key", message.routing_key)
        targets = self.route(exchange, routing_key)
        if not targets:
            # At least once: it stays, out of reach, until there is a queue for it.
            self.agenda.later(1.0, partial(self.dead_letter, queue, message, reason))
            return
        death = {"queue": queue.name, "reason": reason, "count": 1, "exchange": message.exchange}
        deaths = [death, *message.headers.get("x-death", ())]
        encoded = with_headers(message.encoded, {"x-death": deaths})
        for target in targets:
            self.put(target, self.message(message.body, encoded, exchange, routing_key))

    def _expire(self, queue: Queue, message: Message) -> None:
        if message in queue.ready:
            queue.ready.remove(message)
            self.dead_letter(queue, message, "expired")


class Session:
    """The broker's side of a connection, ``alive`` from when it is accepted to its end."""

    def __init__(self, broker: FakeBroker, connection: Connection) -> None:
        self.broker, self.connection = broker, connection
        self.alive, self.blocked = False, False
        self.channels: dict[int, ServerChannel] = {}
        self._unread: list[Callable[[], None]] = []

    def accept(self) -> None:
        connection = self.connection
        if self.broker.away:
            refused = AMQPConnectionError("Connection refused")
            connection.to_client.send(partial(connection.lost, refused))
            return
        self.alive = True
        self.broker.sessions.append(self)
        connection.to_client.send(connection.opened)

    def receive(self, number: int, sent: Sent) -> None:
        if sent.method == "basic_publish" and self.broker.alarm and not self.blocked:
            self.blocked = True
            self.connection.to_client.send(partial(self.connection.on_blocked, True))
        if self.blocked:
            self._unread.append(partial(self.receive, number, sent))
            return
        if sent.method == "channel_open":
            self.channels[number] = ServerChannel(self, number)
        channel = self.channels.get(number)
        if channel is None or not self.alive:
            return
        try:
            getattr(channel, sent.method)(*sent.arguments)
        except ChannelError as error:
            self.broker.refused(channel, error)
            self.close_channel(channel, error)

    def unblock(self) -> None:
        """Read on, if the alarm is over."""
        if self.blocked and not self.broker.alarm:
            self.blocked = False
            self.connection.to_client.send(partial(self.connection.on_blocked, False))
            unread, self._unread = self._unread, []
            for read in unread:
                read()

    def close_channel(self, channel: ServerChannel, error: ChannelError) -> None:
        """Close a channel for an error; the connection is still there."""
        if self.channels.pop(channel.number, None) is not None:
            channel.end()
            reason = ChannelClosedByBroker(error.code, str(error))
            self.connection.to_client.send(
                partial(self.connection.on_channel_closed, channel.number, reason)
            )

    def end(self) -> None:
        """Take back what is not acked; what is not confirmed never will be.

        While nothing is read, the end is not either: what was written before counts.
        """
        if self.blocked:
            self._unread.append(self.end)
        elif self.alive:
            self.alive = False
            self.broker.sessions.remove(self)
            channels, self.channels = list(self.channels.values()), {}
            for channel in channels:
                channel.end()

    def close(self) -> None:
        """End as the client wishes, and agree."""
        self.end()
        agreed = ConnectionClosedByClient(200, "Normal shutdown")
        self.connection.to_client.send(partial(self.connection.lost, agreed))


class ServerChannel:
    """The broker's side of a channel: what it was given, what it publishes.

    ``unacked`` has consumer and message by delivery tag; ``unconfirmed`` whether the message was
    taken, by its number on this channel; ``cancelled`` the tags of the consumers that the client
    has ended. The methods are AMQP's.
    """

    def __init__(self, session: Session, number: int) -> None:
        self.session, self.number, self.broker = session, number, session.broker
        self.unacked: dict[int, tuple[Consumer, Message]] = {}
        self.unconfirmed: dict[int, bool] = {}
        self.consumers: dict[str, Consumer] = {}
        self.cancelled: set[str] = set()
        self.alive, self.confirming = True, False
        self._prefetch = self._tag = self._published = self._epoch = 0

    # What the broker sends.

    def deliver(self, consumer: Consumer, message: Message) -> None:
        self._tag += 1
        self.unacked[self._tag] = (consumer, message)
        consumer.unacked += 1
        encoded = message.encoded
        if message.returns:
            encoded = with_headers(encoded, {"x-delivery-count": message.returns})
        redelivered = message.returns > 0
        method = spec.Basic.Deliver(
            consumer.tag, self._tag, redelivered, message.exchange, message.routing_key
        )
        self._send("on_deliver", method, encoded, message.body)

    def confirm(self, number: int, multiple: bool = False) -> None:
        """Confirm a message that was published, or all up to it, as taken or not."""
        taken = self.unconfirmed[number]
        for each in [n for n in self.unconfirmed if n <= number] if multiple else [number]:
            del self.unconfirmed[each]
        method = (spec.Basic.Ack if taken else spec.Basic.Nack)(number, multiple)
        self._send("on_confirm", frame.Method(self.number, method))

    def cancelled_by_broker(self, consumer: Consumer) -> None:
        """End a consumer, as when its queue is deleted or moves."""
        self._end_consumer(consumer)
        self._send("on_cancel", frame.Method(self.number, spec.Basic.Cancel(consumer.tag)))

    def _send(self, method: str, *arguments: Any) -> None:
        connection = self.session.connection
        connection.to_client.send(partial(connection.on_frame, self.number, method, *arguments))

    def _answer(self, answered: Answered, method: Any) -> None:
        if answered is not None:
            self._send("on_answer", answered, frame.Method(self.number, method))

    # What the client sends.

    def channel_open(self, answered: Answered) -> None:
        self._answer(answered, spec.Channel.OpenOk())

    def channel_close(self) -> None:
        self.session.channels.pop(self.number, None)
        self.end()

    def exchange_declare(
        self, exchange: str, kind: str, passive: bool, durable: bool, answered: Answered = None
    ) -> None:
        if passive:
            self.broker.route(exchange, "")
        found, _ = self.broker.exchanges.setdefault(exchange, (kind, []))
        if found != kind and not passive:
            raise _inequivalent("type", "exchange", exchange, kind, found)
        self._answer(answered, spec.Exchange.DeclareOk())

    def queue_declare(
        self,
        name: str,
        passive: bool,
        durable: bool,
        arguments: Mapping[str, Any],
        answered: Answered = None,
    ) -> None:
        queue = self._queue(name) if passive else self.broker.queues.get(name)
        if queue is None:
            queue = self.broker.queues[name] = Queue(name, arguments)
        elif not passive and queue.arguments != arguments:
            for key in {**queue.arguments, **arguments}:
                received, current = arguments.get(key), queue.arguments.get(key)
                if received != current:
                    raise _inequivalent(key, "queue", name, received, current)
        counts = {"message_count": len(queue.ready), "consumer_count": len(queue.consumers)}
        self._answer(answered, spec.Queue.DeclareOk(name, **counts))

    def queue_bind(
        self, queue: str, exchange: str, routing_key: str, answered: Answered = None
    ) -> None:
        self._queue(queue)
        self.broker.route(exchange, "")
        _, bindings = self.broker.exchanges[exchange]
        if (routing_key, queue) not in bindings:
            bindings.append((routing_key, queue))
        self._answer(answered, spec.Queue.BindOk())

    def basic_qos(self, prefetch_count: int, answered: Answered = None) -> None:
        self._prefetch = prefetch_count
        self._answer(answered, spec.Basic.QosOk())

    def basic_consume(self, queue: str, tag: str, answered: Answered = None) -> None:
        consumer = Consumer(self, self._queue(queue), tag, self._prefetch)
        self.consumers[tag] = consumer
        self.broker.consumed += 1
        self._epoch = self.broker.consumed
        consumer.queue.consumers.append(consumer)
        # The answer precedes the first delivery.
        self._answer(answered, spec.Basic.ConsumeOk(tag))
        self.broker.dispatch(consumer.queue)

    def basic_cancel(self, tag: str, answered: Answered = None) -> None:
        """Consume no more; what was delivered stays unacked."""
        self.cancelled.add(tag)
        if tag in self.consumers:
            self._end_consumer(self.consumers[tag])
        self._answer(answered, spec.Basic.CancelOk(tag))

    def basic_ack(self, tag: int, multiple: bool) -> None:
        tags = self._tags(tag, multiple)
        self.broker.acks.append(Ack(self._epoch, tuple(tags), multiple))
        settled = self._take(tags)
        for consumer, message in settled:
            self.broker.settled(consumer, message)
        self._dispatch([consumer for consumer, _ in settled])

    def basic_reject(self, tag: int, requeue: bool) -> None:
        for consumer, message in self._take(self._tags(tag, multiple=False)):
            if requeue:
                self.broker.rejected(consumer, message)
            else:
                self.broker.dead_letter(consumer.queue, message, "rejected")

    def confirm_select(self, answered: Answered = None) -> None:
        self.confirming = True
        self._answer(answered, spec.Confirm.SelectOk())

    def basic_publish(
        self, exchange: str, routing_key: str, body: bytes, encoded: bytes, mandatory: bool
    ) -> None:
        broker = self.broker
        queues, taken = broker.route(exchange, routing_key), True
        self._published += 1
        number = self._published
        broker.publishing(self, Message(number, body, encoded, exchange, routing_key))
        if mandatory and not queues:
            method = spec.Basic.Return(312, "NO_ROUTE", exchange, routing_key)
            self._send("on_return", method, encoded, body)
        for queue in queues:
            if broker.nacks(queue.name):
                taken = False
            else:
                broker.put(queue, broker.message(body, encoded, exchange, routing_key))
        if self.confirming:
            self.unconfirmed[number] = taken
            broker.confirm(self, number)

    # The end.

    def end(self) -> None:
        self.alive = False
        self.broker.ended(self)
        for consumer in list(self.consumers.values()):
            self._end_consumer(consumer)
        unacked = self._take(list(self.unacked))
        for queue in {consumer.queue: None for consumer, _ in unacked}:
            messages = [message for consumer, message in unacked if consumer.queue is queue]
            self.broker.take_back(queue, messages)

    def _tags(self, tag: int, multiple: bool) -> list[int]:
        if tag not in self.unacked:
            raise ChannelError(406, f"PRECONDITION_FAILED - unknown delivery tag {tag}")
        return [each for each in self.unacked if each <= tag] if multiple else [tag]

    def _take(self, tags: list[int]) -> list[tuple[Consumer, Message]]:
        taken = [self.unacked.pop(each) for each in tags]
        for consumer, _ in taken:
            consumer.unacked -= 1
        return taken

    def _dispatch(self, consumers: list[Consumer]) -> None:
        for queue in {consumer.queue: None for consumer in consumers}:
            self.broker.dispatch(queue)

    def _queue(self, name: str) -> Queue:
        if name not in self.broker.queues:
            raise ChannelError(404, f"NOT_FOUND - no queue '{name}' in vhost '/'")
        return self.broker.queues[name]

    def _end_consumer(self, consumer: Consumer) -> None:
        self.consumers.pop(consumer.tag, None)
        if consumer in consumer.queue.consumers:
            consumer.queue.consumers.remove(consumer)


def _encoded(properties: Any) -> bytes:
    """Return properties as they are on the wire; bytes are so already."""
    if isinstance(properties, bytes):
        return properties
    return b"".join((properties or pika.BasicProperties()).encode())


def _inequivalent(
    argument: str, kind: str, name: str, received: object, current: object
) -> ChannelError:
    shown = [f"'{value}'" if value is not None else "none" for value in (received, current)]
    return ChannelError(
        406,
        f"PRECONDITION_FAILED - inequivalent arg '{argument}' for {kind} '{name}' in vhost '/': "
        f"received {shown[0]} but current is {shown[1]}",
    )


def _matches(kind: str, binding_key: str, routing_key: str) -> bool:
    if kind == "fanout":
        return True
    if kind == "direct":
        return binding_key == routing_key
    return _topic_matches(binding_key.split("."), routing_key.split("."))


def _topic_matches(pattern: list[str], words: list[str]) -> bool:
    if not pattern:
        return not words
    if pattern[0] == "#":
        return any(_topic_matches(pattern[1:], words[at:]) for at in range(len(words) + 1))
    return bool(words) and pattern[0] in ("*", words[0]) and _topic_matches(pattern[1:], words[1:])


# The client's side.


class Sent(NamedTuple):
    """A frame as a process sends it: AMQP's method with its arguments."""

    method: str
    arguments: tuple[Any, ...] = ()


def _adds(event: str) -> Callable[[Any, Callback], None]:
    """Return one of pika's methods: it adds a callback for an event."""

    def add(to: Any, callback: Callback) -> None:
        to.callbacks[event].append(callback)

    return add


def _sends(method: str, *names: str, **defaults: Any) -> Callable[..., None]:
    """Return one of pika's methods: it sends the frame of that name, its arguments in order."""
    order = (*names, *defaults)

    def send(channel: Channel, *given: Any, callback: Callback | None = None, **named: Any) -> None:
        arguments = {**defaults, **dict(zip(order, given, strict=False)), **named}
        answered = (callback,) if callback is not None else ()
        channel.send(method, *(arguments[name] for name in order), *answered)

    return send


class Connection:
    """A connection: what ``pika``'s asyncio connection is to the library.

    ``session`` is the broker's side. Frames in each direction are on a wire.
    """

    def __init__(
        self,
        broker: FakeBroker,
        parameters: Any,
        *,
        on_open_callback: Callback,
        on_open_error_callback: Callback,
        on_close_callback: Callback,
    ) -> None:
        self.broker, self.params = broker, parameters
        loop: Any = asyncio.get_running_loop()
        self.loop: Loop = loop
        self._on_open, self._on_open_error = on_open_callback, on_open_error_callback
        self._on_close = on_close_callback
        self.is_open = self.is_closed = self._was_open = False
        self.reader: Any = None
        self.session = Session(broker, self)
        self._channels: dict[int, Channel] = {}
        self.callbacks: dict[str, list[Callback]] = defaultdict(list)
        self.to_broker = Wire(broker.agenda, None, broker.latency_s)
        self.to_client = Wire(broker.agenda, self.loop, broker.latency_s)
        self.send(0, Sent("connect"), self.session.accept)

    # What the library calls.

    def channel(self, on_open_callback: Callback) -> Channel:
        number = max(self._channels, default=0) + 1
        channel = self._channels[number] = Channel(self, number)

        def opened(_: Any) -> None:
            channel.is_open = True
            on_open_callback(channel)

        self.send(number, Sent("channel_open", (opened,)))
        return channel

    add_on_connection_blocked_callback = _adds("blocked")
    add_on_connection_unblocked_callback = _adds("unblocked")

    def pause_reading(self) -> None:
        self.to_client.pause(True)

    def resume_reading(self) -> None:
        self.to_client.pause(False)

    def close(self) -> None:
        """Close: answers still arrive until the broker has agreed."""
        if self.is_closed or (self._was_open and not self.is_open):
            raise ConnectionWrongStateError("close of a connection that is closing or closed")
        if not self._was_open:
            error = ConnectionOpenAborted("close of a connection that was not open yet")
            self.to_broker.send(self.session.end)
            self.broker.agenda.later(0.0, partial(self.lost, error), self.loop)
            return
        self.is_open = False
        for channel in self._channels.values():
            channel.is_open = False
        self.send(0, Sent("close"), self.session.close)

    # The network.

    def send(self, number: int, sent: Sent, arrive: Callback | None = None) -> None:
        """Send a frame; the process may die before it has been written, or behind it."""
        self.loop.act("before", sent)
        self.to_broker.send(arrive or partial(self.session.receive, number, sent))
        self.loop.act("behind", sent)

    def lost(self, error: Exception) -> None:
        if self.is_closed:
            return
        self.is_open, self.is_closed = False, True
        self.broker.connections.remove(self)
        for number in list(self._channels):
            self.on_channel_closed(number, error)
        (self._on_close if self._was_open else self._on_open_error)(self, error)

    def opened(self) -> None:
        if not self.is_closed:
            self.is_open = self._was_open = True
            self._on_open(self)

    # What arrives.

    def on_frame(self, number: int, method: str, *arguments: Any) -> None:
        """Hand a frame to its channel, where that is still there."""
        if number in self._channels:
            getattr(self._channels[number], method)(*arguments)

    def on_channel_closed(self, number: int, error: Exception) -> None:
        channel = self._channels.pop(number, None)
        if channel is not None:
            channel.is_open, channel.is_closed = False, True
            for callback in channel.callbacks["close"]:
                callback(channel, error)

    def on_blocked(self, blocked: bool) -> None:
        for callback in self.callbacks["blocked" if blocked else "unblocked"]:
            callback(self, None)


class Channel:
    """A channel, with the callbacks that the library has given it."""

    def __init__(self, connection: Connection, number: int) -> None:
        self.connection, self.channel_number = connection, number
        self.is_open = self.is_closed = False
        self._consumers: dict[str, Callback] = {}
        self._cancelled: set[str] = set()
        self.callbacks: dict[str, list[Callback]] = defaultdict(list)

    # What the library calls, with pika's arguments as far as they are used.

    def close(self) -> None:
        self.send("channel_close")
        self.is_open = False
        error = ChannelClosedByClient(0, "Normal shutdown")
        closed = partial(self.connection.on_channel_closed, self.channel_number, error)
        self.connection.broker.agenda.later(0.0, closed, self.connection.loop)

    add_on_close_callback = _adds("close")
    add_on_cancel_callback = _adds("cancel")
    add_on_return_callback = _adds("return")
    exchange_declare = _sends(
        "exchange_declare", "exchange", exchange_type="direct", passive=False, durable=False
    )
    queue_declare = _sends(
        "queue_declare", "queue", passive=False, durable=False, arguments=MappingProxyType({})
    )
    queue_bind = _sends("queue_bind", "queue", "exchange", routing_key="")
    basic_qos = _sends("basic_qos", prefetch_count=0)
    basic_ack = _sends("basic_ack", delivery_tag=0, multiple=False)
    basic_reject = _sends("basic_reject", delivery_tag=0, requeue=True)

    def basic_consume(
        self, queue: str, on_message_callback: Callback, callback: Callback | None = None
    ) -> str:
        tag = f"ctag{self.channel_number}.{len(self._consumers) + 1}"
        self._consumers[tag] = on_message_callback
        self.send("basic_consume", queue, tag, callback)
        return tag

    def basic_cancel(self, consumer_tag: str, callback: Callback | None = None) -> None:
        self._cancelled.add(consumer_tag)
        self.send("basic_cancel", consumer_tag, callback)

    def confirm_delivery(
        self, ack_nack_callback: Callback, callback: Callback | None = None
    ) -> None:
        self.callbacks["confirm"] = [ack_nack_callback]
        self.send("confirm_select", callback)

    def basic_publish(
        self,
        exchange: str,
        routing_key: str,
        body: bytes,
        properties: Any = None,
        mandatory: bool = False,
    ) -> None:
        self.send("basic_publish", exchange, routing_key, body, _encoded(properties), mandatory)

    def send(self, method: str, *arguments: Any) -> None:
        """Send a frame. Raises what pika raises on a channel that is not open."""
        if not self.is_open:
            raise ChannelWrongStateError("Channel is closed.")
        self.connection.send(self.channel_number, Sent(method, arguments))

    # What arrives.

    def on_answer(self, answered: Callback, method: Any) -> None:
        answered(method)

    def on_deliver(self, method: Any, encoded: bytes, body: bytes) -> None:
        """Hand a delivery to the connection's reader, or to the consumer's callback."""
        if method.consumer_tag in self._cancelled:
            if self.is_open:
                self.basic_reject(method.delivery_tag)  # So does pika.
            return
        self.connection.broker.arrived[self.connection.loop] += 1
        reader = self.connection.reader
        if reader is not None:
            data = _delivery(self.channel_number, method, encoded, body)
            if reader.read(data) == (len(data), False):
                return
        properties = spec.props[spec.Basic.INDEX]().decode(encoded)
        self._consumers[method.consumer_tag](self, method, properties, body)

    def on_confirm(self, method: Any) -> None:
        for callback in self.callbacks["confirm"]:
            callback(method)

    def on_return(self, method: Any, encoded: bytes, body: bytes) -> None:
        properties = spec.props[spec.Basic.INDEX]().decode(encoded)
        for callback in self.callbacks["return"]:
            callback(self, method, properties, body)

    def on_cancel(self, method: Any) -> None:
        for callback in self.callbacks["cancel"]:
            callback(method)


def _delivery(number: int, method: Any, encoded: bytes, body: bytes) -> bytes:
    """Return the three frames of a delivery, as one read from the socket may bring them."""
    header = struct.pack(">HxxQ", spec.Basic.INDEX, len(body)) + encoded
    start = struct.pack(">BHI", spec.FRAME_HEADER, number, len(header))
    first, last = frame.Method(number, method).marshal(), frame.Body(number, body).marshal()
    return b"".join((first, start, header, bytes([spec.FRAME_END]), last))
