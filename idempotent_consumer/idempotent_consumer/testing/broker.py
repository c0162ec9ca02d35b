"""A RabbitMQ in memory, which speaks AMQP with pika's own connections and channels.

It has the features that the library uses. ``tests/integration/test_broker_contract.py`` compares
it with a real RabbitMQ.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pika
from pika import frame, spec
from pika.exceptions import AMQPConnectionError, ConnectionWrongStateError, StreamLostError

from .. import amqp
from ..amqp import Properties, with_headers
from .loop import Agenda, Loop, Wire

RESET = StreamLostError("Stream connection lost: ConnectionResetError(104, 'reset')")

_CAPABILITIES = {"publisher_confirms": True, "basic.nack": True}


@dataclass(eq=False)
class Message:
    """A message. Each copy in a queue has its own ``number``; ``returns`` counts its returns.

    ``encoded`` are its properties as they are on the wire.
    """

    number: int
    body: bytes
    encoded: bytes
    exchange: str
    routing_key: str
    returns: int = 0

    @cached_property
    def properties(self) -> Any:
        return Properties().decode(self.encoded)

    @property
    def headers(self) -> dict[str, Any]:
        return self.properties.headers or {}


@dataclass(eq=False)
class Queue:
    """A quorum queue, with the arguments that it was declared with."""

    name: str
    arguments: Mapping[str, Any]
    ready: list[Message] = field(default_factory=list)
    consumers: list[Session] = field(default_factory=list)

    @property
    def bodies(self) -> list[bytes]:
        return [message.body for message in self.ready]


class Ack(NamedTuple):
    """An ack: the number of the consumer on whose channel it came, from 1, and what it acks."""

    epoch: int
    tags: tuple[int, ...]
    multiple: bool


class ChannelError(Exception):
    """An error for which the broker closes a channel: AMQP's code and a text."""


