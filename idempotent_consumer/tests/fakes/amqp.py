"""RabbitMQ below the library's connections: it takes the place of pika's connection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pika.exceptions
import pytest
from pika import frame, spec

from idempotent_consumer.bus import frames
from idempotent_consumer.testing.loop import ManualLoop


class Loop(ManualLoop):
    """A manual loop that has what pika's connections are given, which nothing here uses."""

    ioloop = None


class FakeChannel:
    """A channel that keeps the properties of what is published on it."""

    channel_number = 1

    def __init__(self, connection: FakeConnection) -> None:
        self.connection, self.is_open = connection, True
        self.sent: list[object] = []
        self.asked: list[str] = []
        self._answers: list[Callable[[Any], None]] = []
        self._tag = 0
        self._on_message: Callable[..., None] = lambda *_: None
        self._on_cancel: Callable[[Any], None] = lambda _: None
        self._on_confirm: Callable[[Any], None] = lambda _: None
        self._on_close: list[Callable[..., None]] = []

    # What the test does.

    def ack(self, number: int) -> None:
        """Confirm a message by its number, from 1."""
        self._on_confirm(frame.Method(1, spec.Basic.Ack(number)))

    def nack(self, number: int) -> None:
        """Do not take a message."""
        self._on_confirm(frame.Method(1, spec.Basic.Nack(number)))

    def deliver(self) -> None:
        """Deliver a message."""
        self._tag += 1
        method = spec.Basic.Deliver(delivery_tag=self._tag)
        self._on_message(self, method, spec.BasicProperties(), b"{}")

    def cancel(self) -> None:
        """Cancel the consumer."""
        self._on_cancel(frame.Method(1, spec.Basic.Cancel("consumer", True)))

    def answer(self) -> None:
        """Answer that the queue that was asked for is there."""
        self._answers.pop()(None)

    def end(self, error: Exception) -> None:
        """End, with the connection or alone."""
        self.is_open = False
        for callback in self._on_close:
            callback(self, error)

    # What the library calls.

    def add_on_close_callback(self, callback: Callable[..., None]) -> None:
        """Call at the end."""
        self._on_close.append(callback)

    def add_on_cancel_callback(self, callback: Callable[..., None]) -> None:
        """Call when the broker cancels the consumer."""
        self._on_cancel = callback

    def exchange_declare(self, *_: object, **__: object) -> None:
        """Declare nothing."""

    def queue_bind(self, *_: object) -> None:
        """Bind nothing."""

    def queue_declare(
        self,
        queue: str,
        passive: bool = False,
        callback: Callable[[Any], None] | None = None,
        **_: object,
    ) -> None:
        """Note which queues are asked for; the test answers."""
        if passive:
            self.asked.append(queue)
        if callback is not None:
            self._answers.append(callback)

    def basic_qos(self, prefetch_count: int, callback: Callable[[Any], None]) -> None:
        """Bound nothing."""
        callback(None)

    def basic_consume(
        self, _queue: str, on_message: Callable[..., None], callback: Callable[[Any], None]
    ) -> str:
        """Hand what is delivered to a callback."""
        self._on_message = on_message
        callback(None)
        return "consumer"

    def add_on_return_callback(self, callback: Callable[..., None]) -> None:
        """Return nothing."""

    def confirm_delivery(
        self, on_confirm: Callable[[Any], None], callback: Callable[[Any], None]
    ) -> None:
        """Confirm from now on."""
        self._on_confirm = on_confirm
        callback(None)

    def basic_publish(
        self,
        _exchange: str,
        _routing_key: str,
        _body: bytes,
        properties: object,
        mandatory: bool = False,
    ) -> None:
        """Take a message."""
        self.sent.append(properties)


class FakeConnection:
    """A connection that opens and ends at the test's word."""

    reader: object = None

    def __init__(
        self,
        loop: ManualLoop,
        on_open: Callable[[Any], None],
        on_refused: Callable[..., None],
        on_close: Callable[..., None],
    ) -> None:
        self._loop = loop
        self._on_open, self._on_refused, self._on_close = on_open, on_refused, on_close
        self.is_open = self.is_closed = False
        self.channels: list[FakeChannel] = []
        self._on_blocked: list[Callable[..., None]] = []
        self._on_unblocked: list[Callable[..., None]] = []

    # What the test does.

    def accept(self) -> None:
        """Let it open."""
        self.is_open = True
        self._on_open(self)

    def refuse(self) -> None:
        """Do not let it open."""
        self.is_closed = True
        self._on_refused(self, ConnectionRefusedError("refused"))

    def lose(self) -> None:
        """End it, as when the broker goes."""
        self._end(pika.exceptions.StreamLostError("lost"))

    def alarm(self) -> None:
        """Tell of an alarm: nothing is read from here on."""
        for callback in self._on_blocked:
            callback(self, None)

    def alarm_ends(self) -> None:
        """Tell that everything is read again."""
        for callback in self._on_unblocked:
            callback(self, None)

    # What the library calls.

    def channel(self, on_open_callback: Callable[[Any], None]) -> None:
        """Open a channel."""
        self.channels.append(FakeChannel(self))
        on_open_callback(self.channels[-1])

    def add_on_connection_blocked_callback(self, callback: Callable[..., None]) -> None:
        """Call when there is an alarm."""
        self._on_blocked.append(callback)

    def add_on_connection_unblocked_callback(self, callback: Callable[..., None]) -> None:
        """Call when it ends."""
        self._on_unblocked.append(callback)

    def close(self) -> None:
        """Close: it has ended once the broker has agreed."""
        self.is_open = False
        error = pika.exceptions.ConnectionClosedByClient(200, "")
        self._loop.call_soon(lambda: self._end(error))

    def _end(self, error: Exception) -> None:
        self.is_open, self.is_closed = False, True
        for channel in self.channels:
            channel.end(error)
        self._on_close(self, error)


class Broker:
    """A broker with the connections that were opened to it, the last one at hand."""

    def __init__(self, loop: ManualLoop) -> None:
        self._loop = loop
        self.connections: list[FakeConnection] = []

    def connect(
        self,
        _parameters: Any,
        *,
        on_open_callback: Callable[[Any], None],
        on_open_error_callback: Callable[..., None],
        on_close_callback: Callable[..., None],
        custom_ioloop: Any,
    ) -> FakeConnection:
        """Take the place of pika's connection."""
        self.connections.append(
            FakeConnection(self._loop, on_open_callback, on_open_error_callback, on_close_callback)
        )
        return self.connection

    @classmethod
    def reached(cls, loop: ManualLoop, monkeypatch: pytest.MonkeyPatch) -> Broker:
        """Return one to which the library's connections go from now on."""
        broker = cls(loop)
        monkeypatch.setattr(frames, "Connection", broker.connect)
        return broker

    @property
    def connection(self) -> FakeConnection:
        """Return the last connection."""
        return self.connections[-1]

    @property
    def channel(self) -> FakeChannel:
        """Return the last connection's channel."""
        return self.connection.channels[-1]

    @property
    def sent(self) -> list[object]:
        """Return the properties of all that has been published, in order."""
        return [
            properties
            for connection in self.connections
            for channel in connection.channels
            for properties in channel.sent
        ]
