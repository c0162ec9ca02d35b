"""The health of a service, and the HTTP server of /livez, /readyz and /duplicates."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import orjson

STALLED_AFTER_S = 60.0
"""A loop that has not run for this long hangs in a handler, and sends no heartbeats either."""


class PortTaken(OSError):
    """The health port cannot be bound; the message says what to do."""


class Health:
    """Why the service is not ready, by the name of what is missing.

    Only the loop's thread writes it. The HTTP thread reads ``missing``, so that is replaced and
    never changed in place.
    """

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}
        self.hanging = False
        self._beat_s = time.monotonic()

    def lacks(self, what: str, why: str) -> None:
        """Say that something is missing, and why."""
        self.missing = {**self.missing, what: why}

    def has(self, what: str) -> None:
        """Say that it is there again."""
        self.missing = {name: why for name, why in self.missing.items() if name != what}

    def beat(self) -> None:
        """Say that the loop is running."""
        self._beat_s = time.monotonic()

    @property
    def stuck(self) -> dict[str, str]:
        """What hangs in this process, and how a restart would help. Empty if nothing does."""
        stuck = {}
        if self.hanging:
            stuck["calls"] = "they do not return; a restart frees their events"
        if time.monotonic() - self._beat_s >= STALLED_AFTER_S:
            stuck["loop"] = "a handler does not return; a restart frees what is in flight"
        return stuck


class HealthServer:
    """Serves ``GET /livez``, ``/readyz`` and ``/duplicates`` over IPv4 and IPv6.

    It has a thread with an event loop of its own, so ``/livez`` is answered even while the
    service's loop is blocked. A connection is closed after ``deadline_s``, or if it is the oldest
    of ``most`` and another one comes. ``duplicates`` returns the document of ``/duplicates``, on
    any thread.
    """

    def __init__(
        self,
        health: Health,
        port: int,
        duplicates: Callable[[], dict[str, object]],
        deadline_s: float = 5.0,
        most: int = 32,
    ) -> None:
        self._health, self._duplicates = health, duplicates
        self._deadline_s, self._most = deadline_s, most
        self._clients: dict[asyncio.StreamWriter, None] = {}  # The oldest first.
        try:
            self._listener = _listen(port)
        except OSError as error:
            why = os.strerror(error.errno or 0)
            raise PortTaken(
                f"HEALTH_PORT {port} cannot be used ({why}): set another, or 0 for none"
            ) from None
        self._loop, self._closing = asyncio.new_event_loop(), asyncio.Event()
        self._loop.set_exception_handler(_on_exception)
        self._thread = threading.Thread(target=self._run, name="health", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        # If the process has no file descriptors left, asyncio tries to accept again after 1 s.
        server = await asyncio.start_server(self._answer, sock=self._listener, limit=8192)
        await self._closing.wait()
        server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while len(self._clients) >= self._most:
            oldest = next(iter(self._clients))
            del self._clients[oldest]
            oldest.transport.abort()
        self._clients[writer] = None
        try:
            async with asyncio.timeout(self._deadline_s):
                request = await reader.readuntil(b"\r\n\r\n")
                writer.write(_reply(*self._report(request)))
                writer.close()
                await writer.wait_closed()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # The client was too slow, has gone, or does not speak HTTP.
        finally:
            self._clients.pop(writer, None)
            writer.transport.abort()

    def _report(self, request: bytes) -> tuple[int, dict[str, object]]:
        match request.split():
            case [b"GET", b"/livez", *_]:
                alive = not self._health.stuck
                return (200 if alive else 503), {"alive": alive}
            case [b"GET", b"/readyz", *_]:
                missing = {**self._health.missing, **self._health.stuck}
                return (503 if missing else 200), {"ready": not missing, "missing": missing}
            case [b"GET", b"/duplicates", *_]:
                return 200, self._duplicates()
        known = request.startswith(b"GET /")
        return (404 if known else 400), {"error": "ask for GET /livez, /readyz or /duplicates"}


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as error:  # The machine knows IPv6, but has no IPv6 address.
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
    return socket.create_server(("", port))


def _on_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    if not isinstance(context.get("exception"), OSError):
        loop.default_exception_handler(context)


def _reply(status: int, document: dict[str, object]) -> bytes:
    body = orjson.dumps(document) + b"\n"
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
