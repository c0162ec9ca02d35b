"""A TCP proxy that misbehaves on demand: it delays, holds, slices, loses or cuts off bytes."""

import asyncio
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractContextManager, closing, suppress
from functools import partial
from typing import Any, Literal

Direction = Literal["up", "down"]

Onlooker = Callable[[bytes], Awaitable[bytes]]
"""Gets each chunk, and returns what may pass; it can keep a part until the rest arrives."""

_BUFFER_BYTES = 65_536
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER with a time of 0: close() sends a RST.


class CutError(Exception):
    """The connection has to be reset now, in the middle of a write."""


class Way:
    """One direction of all connections, and how it misbehaves.

    Its counters can be read from any thread: ``appearances`` of the text that `Proxy.count` looks
    for, ``slices`` written of larger chunks, connections ``broken`` in the middle of a write.
    """

    def __init__(self) -> None:
        self.delay_s, self.slice_bytes = 0.0, 0
        self.swallowing = self.breaking = False
        self.text = b""
        self.open = asyncio.Event()
        self.open.set()
        self.held = bytearray()
        self.appearances = self.passed_bytes = self.swallowed_bytes = self.slices = self.broken = 0

    @property
    def held_bytes(self) -> int:
        return len(self.held)

    def holds(self, text: bytes) -> bool:
        return text in self.held

    async def carry(
        self, source: socket.socket, sink: socket.socket, onlooker: Onlooker | None
    ) -> None:
        """Carry bytes from one side to the other until the first closes; raises CutError.

        Once the other side is gone, bytes to it are lost, but what it had sent still passes.
        """
        chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        reading = asyncio.create_task(self._read(source, chunks))
        try:
            while True:
                due_s, chunk = await chunks.get()
                await asyncio.sleep(due_s - asyncio.get_running_loop().time())
                await self.open.wait()
                if not chunk:
                    return
                passing = await onlooker(chunk) if onlooker else chunk
                with suppress(OSError):
                    await self._write(passing, sink)
        finally:
            reading.cancel()

    async def _read(
        self, source: socket.socket, chunks: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        """Queue each chunk with the time when it is due; an empty one is the end."""
        loop, chunk, tail = asyncio.get_running_loop(), b"more", b""
        while chunk:
            try:
                chunk = await loop.sock_recv(source, _BUFFER_BYTES)
            except OSError:
                chunk = b""
            if not self.open.is_set():
                self.held += chunk
            if self.text:
                tail += chunk
                self.appearances += tail.count(self.text)
                tail = tail[1 - len(self.text) :]
            chunks.put_nowait((loop.time() + self.delay_s, chunk))

    async def _write(self, chunk: bytes, sink: socket.socket) -> None:
        send = partial(asyncio.get_running_loop().sock_sendall, sink)
        if self.swallowing:
            self.swallowed_bytes += len(chunk)
            return
        if self.breaking and len(chunk) > 1:
            self.breaking = False
            self.broken += 1
            await send(chunk[: len(chunk) // 2])
            raise CutError("cut in the middle of a frame")
        size = self.slice_bytes or len(chunk) or 1
        for at in range(0, len(chunk), size):
            await send(chunk[at : at + size])
            self.slices += size < len(chunk)
        self.passed_bytes += len(chunk)


class Proxy:
    """Relays connections to one server. ``up`` is the way to the server, ``down`` the way back.

    A misbehaviour holds for all connections, present and future. Its counters let a test prove
    that the fault has happened. Made by `relay`; it runs on a thread of its own.
    """

    def __init__(self, port: int, listener: socket.socket) -> None:
        """Relay the connections that `listener` accepts to a port of 127.0.0.1."""
        self._upstream = port
        host, listens_at = listener.getsockname()
        self.address = f"{host}:{listens_at}"
        self._close_delay_s = 0.0
        self._connections: dict[asyncio.Task[None], tuple[socket.socket, socket.socket]] = {}
        self.resets = self.closed_late = 0
        self.up, self.down = Way(), Way()
        listener.setblocking(False)
        self._loop = asyncio.new_event_loop()
        self._listening = self._loop.create_task(self._listen(listener))
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()

    @property
    def connections(self) -> int:
        return len(self._connections)

    # How it misbehaves.

    def delay(self, seconds: float) -> None:
        """Delay each byte, in both directions."""
        self.up.delay_s = self.down.delay_s = seconds

    def slice(self, size: int | None) -> None:
        """Write at most this many bytes at once; None means no limit."""
        self.up.slice_bytes = self.down.slice_bytes = size or 0

    def hold(self, direction: Direction | Literal["both"]) -> None:
        """Hold what arrives until `release`, which passes it on."""
        if direction != "down":
            self.up.open.clear()
        if direction != "up":
            self.down.open.clear()

    def swallow(self, direction: Direction) -> None:
        """Lose what arrives until `release`. The stream is broken then, so `cut` it."""
        self._way(direction).swallowing = True

    def release(self) -> None:
        """Pass on what was held, and from now on everything."""
        self._run(self._release())

    def close_slowly(self, seconds: float) -> None:
        """Delay the news that one side has closed."""
        self._close_delay_s = seconds

    def count(self, direction: Direction, text: bytes) -> None:
        """Count how often a text is sent from now on, in the way's ``appearances``."""
        way = self._way(direction)
        way.text, way.appearances = text, 0

    def cut(self) -> None:
        """Reset all connections on both sides, lose what is on its way, and release."""
        self._run(self._cut())

    def cut_in_next(self, direction: Direction) -> None:
        """Pass on half of the next chunk, then reset its connection on both sides."""
        self._way(direction).breaking = True

    def close(self) -> None:
        """End all connections and stop listening."""
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _way(self, direction: Direction) -> Way:
        return self.up if direction == "up" else self.down

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    # On the loop's thread.

    def onlookers(self) -> tuple[Onlooker | None, Onlooker | None]:
        """Return the onlookers of a new connection, up and down. A subclass may have some."""
        return None, None

    async def _listen(self, listener: socket.socket) -> None:
        with listener:
            while True:
                client, _ = await self._loop.sock_accept(listener)
                server = socket.socket()
                task = self._loop.create_task(self._serve(client, server))
                self._connections[task] = client, server
                task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        for side in self._connections.pop(task):
            side.close()

    async def _serve(self, client: socket.socket, server: socket.socket) -> None:
        # Not asyncio's streams: after a failed write they drop what is still unread.
        sides = client, server
        try:
            # It was cut; or the server is down, and the client sees its connection end.
            with suppress(asyncio.CancelledError, OSError):
                for side in sides:
                    side.setblocking(False)
                    side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                await self._loop.sock_connect(server, ("127.0.0.1", self._upstream))
                sees_up, sees_down = self.onlookers()
                up = self.up.carry(client, server, sees_up)
                await self._relay(up, self.down.carry(server, client, sees_down))
        except CutError:
            self._reset(sides)

    async def _relay(self, *carrying: Coroutine[Any, Any, None]) -> None:
        """Relay until a side closes; raises CutError, and what an onlooker raises."""
        ways = [asyncio.create_task(way) for way in carrying]
        try:
            done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in done:
                way.result()
            if self._close_delay_s:
                self.closed_late += 1
                await asyncio.sleep(self._close_delay_s)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    def _reset(self, sides: tuple[socket.socket, socket.socket]) -> None:
        """Make both sides of a connection end with a reset when they are closed."""
        self.resets += 1
        for side in sides:
            side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)

    async def _cut(self) -> None:
        for task, sides in self._connections.items():
            self._reset(sides)
            task.cancel()
        await self._release()

    async def _release(self) -> None:
        for way in (self.up, self.down):
            way.swallowing = False
            way.open.set()
            way.held.clear()

    async def _end(self) -> None:
        self._listening.cancel()
        await self._cut()
        await asyncio.gather(self._listening, *self._connections, return_exceptions=True)


def relay(port: int, listener: socket.socket | None = None) -> AbstractContextManager[Proxy]:
    """Relay to a port of 127.0.0.1 throughout the block, by default from any free port."""
    return closing(Proxy(port, listener or socket.create_server(("127.0.0.1", 0))))
