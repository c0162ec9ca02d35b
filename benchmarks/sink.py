"""An HTTP server that answers every request with 200, for calls; a process of its own.

    python -m benchmarks.sink

The path is how many milliseconds later the answer comes: `POST /100` takes a tenth of a second.
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
_PATH = re.compile(rb"\w+ /(\d+) ")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_LISTENING = re.compile(r"listening on (\d+)\n")


class Caller(asyncio.Protocol):
    """One connection, with one request at a time."""

    def __init__(self) -> None:
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep what the answers go to."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Answer each request that is complete."""
        self._received += data
        while (rest := after_request(self._received)) is not None:
            answer_ms = asked_ms(self._received)
            self._received = rest
            if answer_ms:
                loop = asyncio.get_running_loop()
                loop.call_later(answer_ms / 1000, self._transport.write, _OK)
            else:
                self._transport.write(_OK)


def after_request(received: bytes) -> bytes | None:
    """Return what follows the first request, or None while that is not complete."""
    head, end, rest = received.partition(b"\r\n\r\n")
    length = _LENGTH.search(head)
    expected = int(length[1]) if length else 0
    return rest[expected:] if end and len(rest) >= expected else None


def asked_ms(request: bytes) -> int:
    """Return when the answer is due, by the request's path."""
    path = _PATH.match(request)
    return int(path[1]) if path else 0


async def serve() -> None:
    """Listen on a free port, say which, and answer until a signal ends the process."""
    server = await asyncio.get_running_loop().create_server(Caller, "127.0.0.1", 0, backlog=2048)
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

        yield f"http://127.0.0.1:{eventually(port)}"


if __name__ == "__main__":
    asyncio.run(serve())
