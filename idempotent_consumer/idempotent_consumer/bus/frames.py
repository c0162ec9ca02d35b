"""Deliveries read straight from the socket's bytes, ahead of pika's own decoding.

pika makes of a delivery three frames, each with its objects and callbacks, and decodes its
properties whether anybody reads them or not: a third of what an event costs here. So a delivery
that lies whole at the start of what has arrived is taken in one step. Everything else, and a
delivery of any other form, is left to pika, byte for byte.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pika

_METHOD, _HEADER, _BODY, _END = 1, 2, 3, 0xCE
_DELIVER = b"\x00\x3c\x00\x3c"  # class 60, method 60

LARGEST_READ_BYTES = 64 * 1024
"""A larger body comes in many pieces, and each would be joined with all before it anew."""

# AMQP 0-9-1, 4.2.3: type, channel and length; and so begin a header frame and a body frame.
_FRAME = struct.Struct(">BHI")
_HEADER_FRAME = struct.Struct(">BHIHHQ")
_TAG = struct.Struct(">Q")

Deliver = Callable[[int, bytes, bytes], None]
"""Called with a delivery's tag, its properties as they came, and its body."""


class Reader:
    """Reads whole deliveries to one consumer."""

    def __init__(self, channel_number: int, consumer_tag: str, deliver: Deliver) -> None:
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


class Connection(pika.SelectConnection):  # type: ignore[misc]  # pika is untyped here
    """pika's connection, with a reader ahead of it while ``reader`` is set."""

    reader: Reader | None = None
    _frame_buffer: bytes

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


def decode_properties(encoded: bytes) -> Any:
    """Decode a message's properties; those that pika cannot decode are read as none."""
    properties = pika.BasicProperties()
    try:
        properties.decode(encoded)
    except Exception:  # noqa: BLE001 - whatever the conversion of a hostile value raises
        return pika.BasicProperties()
    return properties
