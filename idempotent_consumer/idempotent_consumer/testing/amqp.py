"""pika's connection and channel as the library uses them, on the simulated network."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import pika
from pika import frame, spec
from pika.exceptions import (
    AMQPConnectionError,
    ChannelClosedByClient,
    ChannelWrongStateError,
    ConnectionOpenAborted,
    ConnectionWrongStateError,
)

from .loop import Loop, Wire

if TYPE_CHECKING:
    from .broker import FakeBroker, Session

Callback = Callable[..., object]


class Sent(NamedTuple):
    """A frame as a process sends it: AMQP's method with its arguments."""

    method: str
    arguments: tuple[Any, ...] = ()


class Connection:
    """A connection: what ``pika``'s asyncio connection is to the library.

    ``session`` is the broker's side, once it has accepted. Frames in each direction are on a wire.
    """

    def __init__(
        self,
        broker: FakeBroker,
        parameters: Any,
        on_open: Callback,
        on_open_error: Callback,
        on_close: Callback,
    ) -> None:
        self.broker, self.params = broker, parameters
        loop: Any = asyncio.get_running_loop()
        self.loop: Loop = loop
        self._on_open, self._on_open_error, self._on_close = on_open, on_open_error, on_close
        self.is_open = self.is_closed = self._was_open = False
        self.reader: Any = None
        self.session: Session | None = None
        self._channels: dict[int, Channel] = {}
        self._on_blocked: list[Callback] = []
        self._on_unblocked: list[Callback] = []
        self.to_broker = Wire(broker.agenda, None, broker.latency_s)
        self.to_client = Wire(broker.agenda, self.loop, broker.latency_s)
        self.send(0, Sent("connect"), self._accept)

    # What the library calls.

    def channel(self, on_open_callback: Callback) -> Channel:
        """Open a channel."""
        number = max(self._channels, default=0) + 1
        channel = self._channels[number] = Channel(self, number)

        def opened(_: Any) -> None:
            channel.is_open = True
            on_open_callback(channel)

        self.send(number, Sent("channel_open", (opened,)))
        return channel

    def add_on_connection_blocked_callback(self, callback: Callback) -> None:
        """Call back when the broker reads no further."""
        self._on_blocked.append(callback)

    def add_on_connection_unblocked_callback(self, callback: Callback) -> None:
        """Call back when it reads on."""
        self._on_unblocked.append(callback)

    def pause_reading(self) -> None:
        """Leave in the socket what arrives."""
        self.to_client.pause(True)

    def resume_reading(self) -> None:
        """Read what is there, and go on."""
        self.to_client.pause(False)

    def close(self) -> None:
        """Close: answers still arrive until the broker has agreed."""
        if self.is_closed or (self._was_open and not self.is_open):
            raise ConnectionWrongStateError("close of a connection that is closing or closed")
        if not self._was_open:
            error = ConnectionOpenAborted("close of a connection that was not open yet")
            self.to_broker.send(self.end_session)
            self.broker.agenda.later(0.0, partial(self.lost, error), self.loop)
            return
        self.is_open = False
        for channel in self._channels.values():
            channel.is_open = False
        self.send(0, Sent("close"), self._close_session)

    # The network.

    def send(self, number: int, sent: Sent, arrive: Callback | None = None) -> None:
        """Send a frame; the process may die before it has been written, or behind it."""

        def received() -> None:
            if self.session is not None:
                self.session.receive(number, sent)

        self.loop.act("before", sent)
        self.to_broker.send(received if arrive is None else arrive)
        self.loop.act("behind", sent)

    def end_session(self) -> None:
        """Let the broker know that there is no client any more."""
        if self.session is not None:
            self.session.end()

    def lost(self, error: Exception) -> None:
        """Learn that there is no connection any more."""
        if self.is_closed:
            return
        self.is_open, self.is_closed = False, True
        self.broker.connections.remove(self)
        for number in list(self._channels):
            self.on_channel_closed(number, error)
        (self._on_close if self._was_open else self._on_open_error)(self, error)

    def _accept(self) -> None:
        if self.broker.away:
            self.to_client.send(partial(self.lost, AMQPConnectionError("Connection refused")))
            return
        self.session = self.broker.accept(self)
        self.to_client.send(self._opened)

    def _close_session(self) -> None:
        if self.session is not None:
            self.session.close()

    def _opened(self) -> None:
        if not self.is_closed:
            self.is_open = self._was_open = True
            self._on_open(self)

    # What arrives.

    def on_frame(self, number: int, method: str, *arguments: Any) -> None:
        """Hand a frame to its channel, where that is still there."""
        if number in self._channels:
            getattr(self._channels[number], method)(*arguments)

    def on_channel_closed(self, number: int, error: Exception) -> None:
        """Learn that a channel has been closed."""
        channel = self._channels.pop(number, None)
        if channel is not None:
            channel.is_open, channel.is_closed = False, True
            for callback in channel.on_close:
                callback(channel, error)

    def on_blocked(self, blocked: bool) -> None:
        """Learn of an alarm, or of its end."""
        for callback in self._on_blocked if blocked else self._on_unblocked:
            callback(self, None)


