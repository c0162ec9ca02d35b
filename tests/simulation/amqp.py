"""pika's SelectConnection as the library uses it, on the simulated network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pika
import pika.exceptions

from simulation.broker import Broker, Message
from simulation.keys import EXCHANGE, SERVICE
from simulation.life import Life
from simulation.session import Session
from simulation.wire import Wire


class Network:
    """What a process reaches the broker by. It stands for pika's I/O loop in the library's."""

    def __init__(
        self,
        life: Life,
        broker: Broker,
        may_consume: Callable[[], bool],
        may_ack: Callable[[], bool],
    ) -> None:
        self.life, self.broker = life, broker
        self.may_consume, self.may_ack = may_consume, may_ack
        self.connections: list[Connection] = []
        self.arrived = 0


def select_connection(
    _parameters: Any,
    *,
    on_open_callback: Callable[[Any], None],
    on_open_error_callback: Callable[[Any, Exception], None],
    on_close_callback: Callable[[Any, Exception], None],
    custom_ioloop: Network,
) -> Connection:
    """Connect, in the place of pika.SelectConnection."""
    return Connection(custom_ioloop, on_open_callback, on_open_error_callback, on_close_callback)


class Connection:
    """A connection with at most one channel."""

    def __init__(
        self,
        network: Network,
        on_open: Callable[[Any], None],
        on_open_error: Callable[[Any, Exception], None],
        on_close: Callable[[Any, Exception], None],
    ) -> None:
        self.network, self.life, self.broker = network, network.life, network.broker
        self._on_open, self._on_open_error, self._on_close = on_open, on_open_error, on_close
        self.is_open = self.is_closed = self._was_open = False
        self._channel: Channel | None = None
        self.session: Session | None = None
        self._on_blocked: list[Callable[..., None]] = []
        self._on_unblocked: list[Callable[..., None]] = []
        agenda, rng, plan = self.broker.agenda, self.broker.rng, self.broker.plan

        def latency_s() -> float:
            return rng.expovariate(1 / plan.latency_s)

        self.to_broker = Wire(agenda, None, latency_s)
        self.to_client = Wire(agenda, self.life, latency_s)
        network.connections.append(self)
        self.life.act()
        self.to_broker.send(self._accept)

    # What the library calls.

    def channel(self, on_open_callback: Callable[[Any], None]) -> None:
        """Open a channel."""

        def opened() -> None:
            if self.is_open:
                self._channel = Channel(self)
                on_open_callback(self._channel)

        def open_channel() -> None:
            if self.session is not None and self.session.alive:
                self.session.has_channel = True
                self.to_client.send(opened)

        self.to_broker.send(open_channel)

    def add_on_connection_blocked_callback(self, callback: Callable[..., None]) -> None:
        """Call when the broker reads no further."""
        self._on_blocked.append(callback)

    def add_on_connection_unblocked_callback(self, callback: Callable[..., None]) -> None:
        """Call when it reads on."""
        self._on_unblocked.append(callback)

    def close(self) -> None:
        """Close: answers still arrive until the broker has agreed."""
        if not self.is_open:
            raise pika.exceptions.ConnectionWrongStateError("close of what is not open")
        self.is_open = False
        if self._channel is not None:
            self._channel.is_open = False
        self.life.act()

        def closing() -> None:
            if self.session is not None:
                self.session.end()
            error = pika.exceptions.ConnectionClosedByClient(200, "")
            self.to_client.send(lambda: self.lost(error))

        self.to_broker.send(closing)

    def ask(self, answered: Callable[[], None]) -> None:
        """Send a request that the broker simply grants, after what was sent before it."""

        def grant() -> None:
            if self.session is not None and self.session.alive:
                self.to_client.send(answered)

        self.to_broker.send(grant)

    # What arrives.

    def lost(self, error: Exception) -> None:
        """Learn that there is no connection any more."""
        if self.is_closed:
            return
        self.is_open, self.is_closed = False, True
        self.network.connections.remove(self)
        self._leave_channel(error)
        if self._was_open:
            self._on_close(self, error)
        else:
            self._on_open_error(self, error)

    def on_deliver(self, tag: int, message: Message) -> None:
        """Hand a delivery to the consumer's callback."""
        if self._channel is not None and self._channel.on_message is not None:
            self.network.arrived += 1
            method = pika.spec.Basic.Deliver("", tag)
            self._channel.on_message(self._channel, method, message.properties, message.body)

    def on_confirm(self, frame: Any) -> None:
        """Hand on a confirm."""
        if self._channel is not None and self._channel.on_confirm is not None:
            self._channel.on_confirm(frame)

    def on_return(self, queue: str) -> None:
        """Hand on a returned message."""
        if self._channel is not None:
            for callback in self._channel.on_return:
                callback(self._channel, pika.spec.Basic.Return(routing_key=queue), None, b"")

    def on_blocked(self, blocked: bool) -> None:
        """Hand on an alarm, or its end."""
        for callback in self._on_blocked if blocked else self._on_unblocked:
            callback(self, None)

    def on_channel_closed(self, error: Exception) -> None:
        """Learn that the broker has closed the channel; the connection is still there."""
        self._leave_channel(error)

    def on_cancelled(self) -> None:
        """Hand on the end of the consumer."""
        if self._channel is not None:
            for callback in self._channel.on_cancel:
                callback(None)

    def _accept(self) -> None:
        if self.broker.away:
            refused = pika.exceptions.AMQPConnectionError("refused")
            self.to_client.send(lambda: self.lost(refused))
            return
        self.session = Session(self.broker, self)
        self.to_client.send(self._opened)

    def _opened(self) -> None:
        self.is_open = self._was_open = True
        self._on_open(self)

    def _leave_channel(self, error: Exception) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.is_open = False
            for callback in channel.on_close:
                callback(channel, error)