class FakeBroker:
    """A RabbitMQ for processes and tests.

    While it is ``away`` it refuses connections. With ``confirms`` off it sends no confirm: the test
    does, by ``Session.confirm``. ``nacks`` returns whether the queue with this name refuses
    messages. ``exchanges`` are topic exchanges with their bindings, as pairs of a key and a queue.
    ``arrived`` counts the deliveries that each process has received, ``consumed`` the consumers so
    far.
    """

    def __init__(self, agenda: Agenda) -> None:
        self.agenda = agenda
        self.latency_s: Callable[[], float] = lambda: 0.0
        self.away, self.alarm, self.confirms = False, False, True
        self.nacks: Callable[[str], bool] = lambda _: False
        self.exchanges: dict[str, list[tuple[str, str]]] = {}
        self.queues: dict[str, Queue] = {}
        self.sessions: list[Session] = []
        self.connections: list[Connection] = []
        self.published: list[Message] = []
        self.acked: list[Message] = []
        self.acks: list[Ack] = []
        self.arrived: Counter[Loop] = Counter()
        self.consumed = self._stored = 0

    def connect(self, parameters: Any, **callbacks: Any) -> Connection:
        connection = Connection(self, parameters, **callbacks)
        self.connections.append(connection)
        return connection

    # What the test does.

    def publish(self, exchange: str, routing_key: str, body: bytes, properties: Any = None) -> None:
        message = Message(0, body, _encoded(properties), exchange, routing_key)
        for queue in self.route(exchange, routing_key):
            self.store(queue, message)

    def delete_queue(self, name: str) -> None:
        """Delete a queue with its messages, and cancel its consumers."""
        queue = self.queues.pop(name)
        for bindings in self.exchanges.values():
            bindings[:] = [(key, bound) for key, bound in bindings if bound != name]
        for session in list(queue.consumers):
            session.cancelled_by_broker()

    def set_alarm(self, alarm: bool) -> None:
        """Start or end an alarm. During one, connections that publish are not read any more."""
        self.alarm = alarm
        for session in list(self.sessions):
            session.unblock()

    def lose(
        self,
        connection: Connection,
        kept: Sequence[int] = (0, 0),
        noticed_s: Sequence[float] = (0.0, 0.0),
    ) -> int:
        """Reset a connection; return how many of the frames under way are lost.

        Both pairs are for the broker and the client: each still receives the first ``kept`` frames,
        and notices the end ``noticed_s`` after them.
        """
        lost = connection.to_broker.cut(kept[0], connection.session.end, noticed_s[0])
        lost += connection.to_client.cut(kept[1], partial(connection.lost, RESET), noticed_s[1])
        if not connection.loop.alive:
            self.connections.remove(connection)
        return lost

    def gone(self, loop: Loop) -> None:
        """End the connections of a dead process; what it has written still arrives before."""
        for connection in self.connections_of(loop):
            self.lose(connection, (connection.to_broker.under_way, 0))

    # What the test looks at.

    def connections_of(self, loop: Loop) -> list[Connection]:
        return [connection for connection in self.connections if connection.loop is loop]

    def unsettled(self, *ends: str) -> Iterator[Message]:
        """Yield the messages that are unacked, or in any queue but these."""
        for session in self.sessions:
            yield from session.unacked.values()
        for name, queue in self.queues.items():
            if name not in ends:
                yield from queue.ready

    # What the broker decides. A subclass may decide otherwise, or observe.

    def pick(self, queue: Queue, free: list[Session]) -> tuple[Message, Session]:
        """Remove the next message, for one of the consumers with room."""
        return queue.ready.pop(0), free[0]

    def publishing(self, session: Session, message: Message) -> None:
        """Observe a message before it is routed; its number is its confirm's."""
        self.published.append(message)

    def refused(self, session: Session, error: ChannelError) -> None:
        """Observe a client's error for which its channel is closed."""

    def confirm(self, session: Session, number: int) -> None:
        if self.confirms:
            session.confirm(number)

    def settled(self, session: Session, message: Message) -> None:
        self.acked.append(message)

    # The queues.

    def route(self, exchange: str, routing_key: str) -> list[Queue]:
        """Return the queues for a message; raises ChannelError without the exchange."""
        if not exchange:
            found = {routing_key}
        elif exchange in self.exchanges:
            words = routing_key.split(".")
            bindings = self.exchanges[exchange]
            found = {queue for key, queue in bindings if _matches(key.split("."), words)}
        else:
            raise ChannelError(404, f"NOT_FOUND - no exchange '{exchange}' in vhost '/'")
        return [queue for name, queue in self.queues.items() if name in found]

    def store(self, queue: Queue, message: Message) -> None:
        """Put a copy of a message into a queue, with a new number."""
        self._stored += 1
        self.put(queue, replace(message, number=self._stored))

    def put(self, queue: Queue, message: Message) -> None:
        queue.ready.append(message)
        if ttl_ms := queue.arguments.get("x-message-ttl"):
            self.agenda.later(ttl_ms / 1000, partial(self._expire, queue, message))
        self.dispatch(queue)

    def _expire(self, queue: Queue, message: Message) -> None:
        if message in queue.ready:
            queue.ready.remove(message)
            self.dead_letter(queue, message, "expired")

    def dispatch(self, queue: Queue) -> None:
        while queue.ready and (free := [each for each in queue.consumers if each.has_room]):
            message, session = self.pick(queue, free)
            session.deliver(message)

    def take_back(self, queue: Queue, messages: list[Message]) -> None:
        """Requeue messages, after others that were returned and before the rest."""
        limit = queue.arguments.get("x-delivery-limit", 20)
        at = sum(message.returns > 0 for message in queue.ready)
        for message in messages:
            message.returns += 1
            if 0 <= limit < message.returns:
                self.dead_letter(queue, message, "delivery_limit")
            else:
                queue.ready.insert(at, message)
                at += 1
        if self.queues.get(queue.name) is queue:
            self.dispatch(queue)

    def dead_letter(self, queue: Queue, message: Message, reason: str) -> None:
        """Move a message to where its queue dead-letters, or drop it."""
        exchange = queue.arguments.get("x-dead-letter-exchange")
        if exchange is None:
            return
        routing_key = queue.arguments.get("x-dead-letter-routing-key", message.routing_key)
        targets = self.route(exchange, routing_key)
        if not targets:
            # At-least-once dead-lettering keeps it until there is a queue for it.
            self.agenda.later(1.0, partial(self.dead_letter, queue, message, reason))
            return
        death = {"queue": queue.name, "reason": reason, "count": 1, "exchange": message.exchange}
        deaths = [death, *message.headers.get("x-death", ())]
        encoded = with_headers(message.encoded, {"x-death": deaths})
        for target in targets:
            self.store(target, Message(0, message.body, encoded, exchange, routing_key))