def _sends(method: str, *names: str, **defaults: Any) -> Callable[..., None]:
    """Return one of pika's methods: it sends the frame of that name, its arguments in order."""
    order = (*names, *defaults)

    def send(channel: Channel, *given: Any, callback: Callback | None = None, **named: Any) -> None:
        arguments = {**defaults, **dict(zip(order, given, strict=False)), **named}
        answered = (callback,) if callback is not None else ()
        channel.send(method, *(arguments[name] for name in order), *answered)

    return send


class Channel:
    """A channel, with the callbacks that the library has given it."""

    def __init__(self, connection: Connection, number: int) -> None:
        self.connection, self.channel_number = connection, number
        self.is_open = self.is_closed = False
        self._consumers: dict[str, Callback] = {}
        self._cancelled: set[str] = set()
        self._on_confirm: Callback = lambda _: None
        self._on_return: list[Callback] = []
        self._on_cancel: list[Callback] = []
        self.on_close: list[Callback] = []

    # What the library calls, with pika's arguments as far as they are used.

    def close(self) -> None:
        """Close it."""
        self.send("channel_close")
        self.is_open = False
        error = ChannelClosedByClient(0, "Normal shutdown")
        closed = partial(self.connection.on_channel_closed, self.channel_number, error)
        self.connection.broker.agenda.later(0.0, closed, self.connection.loop)

    def add_on_close_callback(self, callback: Callback) -> None:
        """Call back when the channel is closed."""
        self.on_close.append(callback)

    def add_on_cancel_callback(self, callback: Callback) -> None:
        """Call back when the broker ends a consumer."""
        self._on_cancel.append(callback)

    def add_on_return_callback(self, callback: Callback) -> None:
        """Call back with a message that no queue was there for."""
        self._on_return.append(callback)

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
        """Consume a queue; return the consumer's tag."""
        tag = f"ctag{self.channel_number}.{len(self._consumers) + 1}"
        self._consumers[tag] = on_message_callback
        self.send("basic_consume", queue, tag, callback)
        return tag

    def basic_cancel(self, consumer_tag: str, callback: Callback | None = None) -> None:
        """Consume no more."""
        self._cancelled.add(consumer_tag)
        self.send("basic_cancel", consumer_tag, callback)

    def confirm_delivery(
        self, ack_nack_callback: Callback, callback: Callback | None = None
    ) -> None:
        """Have the broker confirm what is published from now on."""
        self._on_confirm = ack_nack_callback
        self.send("confirm_select", callback)

    def basic_publish(
        self,
        exchange: str,
        routing_key: str,
        body: bytes,
        properties: Any = None,
        mandatory: bool = False,
    ) -> None:
        """Publish a message."""
        encoded = b"".join((properties or pika.BasicProperties()).encode())
        self.send("basic_publish", exchange, routing_key, body, encoded, mandatory)

    def send(self, method: str, *arguments: Any) -> None:
        """Send a frame. Raises what pika raises on a channel that is not open."""
        if not self.is_open:
            raise ChannelWrongStateError("Channel is closed.")
        self.connection.send(self.channel_number, Sent(method, arguments))

    # What arrives.

    def on_answer(self, answered: Callback, method: Any) -> None:
        """Hand on the answer to what was asked."""
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
        """Hand on a confirm."""
        self._on_confirm(method)

    def on_return(self, method: Any, encoded: bytes, body: bytes) -> None:
        """Hand on a message that came back."""
        properties = spec.props[spec.Basic.INDEX]().decode(encoded)
        for callback in self._on_return:
            callback(self, method, properties, body)

    def on_cancel(self, method: Any) -> None:
        """Hand on the end of a consumer."""
        for callback in self._on_cancel:
            callback(method)


def _delivery(number: int, method: Any, encoded: bytes, body: bytes) -> bytes:
    """Return the three frames of a delivery, as one read from the socket may bring them."""
    header = struct.pack(">HxxQ", spec.Basic.INDEX, len(body)) + encoded
    start = struct.pack(">BHI", spec.FRAME_HEADER, number, len(header))
    first, last = frame.Method(number, method).marshal(), frame.Body(number, body).marshal()
    return b"".join((first, start, header, bytes([spec.FRAME_END]), last))
