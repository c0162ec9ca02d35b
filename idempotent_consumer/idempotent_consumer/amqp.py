"""AMQP by pika: connections, how they are set up and fail, and what is read and written on them.

Everything that relies on pika's insides stands here.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import Any

import pika
import pika.exceptions
from pika import data as pika_data
from pika.adapters.asyncio_connection import AsyncioConnection

from .settings import SettingsError

# Connecting.

HEARTBEAT_S = 10
"""A frozen broker is noticed after two; a URL may set another with ``?heartbeat=``."""


def _available(**options: int) -> dict[str, int]:
    """Return the options that this system has; Linux has them all."""
    return {name: value for name, value in options.items() if hasattr(socket, name)}


KEEPALIVE = _available(TCP_KEEPIDLE=3, TCP_KEEPINTVL=1, TCP_KEEPCNT=3)  # seconds, seconds, times
TCP_OPTIONS = {**KEEPALIVE, **_available(TCP_USER_TIMEOUT=6_000)}  # milliseconds
"""By these the system's TCP notices after 6 s that a broker has vanished from the network, whether
the connection is idle or not (Linux's page tcp(7)); heartbeats alone would take up to 30 s. A URL
may set others with ``?tcp_options=``. A connection that publishes has ``KEEPALIVE`` alone:
TCP_USER_TIMEOUT also ends one whose peer does not read, as a broker with an alarm does not."""

NOT_FOUND = 404
"""AMQP's reply code for a queue or an exchange that is not there."""

_MAX_SHORT_STRING_BYTES = 255


def parameters_of(
    url: str, name: str, tcp_options: dict[str, int] = TCP_OPTIONS
) -> pika.URLParameters:
    """Return a URL as pika takes it, with this library's time-outs; ``name`` is for RabbitMQ's UI.

    Raises SettingsError for what pika does not take, or would stumble over at each connection.
    """
    try:
        parameters = pika.URLParameters(url)
        if "heartbeat=" not in url:
            parameters.heartbeat = HEARTBEAT_S
        parameters.connection_attempts = 1
        parameters.socket_timeout = 5
        parameters.stack_timeout = 10
        if "tcp_options=" not in url:
            parameters.tcp_options = tcp_options
        parameters.client_properties = {"connection_name": name}
    except (AttributeError, TypeError, ValueError, SyntaxError, OSError) as error:
        raise SettingsError(f"RABBITMQ_URL: {error}") from None
    if not all(type(value) is int for value in (parameters.tcp_options or {}).values()):
        raise SettingsError("RABBITMQ_URL: tcp_options takes whole numbers")
    if len(parameters.virtual_host.encode()) > _MAX_SHORT_STRING_BYTES:
        raise SettingsError("RABBITMQ_URL: its virtual host is longer than AMQP allows, 255 bytes")
    if not parameters.heartbeat:
        raise SettingsError("RABBITMQ_URL: without heartbeats a frozen broker is never noticed")
    return parameters


def explain(error: BaseException) -> str:
    """Describe a failure in one line that says what to do where that is known."""
    for cause in _causes(error):
        if isinstance(cause, pika.exceptions.ChannelClosedByBroker) and (
            "inequivalent arg" in cause.reply_text
        ):
            return (
                f"{cause.reply_text}. A queue's or exchange's arguments never change: delete "
                "it (rabbitmqctl delete_queue NAME) when it is empty, and it is made anew"
            )
        if isinstance(cause, pika.exceptions.ChannelClosedByBroker) and (
            cause.reply_code == NOT_FOUND and "no queue" in cause.reply_text
        ):
            return f"{cause.reply_text}: it was deleted, and is declared anew"
        if isinstance(cause, pika.exceptions.ProbableAuthenticationError) or (
            isinstance(cause, pika.exceptions.ConnectionClosedByBroker) and cause.reply_code == 403
        ):
            return "RabbitMQ refuses the user or the password of RABBITMQ_URL"
    return " ".join(str(cause) or type(cause).__name__ for cause in _causes(error))[:500]


def _causes(error: BaseException) -> list[BaseException]:
    """Unfold what pika wraps: a workflow's failure holds those of its attempts."""
    inner = getattr(error, "exceptions", None) or [getattr(error, "exception", None), *error.args]
    found = [cause for each in inner if isinstance(each, BaseException) for cause in _causes(each)]
    return found or [error]


# Reading. pika makes of a delivery three frames, each with its objects and callbacks, and decodes
# its properties whether anybody reads them or not: a third of what an event costs here. So a
# delivery that lies whole at the start of what has arrived is read in one step. Everything else,
# and a delivery of any other form, is left to pika, byte for byte.

_METHOD, _HEADER, _BODY, _END = 1, 2, 3, 0xCE
_DELIVER = b"\x00\x3c\x00\x3c"  # class 60, method 60

LARGEST_READ_BYTES = 64 * 1024
"""A larger body comes in many pieces, and each would be joined with all before it anew."""

_LARGEST_WRITE_BYTES = 64 * 1024
"""pika copies what the system has not taken of a write."""

# AMQP 0-9-1, 4.2.3: type, channel and length; and so begin a header frame and a body frame.
_FRAME = struct.Struct(">BHI")
_HEADER_FRAME = struct.Struct(">BHIHHQ")
_TAG = struct.Struct(">Q")


class Reader:
    """Reads whole deliveries to one consumer.

    ``deliver`` is called with a delivery's tag, its properties as they came, and its body.
    """

    def __init__(
        self, channel_number: int, consumer_tag: str, deliver: Callable[[int, bytes, bytes], None]
    ) -> None:
        tag = consumer_tag.encode()
        self._channel_number, self._deliver = channel_number, deliver
        self._start = bytes([_METHOD]) + channel_number.to_bytes(2, "big")
        self._method = _DELIVER + bytes([len(tag)]) + tag

    def read(self, data: bytes) -> tuple[int, bool]:
        """Hand over the deliveries at the start of the data.

        Returns how many bytes they were, and whether what follows is the beginning of another.
        """
        at, size, channel = 0, len(data), self._channel_number
        tag_at = 7 + len(self._method)
        while data.startswith(self._start, at) and data.startswith(self._method, at + 7):
            header_at = at + 8 + _FRAME.unpack_from(data, at)[2]
            if size < header_at + 19:
                return at, True
            header, on, length, _, _, body_bytes = _HEADER_FRAME.unpack_from(data, header_at)
            body_at = header_at + 8 + length
            end = body_at + 8 + body_bytes
            if (header, on) != (_HEADER, channel) or not 0 < body_bytes <= LARGEST_READ_BYTES:
                return at, False
            if size < end:
                return at, True
            if (
                _FRAME.unpack_from(data, body_at) != (_BODY, channel, body_bytes)
                or not data[header_at - 1] == data[body_at - 1] == data[end - 1] == _END
            ):
                return at, False  # More than one frame, or none of AMQP's.
            self._deliver(
                _TAG.unpack_from(data, at + tag_at)[0],
                data[header_at + 19 : body_at - 1],
                data[body_at + 7 : end - 1],
            )
            at = end
        return at, False


class Connection(AsyncioConnection):  # type: ignore[misc]  # pika is untyped here
    """pika's connection on the running loop, with a reader ahead of it while ``reader`` is set.

    What is sent within one turn of the loop is written together: pika by itself makes three system
    calls for a message.
    """

    reader: Reader | None = None
    _frame_buffer: bytes

    def __init__(self, *arguments: Any, **callbacks: Any) -> None:
        self._unwritten: list[bytes] = []
        self._unwritten_bytes = 0
        super().__init__(*arguments, **callbacks)

    def _on_data_available(self, data_in: bytes) -> None:
        if self.reader is not None:
            data = self._frame_buffer + data_in
            used, more = self.reader.read(data)
            # What pika's heartbeats go by: a connection that bytes arrive on is alive.
            self.bytes_received += used
            data_in, self._frame_buffer = data[used:], b""
            if more:
                self._frame_buffer = data_in
                return
        super()._on_data_available(data_in)

    def _adapter_emit_data(self, data: bytes) -> None:
        if not self._unwritten:
            self.ioloop.call_soon(self._write)
        self._unwritten.append(data)
        self._unwritten_bytes += len(data)
        if self._unwritten_bytes >= _LARGEST_WRITE_BYTES:
            self._write()

    def _write(self) -> None:
        if self._unwritten and self._transport is not None:
            super()._adapter_emit_data(b"".join(self._unwritten))
        self._unwritten.clear()
        self._unwritten_bytes = 0


# Headers, which are anybody's: of any type and size.

_Decode = Callable[[bytes, int], tuple[dict[str, Any], int]]


def tolerate_bad_headers() -> None:
    """Make pika, in this process, read a header table that it cannot decode as an empty one.

    pika decodes headers while it reads frames. A table nested some hundred levels deep, or a
    timestamp past the year 9999, raises there, and pika gives up the connection: every delivery
    is requeued and the same message comes first again, until the broker's delivery limit has
    taken all of them.
    """
    if pika_data.decode_table.__module__ != __name__:
        pika_data.decode_table = _tolerant(pika_data.decode_table)


def _tolerant(decode: _Decode) -> _Decode:
    def decode_table(encoded: bytes, offset: int) -> tuple[dict[str, Any], int]:
        try:
            return decode(encoded, offset)
        except Exception:  # noqa: BLE001 - whatever the conversion of a hostile value raises
            (length,) = struct.unpack_from(">I", encoded, offset)
            return {}, offset + 4 + int(length)

    return decode_table


def decode_properties(encoded: bytes) -> Any:
    """Decode a message's properties; those that pika cannot decode are read as none."""
    properties = pika.BasicProperties()
    try:
        properties.decode(encoded)
    except Exception:  # noqa: BLE001 - whatever the conversion of a hostile value raises
        return pika.BasicProperties()
    return properties


# Forwarding: what a message carries when it is sent on to another queue.

_MAX_HEADER_BYTES = 64 * 1024

_DROPPED = {"expiration", "user_id", "cluster_id", "delivery_mode", "headers"}
"""An expiration would end the wait, or the dead letter, early; the broker checks a user id against
the sender, who is another now; what is sent on is always persistent."""

_DROPPED_HEADERS = {"CC", "BCC", "x-death", "x-delivery-count", "x-acquired-count"} | {
    f"x-{which}-death-{what}"
    for which in ("first", "last")
    for what in ("exchange", "queue", "reason")
}
"""CC and BCC are addresses: the message would go there as well. The others are the broker's."""


def forwarded_properties(properties: Any, headers: dict[str, object]) -> Any:
    """Return a message's own properties, where they can be sent on, with more headers."""
    kept = {name: value for name, value in vars(properties).items() if name not in _DROPPED}
    theirs = (properties.headers or {}).items()
    both = {name: value for name, value in theirs if name not in _DROPPED_HEADERS} | headers
    whole = pika.BasicProperties(**kept, delivery_mode=2, headers=both)
    return whole if _fits(whole) else bare_properties(headers)


def bare_properties(headers: dict[str, object]) -> Any:
    """Return properties with these headers alone."""
    return pika.BasicProperties(delivery_mode=2, headers=headers)


def _fits(properties: Any) -> bool:
    """Return whether pika can write them into one frame."""
    try:
        return sum(map(len, properties.encode())) <= _MAX_HEADER_BYTES
    except Exception:  # noqa: BLE001 - pika raises what the failing conversion happens to raise.
        return False
