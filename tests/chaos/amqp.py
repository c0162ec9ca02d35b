"""AMQP 0-9-1 as it goes over the wire, as far as an onlooker needs it.

Frames and methods are those of the specification (amqp0-9-1.pdf, 4.2.3 and 4.2.6, and the class
"basic"). An onlooker does not answer, so it needs neither pika's connection nor its states.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

_METHOD, _HEADER, _BODY = 1, 2, 3
_PROTOCOL_HEADER = b"AMQP"

CONSUME, PUBLISH, DELIVER, ACK = (60, 20), (60, 40), (60, 60), (60, 80)


class Method(NamedTuple):
    """A method with its arguments as they came, and the body of one that carries content."""

    channel: int
    name: tuple[int, int]
    arguments: bytes
    body: bytes = b""


class Reader:
    """Cuts one direction of a connection into frames, and puts content back together."""

    def __init__(self) -> None:
        self._left = b""
        self._open: dict[int, tuple[Method, int, bytes]] = {}

    def frames(self, data: bytes) -> Iterator[tuple[bytes, Method | None]]:
        """Yield each whole frame as it came, with the method that it completes, if any."""
        data = self._left + data
        at = 0
        while (size := _frame_size(data, at)) and len(data) - at >= size:
            frame = data[at : at + size]
            at += size
            yield frame, None if frame.startswith(_PROTOCOL_HEADER) else self._read(frame)
        self._left = data[at:]

    def _read(self, frame: bytes) -> Method | None:
        kind, channel = struct.unpack_from(">BH", frame)
        payload = frame[7:-1]
        if kind == _METHOD:
            method = Method(channel, struct.unpack_from(">HH", payload), payload[4:])
            if method.name not in (PUBLISH, DELIVER):
                return method
            self._open[channel] = method, 0, b""
        elif kind == _HEADER and channel in self._open:
            method, _, body = self._open[channel]
            return self._grown(method, struct.unpack_from(">Q", payload, 4)[0], body)
        elif kind == _BODY and channel in self._open:
            method, size, body = self._open[channel]
            return self._grown(method, size, body + payload)
        return None

    def _grown(self, method: Method, size: int, body: bytes) -> Method | None:
        if len(body) < size:
            self._open[method.channel] = method, size, body
            return None
        del self._open[method.channel]
        return method._replace(body=body)


def _frame_size(data: bytes, at: int) -> int:
    """Return how long the frame that begins there is, 0 while that cannot be told."""
    if data.startswith(_PROTOCOL_HEADER, at):
        return len(_PROTOCOL_HEADER) + 4
    return int(struct.unpack_from(">I", data, at + 3)[0]) + 8 if len(data) - at >= 7 else 0


def consumed_queue(method: Method) -> str:
    """Return the queue that a consume names."""
    return _short_text(method.arguments, 2)


def delivered_tag(method: Method) -> int:
    """Return the tag of a delivery."""
    consumer_bytes = method.arguments[0]
    return int(struct.unpack_from(">Q", method.arguments, 1 + consumer_bytes)[0])


def acked(method: Method) -> tuple[int, bool]:
    """Return the tag that an ack names, and whether it covers all before it."""
    tag, multiple = struct.unpack_from(">QB", method.arguments)
    return tag, bool(multiple & 1)


def _short_text(data: bytes, at: int) -> str:
    return data[at + 1 : at + 1 + data[at]].decode()
