"""A TCP proxy that misbehaves on demand: late, silent, in crumbs, cut off, slow to hang up."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from chaos.threads import LoopThread

Direction = Literal["up", "down"]

Onlooker = Callable[[bytes], Awaitable[bytes]]
"""Sees what comes, and returns what may pass: it can keep a part until the rest has come."""

_BUFFER_BYTES = 65_536
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no time to linger: close() sends a RST.


class CutError(OSError):
    """The connection is to be reset now, in the middle of what it was sending."""


class Way:
    """Carries bytes of all connections in one direction, as it is told to.

    The tellers run on the proxy's loop; counters and `holds` can be read from any thread.
    """

    def __init__(self) -> None:
        self._delay_s = 0.0
        self._slice: int | None = None
        self._swallowing = self._breaking = False
        self._open = asyncio.Event()
        self._open.set()
        self._held = bytearray()
        self._text = b""
        self.appearances = self.passed_bytes = self.swallowed_bytes = self.slices = self.broken = 0

    def delay(self, seconds: float) -> None:
        """Let what comes from now on arrive so much later."""
        self._delay_s = seconds

    def slice(self, size: int | None) -> None:
        """Write at most so many bytes at a time."""
        self._slice = size

    def hold(self) -> None:
        """Pass nothing on."""
        self._open.clear()

    def swallow(self) -> None:
        """Lose what comes."""
        self._swallowing = True

    def break_next(self) -> None:
        """Break the connection in the middle of the next bytes."""
        self._breaking = True

    def count(self, text: bytes) -> None:
        """Count in ``appearances`` how often these bytes are sent from now on."""
        self._text, self.appearances = text, 0

    def release(self) -> None:
        """Pass everything on, what was held first."""
        self._swallowing = False
        self._open.set()
        self._held.clear()

    @property
    def held_bytes(self) -> int:
        """How much is held."""
        return len(self._held)

    def holds(self, text: bytes) -> bool:
        """Return whether these bytes are among what is held."""
        return text in self._held

    async def carry(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        onlooker: Onlooker | None = None,
    ) -> None:
        """Carry what comes from one connection to the other until it ends; raises OSError."""
        chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        reading = asyncio.create_task(self._read(source, chunks))
        try:
            while True:
                due_s, chunk = await chunks.get()
                await asyncio.sleep(due_s - asyncio.get_running_loop().time())
                await self._open.wait()
                if not chunk:
                    return
                if onlooker is not None:
                    chunk = await onlooker(chunk)
                await self._write(chunk, sink)
        finally:
            reading.cancel()

    async def _read(
        self, source: asyncio.StreamReader, chunks: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        """Note for each piece when it is due; an empty one is the end."""
        chunk, tail = b"more", b""
        while chunk:
            try:
                chunk = await source.read(65_536)
            except OSError:
                chunk = b""
            if not self._open.is_set():
                self._held += chunk
            if self._text:
                tail += chunk
                self.appearances += tail.count(self._text)
                tail = tail[1 - len(self._text) :]
            chunks.put_nowait((asyncio.get_running_loop().time() + self._delay_s, chunk))

    async def _write(self, chunk: bytes, sink: asyncio.StreamWriter) -> None:
        if self._swallowing:
            self.swallowed_bytes += len(chunk)
            return
        if self._breaking and len(chunk) > 1:
            self._breaking = False
            self.broken += 1
            sink.write(chunk[: len(chunk) // 2])
            raise CutError("cut in the middle of a frame")
        if self._slice is None:
            sink.write(chunk)
        else:
            for at in range(0, len(chunk), self._slice):
                sink.write(chunk[at : at + self._slice])
                await sink.drain()
                self.slices += 1
        self.passed_bytes += len(chunk)
        await sink.drain()


class Proxy:
    """Relays connections to one server. `up` is the way to it, `down` the way back.

    What it is told holds for all its connections, those to come too. Counters say what has
    become of it, so that a test can prove its fault. Made by `relay`; runs on a thread of its own.
    """

    def __init__(self, port: int, listener: socket.socket) -> None:
        """Relay what `listener` accepts to a port of 127.0.0.1."""
        self._upstream = port
        self._listener = listener
        self._close_delay_s = 0.0
        self._connections: dict[asyncio.Task[None], _Connection] = {}
        self.accepted = self.resets = self.closed_late = 0
        self.up, self.down = Way(), Way()
        self._thread = LoopThread("proxy")
        self._server: asyncio.Server = self._thread.run(
            asyncio.start_server(self._serve, sock=listener, limit=_BUFFER_BYTES)
        )

    @property
    def address(self) -> str:
        """Where it listens, as host:port."""
        host, port = self._listener.getsockname()
        return f"{host}:{port}"

    @property
    def connections(self) -> int:
        """How many connections there are now."""
        return len(self._connections)

    # What it can be told.

    def delay(self, seconds: float) -> None:
        """Let each byte be on its way for so long, in both directions."""
        self._tell("both", lambda way: way.delay(seconds))

    def slice(self, size: int | None) -> None:
        """Pass on so many bytes at a time, each in a write of its own; None is as they come."""
        self._tell("both", lambda way: way.slice(size))

    def hold(self, direction: Direction | Literal["both"]) -> None:
        """Keep what comes, neither lost nor passed on, until `release`: a one-way silence."""
        self._tell(direction, Way.hold)

    def swallow(self, direction: Direction) -> None:
        """Lose what comes until `release`; the stream makes no sense after: follow with a cut."""
        self._tell(direction, Way.swallow)

    def release(self) -> None:
        """Pass on what has been held, and everything as it comes from now on."""
        self._tell("both", Way.release)

    def close_slowly(self, seconds: float) -> None:
        """Let one side learn so late that the other has closed."""
        self._close_delay_s = seconds

    def count(self, direction: Direction, text: bytes) -> None:
        """Count from now on how often these bytes are sent, in the way's ``appearances``."""
        self._tell(direction, lambda way: way.count(text))

    def cut(self) -> None:
        """Reset every connection on both sides, with what is on its way; hold nothing any more."""

        async def run() -> None:
            self._reset_all()
            for way in (self.up, self.down):
                way.release()

        self._thread.run(run())

    def cut_in_next(self, direction: Direction) -> None:
        """Pass on half of what comes next, then reset that connection on both sides."""
        self._tell(direction, Way.break_next)

    def close(self) -> None:
        """End every connection, and listen no more."""
        self._thread.run(self._end())
        self._thread.stop()

    # On the loop's thread.

    def onlookers(self) -> tuple[Onlooker | None, Onlooker | None]:
        """Return who sees what a new connection carries up, and down: nobody."""
        return None, None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.accepted += 1
        connection = self._connections[task] = _Connection(self, writer)
        try:
            with contextlib.suppress(asyncio.CancelledError):  # It has been cut.
                await connection.run(reader, self._upstream)
        finally:
            del self._connections[task]
            connection.abort()

    def _reset_all(self) -> None:
        for task, connection in self._connections.items():
            connection.cut()
            task.cancel()

    async def _end(self) -> None:
        self._server.close()
        self._reset_all()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def linger(self) -> None:
        """Wait with a close as told."""
        if self._close_delay_s:
            self.closed_late += 1
            await asyncio.sleep(self._close_delay_s)

    # From the test's thread to the loop's.

    def _tell(self, direction: Direction | Literal["both"], order: Callable[[Way], None]) -> None:
        ways = {"up": [self.up], "down": [self.down], "both": [self.up, self.down]}[direction]

        async def run() -> None:
            for way in ways:
                order(way)

        self._thread.run(run())


