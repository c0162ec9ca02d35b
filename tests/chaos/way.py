"""One direction of a proxy: how bytes fare on their way through."""

import asyncio


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

    async def carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
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
