"""HTTP calls: the receiver that they go to, and the clients of each kind of handler alone.

    python -m benchmarks.calls receiver
    python -m benchmarks.calls coroutine|plain URL AT_ONCE CALLS

The second makes so many calls by the client alone: no broker, no etcd, the same request.
"""

import asyncio
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import aiohttp
import orjson
import urllib3

from .processes import timed
from .publishers import new_events

_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
_PATH = re.compile(rb"\w+ /(\d+) ")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Receiver(asyncio.Protocol):
    """Answers every request on one connection with 200, one after the other.

    The path is how many milliseconds later the answer comes: `POST /100` takes a tenth of a second.
    It knows no more of HTTP than what its callers send: requests with a Content-Length, on
    connections that stay open. So it spends little on a request, and its callers set the pace.
    """

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


async def receive() -> None:
    """Listen on a free port, print its URL, and answer until a signal ends the process."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Receiver, "127.0.0.1", 0, backlog=2048)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


def pool(at_once: int) -> urllib3.PoolManager:
    """Return connections for so many threads."""
    return urllib3.PoolManager(maxsize=at_once, retries=False)


def post(http: urllib3.PoolManager, url: str, event_id: str, event: object) -> None:
    """Make one call on this thread, with notify's request."""
    key = {"Idempotency-Key": event_id}
    response = http.request("POST", url, json=event, headers=key, redirect=False)
    _require_200(response.status)


def _on_threads(url: str, at_once: int, bodies: Iterator[bytes]) -> None:
    http = pool(at_once)

    def make(body: bytes) -> None:
        event = orjson.loads(body)
        post(http, url, event["id"], event)

    with ThreadPoolExecutor(at_once) as threads:
        for _ in threads.map(make, bodies):
            pass


async def _by_coroutines(url: str, at_once: int, bodies: Iterator[bytes]) -> None:
    async def make_all(session: aiohttp.ClientSession) -> None:
        for body in bodies:
            event = orjson.loads(body)
            key = {"Idempotency-Key": event["id"]}
            async with session.post(url, json=event, headers=key) as response:
                await response.read()
                _require_200(response.status)

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(make_all(session) for _ in range(at_once)))


def _require_200(status: int) -> None:
    if status != 200:
        raise RuntimeError(f"the receiver answered {status}")


def main(kind: str, *arguments: str) -> None:
    """Receive calls, or make so many and tell what that took."""
    if kind == "receiver":
        asyncio.run(receive())
        return
    url, at_once, calls = arguments[0], int(arguments[1]), int(arguments[2])
    bodies = iter(new_events(calls))
    with timed(calls):
        if kind == "plain":
            _on_threads(url, at_once, bodies)
        else:
            asyncio.run(_by_coroutines(url, at_once, bodies))


if __name__ == "__main__":
    main(*sys.argv[1:])
