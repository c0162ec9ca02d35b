"""AMQP with pika: connection parameters, errors, and everything that relies on pika's internals."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pika
from pika import data as pika_data
from pika import exceptions
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.adapters.base_connection import _StreamingProtocolShim
from pika.adapters.utils.connection_workflow import AMQPConnector
from pika.tcp_socket_opts import set_sock_opts

from .names import BROKER_HEADERS
from .settings import SettingsError, amqp_url

# Connecting.

HEARTBEAT_S = 10
"""pika notices a frozen broker after twice this time and 10 s at the latest. A URL may set another
interval with ``?heartbeat=``."""

KEEPALIVE = {"TCP_KEEPIDLE": 3, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3}  # seconds, seconds, times
TCP_OPTIONS = {**KEEPALIVE, "TCP_USER_TIMEOUT": 6_000}  # milliseconds
"""With these, TCP notices within 6 s that a broker has vanished from the network, whether the
connection is idle or not (Linux's page tcp(7)); heartbeats alone would take up to 30 s. One that
publishes has only ``KEEPALIVE``: TCP_USER_TIMEOUT also ends a connection whose peer does not read,
as a broker with an alarm does not. A URL may set other options with ``?tcp_options=``."""


def parameters_of(
    url: str, name: str, tcp_options: dict[str, int] = TCP_OPTIONS
) -> pika.URLParameters:
    """Return pika's parameters for a URL, with our time-outs; RabbitMQ's UI shows the ``name``.

    Raises SettingsError for a URL that pika rejects, or could not connect with.
    """
    try:
        amqp_url(url)
    except ValueError as error:
        raise SettingsError(f"RABBITMQ_URL: {error}") from None
    try:
        parameters = _read(url)
        if "heartbeat=" not in url:
            parameters.heartbeat = HEARTBEAT_S
        parameters.connection_attempts = 1
        parameters.socket_timeout = 5
        parameters.stack_timeout = 10
        if "tcp_options=" not in url:
            # Only Linux has all of them.
            available = {option: n for option, n in tcp_options.items() if hasattr(socket, option)}
            parameters.tcp_options = available
        parameters.client_properties = {"connection_name": name}
    except _WRONG_URL:
        raise SettingsError(f"RABBITMQ_URL: {_fault_of(url)}") from None
    if parameters.ssl_options and not parameters.ssl_options.context.check_hostname:
        raise SettingsError(
            "RABBITMQ_URL: TLS checks no certificate with the protocol in its ssl_options: leave "
            "that out"
        )
    if len(parameters.virtual_host.encode()) > 255:
        raise SettingsError("RABBITMQ_URL: its virtual host is longer than AMQP allows, 255 bytes")
    if not parameters.heartbeat:
        raise SettingsError("RABBITMQ_URL: without heartbeats a frozen broker is never noticed")
    if parameters.heartbeat > 65_535:
        raise SettingsError("RABBITMQ_URL: heartbeat takes at most 65535 seconds, as AMQP does")
    return parameters


_WRONG_URL = (AttributeError, TypeError, ValueError, SyntaxError, OSError, OverflowError)
"""What pika raises for a wrong URL."""


def _read(url: str) -> pika.URLParameters:
    parameters = pika.URLParameters(url)
    with socket.socket() as probe:  # pika itself would set them only when it connects.
        set_sock_opts(parameters.tcp_options, probe)
    return parameters


def _fault_of(url: str) -> str:
    """Say what pika rejects. Its own message has the option's value, which may be a secret."""
    parts = urlsplit(url)
    for option, values in parse_qs(parts.query).items():
        if len(values) > 1:
            return f"its query has {option} more than once"
        try:
            _read(f"{parts.scheme}://h/?{urlencode({option: values[0]})}")
        except _WRONG_URL as error:
            why = f": {error.strerror}" if isinstance(error, OSError) else ""
            return f"pika does not take what its query has for {option}{why}"
    return "pika does not take it"


def explain(error: BaseException) -> str:  # noqa: PLR0911 - one table, read from top to bottom
    """Describe a failure in one line, with what to do about it if that is known."""
    for cause in _causes(error):
        match cause:
            case exceptions.ChannelClosedByBroker() if "for exchange" in cause.reply_text:
                return (
                    f"{cause.reply_text}. A service's exchange is a durable topic exchange: name "
                    "another with exchange=, or delete this one where nothing else needs it"
                )
            case exceptions.ChannelClosedByBroker() if "inequivalent arg" in cause.reply_text:
                return (
                    f"{cause.reply_text}. A queue's or exchange's arguments never change: delete "
                    "it (rabbitmqctl delete_queue NAME) when it is empty, and it is made again"
                )
            case exceptions.ChannelClosedByBroker(reply_code=404) if "no queue" in cause.reply_text:
                return f"{cause.reply_text}: it was deleted, and is declared again"
            case (
                exceptions.ProbableAuthenticationError() | exceptions.ConnectionClosedByBroker()
            ) if "(403" in str(cause):
                return "RabbitMQ refuses the user or the password of RABBITMQ_URL"
            case exceptions.ConnectionOpenAborted():
                return "it takes the connection and does not answer: it may be frozen"
            case exceptions.IncompatibleProtocolError() if "EOF" in str(cause):
                return (
                    "what listens there does not speak AMQP: RABBITMQ_URL has the port for that "
                    "(5672, with TLS 5671), not the management UI's (15672)"
                )
    return " ".join(str(cause) or type(cause).__name__ for cause in _causes(error))[:500]


def _causes(error: BaseException) -> list[BaseException]:
    """Unwrap pika's errors: the error of a workflow holds those of its attempts."""
    inner = getattr(error, "exceptions", None) or [getattr(error, "exception", None), *error.args]
    found = [cause for each in inner if isinstance(each, BaseException) for cause in _causes(each)]
    return found or [error]


# Reading. pika turns a delivery into three frames with objects and callbacks of their own, and
# decodes its properties: a third of what an event costs here. So a delivery that has arrived as a
# whole is read in one step. Everything else is left to pika, byte for byte.

_METHOD, _HEADER, _BODY, _END = 1, 2, 3, 0xCE
_DELIVER = b"\x00\x3c\x00\x3c"  # class 60, method 60

LARGEST_READ_BYTES = 64 * 1024
"""A larger body arrives in many pieces, each of which would be joined with all earlier ones."""

_LARGEST_WRITE_BYTES = 64 * 1024
"""pika copies whatever part of a write the system has not taken."""

_ALIVE_EVERY_S = 1.0
"""pika checks less often whether anything was received: 5 s after each heartbeat interval."""

# AMQP 0-9-1, 4.2.3: every frame begins with its type, channel and length.
_FRAME = struct.Struct(">BHI")
_HEADER_FRAME = struct.Struct(">BHIHHQ")


Arrival = tuple[int, bytes, bytes]
"""A delivery's tag, its properties as they came, and its body."""


class Reader:
    """Reads complete deliveries to one consumer. ``deliver`` is called with all of one read."""

    def __init__(
        self, channel_number: int, consumer_tag: str, deliver: Callable[[list[Arrival]], None]
    ) -> None:
        tag = consumer_tag.encode()
        self._channel_number, self._deliver = channel_number, deliver
        self._start = bytes([_METHOD]) + channel_number.to_bytes(2, "big")
        self._method = _DELIVER + bytes([len(tag)]) + tag
        # In the first frame: its length and, after the method, the delivery tag.
        self._frame = struct.Struct(f">3xI{len(self._method)}xQ")

    def read(self, data: bytes) -> tuple[int, bool]:
        """Deliver what is complete at the start of the data.

        Returns how many bytes that was, and whether an incomplete delivery follows.
        """
        found: list[Arrival] = []
        at, more, channel = 0, False, self._channel_number
        size, last = len(data), len(data) - self._frame.size
        while (
            at <= last
            and data.startswith(self._start, at)
            and data.startswith(self._method, at + 7)
        ):
            length, tag = self._frame.unpack_from(data, at)
            header_at = at + 8 + length
            if more := size < header_at + 19:
                break
            header, on, length, _, _, body_bytes = _HEADER_FRAME.unpack_from(data, header_at)
            body_at = header_at + 8 + length
            end = body_at + 8 + body_bytes
            if (header, on) != (_HEADER, channel) or not 0 < body_bytes <= LARGEST_READ_BYTES:
                break
            if more := size < end:
                break
            if (
                _FRAME.unpack_from(data, body_at) != (_BODY, channel, body_bytes)
                or not data[header_at - 1] == data[body_at - 1] == data[end - 1] == _END
            ):
                break  # More than one frame, or none of AMQP's.
            properties = data[header_at + 19 : body_at - 1]
            found.append((tag, properties, data[body_at + 7 : end - 1]))
            at = end
        if found:
            self._deliver(found)
        return at, more


class _Connector(AMQPConnector):  # type: ignore[misc]  # pika is untyped here
    """pika's attempt to connect to one address; whatever its socket raises makes it fail.

    pika itself leaves two errors to the loop and then waits for ever: that no file descriptor is
    left, and that a new connection is reset at once.
    """

    def start(self, *arguments: Any, **options: Any) -> None:
        try:
            super().start(*arguments, **options)
        except OSError as error:
            self._report_completion_and_cleanup(error)

    def _on_tcp_connection_done(self, error: BaseException | None) -> None:
        try:
            super()._on_tcp_connection_done(error)
        except ValueError:  # pika found that it is no longer connected.
            self._report_completion_and_cleanup(ConnectionResetError("the connection was reset"))


class Connection(AsyncioConnection):  # type: ignore[misc]  # pika is untyped here
    """pika's connection on the running loop. If ``reader`` is set, it reads before pika does.

    What is sent in one turn of the loop is one write. pika makes three system calls for a message.
    """

    reader: Reader | None = None
    _alive: asyncio.TimerHandle | None = None
    _frame_buffer: bytes

    def __init__(self, *arguments: Any, **callbacks: Any) -> None:
        self._unwritten = bytearray()
        super().__init__(*arguments, **callbacks)

    def _adapter_connect_stream(self) -> None:
        super()._adapter_connect_stream()
        connector = partial(_Connector, lambda _: _StreamingProtocolShim(self), self._nbio)
        self._connection_workflow._connector_factory = connector

    def _on_connection_workflow_done(self, result: Any) -> None:
        # When it is closed during the handshake, pika passes an error's class, not an instance, and
        # takes that for a connection (AMQPConnectionWorkflow._on_connector_done).
        super()._on_connection_workflow_done(result() if isinstance(result, type) else result)

    def pause_reading(self) -> None:
        """Stop reading from the socket until ``resume_reading``, so that TCP stops the broker.

        What has been read is still delivered: pika reads up to 100 KiB at a time.
        """
        transport = self._transport
        transport._nbio.remove_reader(transport._sock.fileno())
        # With TLS, pika also calls this by itself while there is more.
        transport._on_socket_readable = lambda: None
        self._count_as_alive()

    def resume_reading(self) -> None:
        """Read again, if the connection is still open."""
        if self._alive is not None:
            self._alive.cancel()
        transport = self._transport
        if transport is not None and transport._state == transport._STATE_ACTIVE:
            del transport._on_socket_readable
            transport._nbio.set_reader(transport._sock.fileno(), transport._on_socket_readable)
            # With TLS there may be data that the socket no longer announces.
            self.ioloop.call_soon(transport._on_socket_readable)

    def abort(self) -> None:
        """Close the socket of an open connection without waiting for the broker."""
        if self._opened:
            self._adapter_disconnect_stream()

    def _count_as_alive(self) -> None:
        """Keep pika from closing a connection for missing heartbeats while nothing is read from it.

        If the broker has vanished, our own heartbeats cannot be sent, which closes it all the same.
        """
        self.bytes_received += 1
        self._alive = self.ioloop.call_later(_ALIVE_EVERY_S, self._count_as_alive)

    def _on_data_available(self, data_in: bytes) -> None:
        if self.reader is not None:
            data = self._frame_buffer + data_in
            used, more = self.reader.read(data)
            # pika's heartbeats go by this: a connection is alive if bytes arrive.
            self.bytes_received += used
            data_in, self._frame_buffer = data[used:], b""
            if more:
                self._frame_buffer = data_in
                return
        super()._on_data_available(data_in)

    def _adapter_emit_data(self, data: bytes) -> None:
        if not self._unwritten:
            self.ioloop.call_soon(self._write)
        self._unwritten += data
        if len(self._unwritten) >= _LARGEST_WRITE_BYTES:
            self._write()

    def _write(self) -> None:
        if self._unwritten and self._transport is not None:
            super()._adapter_emit_data(bytes(self._unwritten))
        self._unwritten.clear()


# Properties. Producers send headers of any type and size. pika truncates floats, and raises on NaN,
# on timestamps after the year 9999 and on tables nested some hundred levels deep. So headers are
# decoded here, and forwarded as the bytes that arrived.


class Properties(pika.BasicProperties):  # type: ignore[misc]  # pika is untyped here
    """A message's properties, which are encoded as the bytes that they were decoded from.

    A header without a value in Python is decoded as its bytes, or its seconds; a malformed table as
    an empty one; malformed properties as none.
    """

    __slots__ = ("_encoded",)

    def decode(self, encoded: bytes, offset: int = 0) -> Properties:
        """Decode bytes; pika calls this for messages that arrive."""
        self._encoded = encoded[offset:]
        try:
            others, table = _split(self._encoded)
        except (ValueError, IndexError, struct.error):
            self._encoded, others, table = b"\0\0", pika.BasicProperties(), b""
        for name, value in vars(others).items():
            # pika leaves text that is not UTF-8 as bytes.
            self.__dict__[name] = value.decode(errors="replace") if type(value) is bytes else value
        if table:
            headers = _decode_value(b"F" + table)
            self.__dict__["headers"] = headers if isinstance(headers, dict) else {}
        return self

    def encode(self) -> list[bytes]:
        """Return the bytes, as a list of pieces, as pika expects."""
        return [self._encoded]


def has_headers(encoded: bytes) -> bool:
    """Return whether properties have headers, without decoding them."""
    return bool(encoded[:1] and encoded[0] << 8 & Properties.FLAG_HEADERS)


def keep_header_bytes() -> None:
    """Make pika decode the properties of messages as `Properties`, in the whole process.

    When its own decoding raises, pika gives up the connection. The same message then arrives first
    again, until everything that is unacked has reached the broker's delivery limit.
    """
    pika.spec.props[pika.spec.Basic.INDEX] = Properties


def _split(encoded: bytes) -> tuple[Any, bytes]:
    """Return properties without their headers, and the encoded table of headers, if any.

    Raises ValueError, IndexError or struct.error for malformed bytes.
    """
    (flags,) = struct.unpack_from(">H", encoded)
    start = 2
    for flag in (Properties.FLAG_CONTENT_TYPE, Properties.FLAG_CONTENT_ENCODING):
        if flags & flag:
            start += 1 + encoded[start]
    headers = flags & Properties.FLAG_HEADERS
    end = start + 4 + int.from_bytes(encoded[start : start + 4]) if headers else start
    rest = (flags - headers).to_bytes(2) + encoded[2:start] + encoded[end:]
    others = pika.BasicProperties().decode(rest)
    if end > len(encoded) or b"".join(others.encode()) != rest:
        raise ValueError("properties of another length than they say")
    return others, encoded[start:end]


_SIZES = dict(zip(b"VtbBsUuIifDlLdT", (0, 1, 1, 1, 2, 2, 2, 4, 4, 4, 5, 8, 8, 8, 8), strict=True))
"""The bytes of a value of each kind, for RabbitMQ and pika. Other kinds begin with their length."""

_EXACT = {b"f": ">f", b"d": ">d", b"l": ">q", b"L": ">q"}
"""pika truncates floats, and has a class of its own for long integers, which is no ``int``."""

_DEEPEST = 100
"""A table or array that is nested deeper is decoded as its bytes."""


def _entries(content: bytes, *, named: bool = True) -> Iterator[tuple[bytes, bytes]]:
    """Yield the encoded names and values of a table, or the values of an array.

    Raises ValueError or IndexError for malformed bytes.
    """
    at = 0
    while at < len(content):
        value_at = at + 1 + content[at] if named else at
        kind = content[value_at]
        if kind in _SIZES:
            end = value_at + 1 + _SIZES[kind]
        elif kind in b"SxAF":
            end = value_at + 5 + int.from_bytes(content[value_at + 1 : value_at + 5])
        else:
            raise ValueError("a value of an unknown kind")
        if end > len(content):
            raise ValueError("a value past the end of its table")
        yield content[at + 1 : value_at], content[value_at:end]
        at = end


def _decode_value(value: bytes, depth: int = 0) -> Any:
    kind, content = value[:1], value[5:]
    try:
        if kind == b"S":
            return content.decode()
        if kind in b"AF":
            if depth == _DEEPEST:
                return content
            inner = [
                (name.decode(errors="replace"), _decode_value(each, depth + 1))
                for name, each in _entries(content, named=kind == b"F")
            ]
            return dict(inner) if kind == b"F" else [each for _, each in inner]
        if kind in _EXACT:
            return struct.unpack(_EXACT[kind], value[1:])[0]
        return pika_data.decode_value(value, 0)[0]
    except (ValueError, IndexError, OverflowError, OSError):
        return int.from_bytes(value[1:]) if kind == b"T" else content


def with_headers(
    encoded: bytes, headers: dict[str, object], without: Collection[str] = (), **changes: object
) -> bytes:
    """Return encoded properties with these headers, which replace any of the same name.

    Headers in ``without`` are left out, and other properties get the ``changes``. The rest stays
    byte for byte. Raises whatever malformed bytes, or headers that pika cannot encode, raise.
    """
    properties, table = _split(encoded)
    gone = {name.encode() for name in (*headers, *without)}
    theirs = b"".join(
        bytes([len(name)]) + name + value for name, value in _entries(table[4:]) if name not in gone
    )
    vars(properties).update(changes, headers=headers)
    pieces: list[bytes] = properties.encode()
    # Two properties come before the headers, whose first piece is the length of their table.
    at = len(pika.BasicProperties(properties.content_type, properties.content_encoding).encode())
    pieces[at] = (len(theirs) + int.from_bytes(pieces[at])).to_bytes(4) + theirs
    return b"".join(pieces)


# Forwarding: the properties of a message that is sent on to another queue.

_MAX_HEADER_BYTES = 128 * 1024 - 64  # One frame, by RabbitMQ's default.

_CHANGES = {"delivery_mode": 2, "expiration": None, "user_id": None, "cluster_id": None}
"""An expiration would end a wait, or a dead letter, early. The broker checks that user_id is the
sender, who is now another. AMQP reserves cluster_id."""


def forwarded_properties(
    properties: Any, headers: dict[str, object], without: Collection[str] = ()
) -> Any:
    """Return a message's properties, made persistent, with more headers and without some.

    If they cannot be forwarded, these are `bare_properties`.
    """
    try:
        gone = {*BROKER_HEADERS, *without}
        encoded = with_headers(b"".join(properties.encode()), headers, gone, **_CHANGES)
    except Exception:  # noqa: BLE001 - pika raises what the failing conversion happens to raise.
        return bare_properties(headers)
    fits = len(encoded) <= _MAX_HEADER_BYTES
    return Properties().decode(encoded) if fits else bare_properties(headers)


def bare_properties(headers: dict[str, object]) -> Any:
    """Return properties with these headers alone."""
    return pika.BasicProperties(delivery_mode=2, headers=headers)