class _Connection:
    """One relayed connection: two ways, and one end for both."""

    def __init__(self, proxy: Proxy, client: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._writers = [client]
        self._cut = False

    async def run(self, client: asyncio.StreamReader, port: int) -> None:
        """Relay until a side closes, or it is cut."""
        try:
            server, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return  # The server is down: the client sees its connection end.
        self._writers.append(writer)
        sees_up, sees_down = self._proxy.onlookers()
        up = self._proxy.up.carry(client, writer, sees_up)
        down = self._proxy.down.carry(server, self._writers[0], sees_down)
        ways = [asyncio.create_task(up), asyncio.create_task(down)]
        try:
            done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            errors = [error for way in done if (error := way.exception()) is not None]
            if any(isinstance(error, CutError) for error in errors):
                self.cut()
            else:
                await self._proxy.linger()
            for error in errors:  # Of an onlooker: asyncio logs it.
                if not isinstance(error, OSError):
                    raise error
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    def cut(self) -> None:
        """Reset both sides: what is on its way is lost."""
        if not self._cut:
            self._cut = True
            self._proxy.resets += 1
            for writer in self._writers:
                plain: socket.socket = writer.get_extra_info("socket")
                with contextlib.suppress(OSError):
                    plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.abort()

    def abort(self) -> None:
        """Drop both sockets."""
        for writer in self._writers:
            writer.transport.abort()


@contextmanager
def relay(port: int, listener: socket.socket | None = None) -> Iterator[Proxy]:
    """Relay to a port of 127.0.0.1 for as long as the block runs; by default from another one."""
    proxy = Proxy(port, listener or socket.create_server(("127.0.0.1", 0)))
    try:
        yield proxy
    finally:
        proxy.close()
