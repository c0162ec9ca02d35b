"""Publish events at a cost that leaves the machine to those that are measured.

pika's channel takes 16 µs of CPU an event (measured), which on two cores is a large part of
what there is; this way it is half a one. Events of one size differ only in their bodies, so all
else is encoded once, by pika, and goes out over a socket of this module's own.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import pika
from pika import frame, spec

from .loading import PERSISTENT
from .progress import NotMeasuredError

_CHANNEL = 1
_SLICE = 1_000
_UNCONFIRMED = 5_000
_TIMEOUT_S = 30.0
_READ_BYTES = 65_536


class Firehose:
    """Publishes events of ``size_bytes`` each to one queue, with confirms."""

    def __init__(self, url: str, queue: str, size_bytes: int) -> None:
        self._parameters = pika.URLParameters(url)
        address = (self._parameters.host, self._parameters.port)
        self._socket = socket.create_connection(address, _TIMEOUT_S)
        self._received = b""
        self._sent = self._confirmed = 0
        self._before, self._after = _around(queue, size_bytes)
        self._open()

    def publish(self, bodies: Sequence[bytes]) -> None:
        """Publish events; 5,000 may be unconfirmed after it. Raises NotMeasuredError or OSError."""
        for first in range(0, len(bodies), _SLICE):
            part = bodies[first : first + _SLICE]
            between = self._after + self._before
            self._socket.sendall(self._before + between.join(part) + self._after)
            self._sent += len(part)
            self._await_confirms(_UNCONFIRMED)

    def close(self) -> None:
        """Wait until everything is confirmed, and close the socket."""
        self._await_confirms(0)
        self._socket.close()

    def _open(self) -> None:
        self._socket.sendall(frame.ProtocolHeader().marshal())
        self._await(spec.Connection.Start)
        login = self._parameters.credentials
        self._send(0, spec.Connection.StartOk({}, "PLAIN", f"\0{login.username}\0{login.password}"))
        tune = self._await(spec.Connection.Tune)
        # No heartbeats: between two publishings nobody would send them.
        self._send(0, spec.Connection.TuneOk(tune.channel_max, tune.frame_max, 0))
        self._send(0, spec.Connection.Open(self._parameters.virtual_host))
        self._await(spec.Connection.OpenOk)
        self._send(_CHANNEL, spec.Channel.Open())
        self._await(spec.Channel.OpenOk)
        self._send(_CHANNEL, spec.Confirm.Select())
        self._await(spec.Confirm.SelectOk)

    def _await_confirms(self, outstanding: int) -> None:
        while self._sent - self._confirmed > outstanding:
            # A quorum queue confirms in order where nothing fails.
            self._confirmed = max(self._confirmed, self._await(spec.Basic.Ack).delivery_tag)

    def _send(self, channel: int, method: Any) -> None:
        self._socket.sendall(frame.Method(channel, method).marshal())

    def _await(self, wanted: Any) -> Any:
        method = self._next_frame().method
        if not isinstance(method, wanted):
            raise NotMeasuredError(f"the broker sent {method}, not {wanted.NAME}")
        return method

    def _next_frame(self) -> Any:
        while True:
            consumed, found = frame.decode_frame(self._received)
            if found is not None:
                self._received = self._received[consumed:]
                return found
            more = self._socket.recv(_READ_BYTES)
            if not more:
                raise NotMeasuredError("the broker closed the publisher's connection")
            self._received += more


def _around(queue: str, size_bytes: int) -> tuple[bytes, bytes]:
    """Return what stands before and after each body on the wire."""
    body = frame.Body(_CHANNEL, b"\0" * size_bytes).marshal()
    end = body[-1:]
    before = (
        frame.Method(_CHANNEL, spec.Basic.Publish(exchange="", routing_key=queue)).marshal()
        + frame.Header(_CHANNEL, size_bytes, PERSISTENT).marshal()
        + body[: -size_bytes - len(end)]
    )
    return before, end
