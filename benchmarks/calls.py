"""HTTP calls: the receiver that they go to, and the clients of each kind of handler alone.

    python -m benchmarks.calls receiver
    python -m benchmarks.calls coroutine|plain URL AT_ONCE CALLS

The second makes so many calls by the client alone: no broker, no etcd, the same request.
"""

import asyncio
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import aiohttp
import orjson
import urllib3

from .publishers import new_events, timed

_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
_REQUEST = re.compile(
    rb"\w+ /(\d+) .*?\r\ncontent-length: *(\d+)\r\n(?:.*?\r\n)?\r\n", re.IGNORECASE | re.DOTALL
)


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
        while request := first_request(self._received):
            answer_ms, size_bytes = request
            self._received = self._received[size_bytes:]
            if answer_ms:
                loop = asyncio.get_running_loop()
                loop.call_later(answer_ms / 1000, self._transport.write, _OK)
            else:
                self._transport.write(_OK)


def first_request(received: bytes) -> tuple[int, int] | None:
    """Return when the first request's answer is due, and its size; None while it is not whole."""
    found = _REQUEST.match(received)
    size_bytes = found.end() + int(found[2]) if found else 0
    return (int(found[1]), size_bytes) if found and len(received) >= size_bytes else None


async def receive() -> None:
    """Listen on a free port, print its URL, and answer until a signal ends the process."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Receiver, "127.0.0.1", 0, backlog=2048)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


def poster(url: str, at_once: int) -> Callable[[dict[str, Any]], None]:
    """Return what makes a call for an event on a thread, with notify's request."""
    http = urllib3.PoolManager(maxsize=at_once, retries=False)

    def post(event: dict[str, Any]) -> None:
        key = {"Idempotency-Key": event["id"]}
        response = http.request("POST", url, json=event, headers=key, redirect=False)
        _require_200(response.status)

    return post


def _on_threads(url: str, at_once: int, bodies: Iterator[bytes]) -> None:
    post = poster(url, at_once)
    with ThreadPoolExecutor(at_once) as threads:
        for _ in threads.map(lambda body: post(orjson.loads(body)), bodies):
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


def _call(kind: str, url: str, at_once: int, calls: int) -> None:
    bodies = iter(new_events(calls))
    with timed(calls):
        if kind == "plain":
            _on_threads(url, at_once, bodies)
        else:
            asyncio.run(_by_coroutines(url, at_once, bodies))


if __name__ == "__main__":
    if sys.argv[1] == "receiver":
        asyncio.run(receive())
    else:
        _call(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