class Session:
    """The broker's side of a connection, with the one channel and consumer that the library uses.

    ``is_open`` is the channel's, and ``consuming`` says whether it consumes ``queue``. ``unacked``
    has messages by delivery tag. ``unconfirmed`` has by a message's number whether it was accepted.
    """

    queue: Queue

    def __init__(self, broker: FakeBroker, connection: Connection) -> None:
        self.broker, self.connection, self.loop = broker, connection, connection.loop
        self.blocked = self.is_open = self.consuming = self.confirming = False
        self.unacked: dict[int, Message] = {}
        self.unconfirmed: dict[int, bool] = {}
        self._unread: list[Callable[[], None]] = []
        self._consumer_tag = ""
        self._prefetch = self._tag = self._published = self._epoch = 0

    @property
    def has_room(self) -> bool:
        return not self._prefetch or len(self.unacked) < self._prefetch

    def accept(self) -> None:
        if self.broker.away:
            refused = AMQPConnectionError("Connection refused")
            self.connection.to_client.send(partial(self.connection.lost, refused))
            return
        self.broker.sessions.append(self)
        # All at once: the broker needs nothing from pika's answers.
        self._send(spec.Connection.Start(server_properties={"capabilities": _CAPABILITIES}))
        self._send(spec.Connection.Tune(channel_max=1, frame_max=131072))
        self._send(spec.Connection.OpenOk())

    def receive(self, sent: Sent) -> None:
        method = sent.method
        if isinstance(method, spec.Basic.Publish) and self.broker.alarm and not self.blocked:
            self.blocked = True
            self._send(spec.Connection.Blocked("low on memory"))
        if self.blocked:
            self._unread.append(partial(self.receive, sent))
            return
        if not (self.is_open or isinstance(method, spec.Channel.Open | spec.Connection.Close)):
            return
        try:
            do = getattr(self, method.NAME.replace(".", "_").lower())
            answer = do(method, *sent.content)
            if answer is not None and not getattr(method, "nowait", False):
                self._send(answer)
        except ChannelError as error:
            self.broker.refused(self, error)
            self.close_channel(error)

    def unblock(self) -> None:
        if self.blocked and not self.broker.alarm:
            self.blocked = False
            self._send(spec.Connection.Unblocked())
            while self._unread:
                self._unread.pop(0)()

    def _send(self, method: Any, *content: bytes) -> None:
        self.connection.to_client.send(partial(self.connection.receive, method, *content))

    # What the broker sends.

    def deliver(self, message: Message) -> None:
        self._tag += 1
        self.unacked[self._tag] = message
        encoded = message.encoded
        if message.returns:
            encoded = with_headers(encoded, {"x-delivery-count": message.returns})
        source = (message.exchange, message.routing_key)
        method = spec.Basic.Deliver(self._consumer_tag, self._tag, message.returns > 0, *source)
        self._send(method, encoded, message.body)

    def confirm(self, number: int, multiple: bool = False) -> None:
        """Ack or nack a published message, or all up to it."""
        taken = self.unconfirmed[number]
        for each in [n for n in self.unconfirmed if n <= number] if multiple else [number]:
            del self.unconfirmed[each]
        self._send((spec.Basic.Ack if taken else spec.Basic.Nack)(number, multiple))

    def cancelled_by_broker(self) -> None:
        """End the consumer, as when its queue is deleted or moves."""
        self._end_consumer()
        self._send(spec.Basic.Cancel(self._consumer_tag))

    def close_channel(self, error: ChannelError) -> None:
        if self.is_open:
            self._end_channel()
            self._send(spec.Channel.Close(*error.args, 0, 0))

    # What the client sends: AMQP's methods, which return the answer.

    def connection_close(self, _method: Any) -> Any:
        self.end()
        return spec.Connection.CloseOk()

    def channel_open(self, _method: Any) -> Any:
        self.is_open = True
        return spec.Channel.OpenOk()

    def channel_close(self, _method: Any) -> Any:
        self._end_channel()
        return spec.Channel.CloseOk()

    def exchange_declare(self, method: Any) -> Any:
        self.broker.exchanges.setdefault(method.exchange, [])
        return spec.Exchange.DeclareOk()

    def queue_declare(self, method: Any) -> Any:
        name, arguments = method.queue, method.arguments or {}
        if not method.passive:
            known = self.broker.queues.setdefault(name, Queue(name, arguments)).arguments
            for key in {**known, **arguments}:
                received, current = arguments.get(key), known.get(key)
                if received != current:
                    inequivalent = f"inequivalent arg '{key}' for queue '{name}' in vhost '/'"
                    values = f"received {_shown(received)} but current is {_shown(current)}"
                    raise ChannelError(406, f"PRECONDITION_FAILED - {inequivalent}: {values}")
        queue = self._queue(name)
        return spec.Queue.DeclareOk(name, len(queue.ready), len(queue.consumers))

    def queue_bind(self, method: Any) -> Any:
        self._queue(method.queue)
        self.broker.route(method.exchange, "")
        bindings = self.broker.exchanges[method.exchange]
        if (method.routing_key, method.queue) not in bindings:
            bindings.append((method.routing_key, method.queue))
        return spec.Queue.BindOk()

    def basic_qos(self, method: Any) -> Any:
        self._prefetch = method.prefetch_count
        return spec.Basic.QosOk()

    def basic_consume(self, method: Any) -> None:
        self.queue, self._consumer_tag = self._queue(method.queue), method.consumer_tag
        self.queue.consumers.append(self)
        self.consuming = True
        self._epoch = self.broker.consumed = self.broker.consumed + 1
        # Sent here, to precede the first delivery.
        self._send(spec.Basic.ConsumeOk(self._consumer_tag))
        self.broker.dispatch(self.queue)

    def basic_cancel(self, method: Any) -> Any:
        self._end_consumer()
        return spec.Basic.CancelOk(method.consumer_tag)

    def basic_ack(self, method: Any) -> None:
        tags = self._tags(method.delivery_tag, method.multiple)
        self.broker.acks.append(Ack(self._epoch, tuple(tags), method.multiple))
        for message in self._take(tags):
            self.broker.settled(self, message)
        self.broker.dispatch(self.queue)

    def basic_reject(self, method: Any) -> None:
        if not method.requeue:
            raise NotImplementedError(method)
        taken = self._take(self._tags(method.delivery_tag, multiple=False))
        self.broker.take_back(self.queue, taken)

    def confirm_select(self, _method: Any) -> Any:
        self.confirming = True
        return spec.Confirm.SelectOk()

    def basic_publish(self, method: Any, encoded: bytes, body: bytes) -> None:
        broker, exchange, routing_key = self.broker, method.exchange, method.routing_key
        queues = broker.route(exchange, routing_key)
        number = self._published = self._published + 1
        message = Message(number, body, encoded, exchange, routing_key)
        broker.publishing(self, message)
        if method.mandatory and not queues:
            self._send(spec.Basic.Return(312, "NO_ROUTE", exchange, routing_key), encoded, body)
        accepting = [queue for queue in queues if not broker.nacks(queue.name)]
        for queue in accepting:
            broker.store(queue, message)
        if self.confirming:
            self.unconfirmed[number] = len(accepting) == len(queues)
            broker.confirm(self, number)

    # The end.

    def end(self) -> None:
        """End the connection: what is unacked is requeued, what is unconfirmed stays so.

        A blocked broker does not read the end either, nor what was written before it.
        """
        if self.blocked:
            self._unread.append(self.end)
        elif self in self.broker.sessions:
            self.broker.sessions.remove(self)
            self._end_channel()

    def _end_channel(self) -> None:
        self.is_open = False
        self._end_consumer()
        if self.unacked:
            self.broker.take_back(self.queue, self._take(list(self.unacked)))

    def _tags(self, tag: int, multiple: bool) -> list[int]:
        if tag not in self.unacked:
            raise ChannelError(406, f"PRECONDITION_FAILED - unknown delivery tag {tag}")
        return [each for each in self.unacked if each <= tag] if multiple else [tag]

    def _take(self, tags: list[int]) -> list[Message]:
        return [self.unacked.pop(each) for each in tags]

    def _queue(self, name: str) -> Queue:
        if name not in self.broker.queues:
            raise ChannelError(404, f"NOT_FOUND - no queue '{name}' in vhost '/'")
        return self.broker.queues[name]

    def _end_consumer(self) -> None:
        if self.consuming:
            self.consuming = False
            self.queue.consumers.remove(self)


