"""An HTTP server that answers every request with 200, for notify's calls; a process of its own.

    python -m benchmarks.sink

It knows no more of HTTP than what its callers send: requests with a Content-Length, on
connections that stay open. So it spends little on a request, and its callers set the pace.
"""

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from harness.wait import eventually

from .outcome import run_module

_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_LISTENING = re.compile(r"listening on (\d+)\n")


class Caller(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep what the answers go to."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Answer each request that is complete."""
        self._received += data
        while (rest := after_request(self._received)) is not None:
            self._received = rest
            self._transport.write(_OK)


def after_request(received: bytes) -> bytes | None:
    """Return what follows the first request, or None while that is not complete."""
    head, end, rest = received.partition(b"\r\n\r\n")
    length = _LENGTH.search(head)
    expected = int(length[1]) if length else 0
    return rest[expected:] if end and len(rest) >= expected else None


async def serve() -> None:
    """Listen on a free port, say which, and answer until a signal ends the process."""
    server = await asyncio.get_running_loop().create_server(Caller, "127.0.0.1", 0, backlog=128)
    print(f"listening on {server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


@contextmanager
def run_sink() -> Iterator[str]:
    """Run the server as a process while the block runs, and give its URL."""
    with run_module("benchmarks.sink") as child:

        def port() -> str:
            said = _LISTENING.search(child.output())
            assert said, f"the sink does not listen: {child.output()}"
            return said[1]

        yield f"http://127.0.0.1:{eventually(port)}/notifications"


if __name__ == "__main__":
    asyncio.run(serve())