class Channel:
    """A channel, with the callbacks that the library has given it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.channel_number = 1
        self.is_open = True
        self.on_message: Callable[..., None] | None = None
        self.on_confirm: Callable[[Any], None] | None = None
        self.on_return: list[Callable[..., None]] = []
        self.on_close: list[Callable[[Any, Exception], None]] = []
        self.on_cancel: list[Callable[[Any], None]] = []
        self._prefetch = 0

    def add_on_close_callback(self, callback: Callable[[Any, Exception], None]) -> None:
        """Call when the channel is closed."""
        self.on_close.append(callback)

    def add_on_cancel_callback(self, callback: Callable[[Any], None]) -> None:
        """Call when the broker ends the consumer."""
        self.on_cancel.append(callback)

    def add_on_return_callback(self, callback: Callable[..., None]) -> None:
        """Call with a message that no queue was there for."""
        self.on_return.append(callback)

    def exchange_declare(self, *_: object, **__: object) -> None:
        """Declare nothing: the model has what is needed."""

    def queue_bind(self, *_: object) -> None:
        """Bind nothing, likewise."""

    def queue_declare(
        self,
        queue: str,
        passive: bool = False,
        callback: Callable[[Any], None] | None = None,
        **_: object,
    ) -> None:
        """Declare a queue: from then on it takes messages. Or ask for one, which is there."""
        if not passive:
            self._send(lambda session: session.declare(queue))
        if callback is not None:
            self.connection.ask(lambda: callback(None))

    def basic_qos(self, prefetch_count: int, callback: Callable[[Any], None]) -> None:
        """Bound what is in hand."""
        self._prefetch = prefetch_count
        self.connection.ask(lambda: callback(None))

    def basic_consume(
        self, _queue: str, on_message: Callable[..., None], callback: Callable[[Any], None]
    ) -> str:
        """Consume the service's queue."""
        network = self.connection.network
        if not network.may_consume():
            network.life.trace.violation("consuming before etcd is ready", network.life.name)
        self.on_message = on_message
        # The answer precedes the first delivery.
        self.connection.ask(lambda: callback(None))
        self._send(lambda session: session.consume(self._prefetch))
        return "consumer"

    def basic_cancel(self, _consumer_tag: str) -> None:
        """Consume no more."""
        self.on_message = None  # pika itself hands back what still arrives.
        self._send(lambda session: session.cancel())

    def basic_ack(self, delivery_tag: int, multiple: bool = False) -> None:
        """Ack one delivery, or all up to it."""
        network = self.connection.network
        if not network.may_ack():
            network.life.trace.violation(
                "an ack by a process that knows that etcd is another",
                network.life.name,
                delivery_tag,
            )
        self._send(lambda session: session.ack(delivery_tag, multiple))

    def basic_nack(self, delivery_tag: int, multiple: bool = False, requeue: bool = True) -> None:
        """Hand a delivery back."""
        self._send(lambda session: session.hand_back(delivery_tag))

    basic_reject = basic_nack

    def confirm_delivery(
        self, on_confirm: Callable[[Any], None], callback: Callable[[Any], None]
    ) -> None:
        """Have the broker confirm what is published from now on."""
        self.on_confirm = on_confirm
        self._send(lambda session: session.begin_to_publish())
        self.connection.ask(lambda: callback(None))

    def basic_publish(
        self, exchange: str, routing_key: str, body: bytes, properties: Any, mandatory: bool
    ) -> None:
        """Publish to a queue by the default exchange, or an event by the services' own."""
        if exchange not in ("", EXCHANGE) or not mandatory:
            raise AssertionError(f"a message for {exchange!r}, mandatory: {mandatory}")
        if exchange:
            self._send(lambda session: session.publish(SERVICE, body, properties, is_event=True))
        else:
            self._send(lambda session: session.publish(routing_key, body, properties))

    def _send(self, frame: Callable[[Session], None]) -> None:
        """Send a frame; the process may die before it has been written, or behind it."""
        connection, life = self.connection, self.connection.life
        if not self.is_open:
            raise pika.exceptions.ChannelWrongStateError("Channel is closed.")
        life.act()

        def arrive() -> None:
            if connection.session is not None and connection.session.alive:
                frame(connection.session)

        connection.to_broker.send(arrive)
        life.act()