def _encoded(properties: Any) -> bytes:
    if isinstance(properties, bytes):
        return properties
    return b"".join((properties or pika.BasicProperties()).encode())


def _shown(value: object) -> str:
    return "none" if value is None else f"'{value}'"


def _matches(pattern: list[str], words: list[str]) -> bool:
    if not pattern:
        return not words
    if pattern[0] == "#":
        return any(_matches(pattern[1:], words[at:]) for at in range(len(words) + 1))
    return bool(words) and pattern[0] in ("*", words[0]) and _matches(pattern[1:], words[1:])


# The client's side.


class Sent(NamedTuple):
    """What a process sends: a method of AMQP with its content, or None to connect.

    The content is a message's encoded properties and its body.
    """

    method: Any
    content: tuple[bytes, ...] = ()


class Connection(amqp.Connection):
    """The library's own connection, and so pika's, on a pair of wires.

    ``session`` is the broker's side. There are no heartbeats: a test ends a connection itself.
    """

    def __init__(self, broker: FakeBroker, parameters: Any, **callbacks: Any) -> None:
        loop: Any = asyncio.get_running_loop()
        self.broker, self.loop = broker, loop
        self.session = Session(broker, self)
        self.to_broker = Wire(broker.agenda, None, broker.latency_s)
        self.to_client = Wire(broker.agenda, self.loop, broker.latency_s)
        super().__init__(parameters, **callbacks)

    def pause_reading(self) -> None:
        self.to_client.pause(True)

    def resume_reading(self) -> None:
        self.to_client.pause(False)

    def lost(self, error: Exception | None) -> None:
        """Notice the end of the stream; the error is None if the client ended it."""
        if not self.is_closed:
            self.broker.connections.remove(self)
            self._on_stream_terminated(error)

    def receive(self, method: Any, *content: bytes) -> None:
        if self.is_closed:
            return
        number = int(not method.NAME.startswith("Connection"))
        if isinstance(method, spec.Basic.Deliver):
            # pika itself rejects what arrives after a cancel.
            cancelled = self._channels[number]._cancelled  # noqa: SLF001
            self.broker.arrived[self.loop] += method.consumer_tag not in cancelled
        read: bytes = frame.Method(number, method).marshal()
        if content:
            encoded, body = content
            # Unchanged: pika could not write some of these properties.
            properties = SimpleNamespace(INDEX=spec.Basic.INDEX, encode=lambda: [encoded])
            read += frame.Header(number, len(body), properties).marshal()
            read += frame.Body(number, body).marshal() if body else b""
        self._on_data_available(read)

    # Where pika reaches the network.

    def _adapter_connect_stream(self) -> None:
        self._step(Sent(None), self.session.accept)

    def _adapter_disconnect_stream(self) -> None:
        self.to_broker.send(self.session.end)
        self.to_client.cut(0, partial(self.lost, None))

    def _create_heartbeat_checker(self) -> None:
        pass

    def _send_method(self, channel_number: int, method: Any, content: Any = None) -> None:
        if self.is_closed:
            raise ConnectionWrongStateError("a method on a closed connection")
        sent = Sent(method, (_encoded(content[0]), content[1]) if content else ())
        self._step(sent, partial(self.session.receive, sent))

    def _step(self, sent: Sent, arrive: Callable[[], object]) -> None:
        """Send. The process may die before it has written, or after."""
        self.loop.act("before", sent)
        self.to_broker.send(arrive)
        self.loop.act("after", sent)
