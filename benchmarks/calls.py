"""Calls of claimed handlers, and beside each kind of handler the HTTP client that it calls with.

    python -m benchmarks.calls coroutine|plain URL AT_ONCE CALLS

makes so many calls by the client alone: no broker, no etcd, one process, the same request.
"""

import asyncio
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from itertools import product
from typing import NamedTuple

import aiohttp
import orjson
import urllib3

from .loading import new_events
from .outcome import outcome, timed
from .progress import Rate, Rates

_ENDS_WITHIN_S = 60.0


class HandlerKind(StrEnum):
    """Of a handler: `notify` is a coroutine, with aiohttp; the plain one has urllib3."""

    COROUTINE = "coroutine"
    PLAIN = "plain"


class Scenario(NamedTuple):
    """What is called, and how: a receiver that answers after `answer_ms`, so many at once."""

    kind: HandlerKind
    answer_ms: int
    at_once: int

    @property
    def name(self) -> str:
        """The subject that makes these calls for events."""
        return f"{self.kind}, {self.answer_ms} ms, {self.at_once:,} at once"

    @property
    def alone(self) -> str:
        """The client that makes them for nobody."""
        return f"{self.name}, client alone"

    @property
    def most_per_s(self) -> float | None:
        """What the slots allow; None where the receiver answers at once."""
        return 1000 * self.at_once / self.answer_ms if self.answer_ms else None

    def url(self, sink_url: str) -> str:
        """Return where the sink answers after this time."""
        return f"{sink_url}/{self.answer_ms}"


SCENARIOS = [
    Scenario(kind, answer_ms, at_once)
    for answer_ms, kind, at_once in product((0, 10, 100), HandlerKind, (100, 1000))
]


def call_alone(sink_url: str, scenario: Scenario) -> Rates:
    """Let a process make these calls by the client alone; raises NotMeasuredError."""
    calls = max(10_000, 20 * scenario.at_once)  # To connect is a small part of so many.
    told = outcome(
        "benchmarks.calls",
        scenario.kind,
        scenario.url(sink_url),
        str(scenario.at_once),
        str(calls),
        within_s=_ENDS_WITHIN_S,
    )
    return {scenario.alone: Rate(**told)}


def post_plainly(http: urllib3.PoolManager, url: str, event_id: str, event: object) -> None:
    """Make one call on this thread, with notify's request."""
    key = {"Idempotency-Key": event_id}
    response = http.request("POST", url, json=event, headers=key, redirect=False)
    _require_200(response.status)


def pool(at_once: int) -> urllib3.PoolManager:
    """Return connections for so many threads."""
    return urllib3.PoolManager(maxsize=at_once, retries=False)


def _on_threads(url: str, at_once: int, bodies: Iterable[bytes]) -> None:
    http = pool(at_once)

    def post(body: bytes) -> None:
        event = orjson.loads(body)
        post_plainly(http, url, event["id"], event)

    with ThreadPoolExecutor(at_once) as threads:
        for _ in threads.map(post, bodies):
            pass


def _by_coroutines(url: str, at_once: int, bodies: Iterable[bytes]) -> None:
    left = iter(bodies)

    async def post_all(session: aiohttp.ClientSession) -> None:
        for body in left:
            event = orjson.loads(body)
            key = {"Idempotency-Key": event["id"]}
            async with session.post(url, json=event, headers=key) as response:
                await response.read()
                _require_200(response.status)

    async def run() -> None:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            await asyncio.gather(*(post_all(session) for _ in range(at_once)))

    asyncio.run(run())


_MAKE: dict[HandlerKind, Callable[[str, int, Iterable[bytes]], None]] = {
    HandlerKind.COROUTINE: _by_coroutines,
    HandlerKind.PLAIN: _on_threads,
}


def _require_200(status: int) -> None:
    if status != 200:
        raise RuntimeError(f"the sink answered {status}")


def main(kind: str, url: str, at_once: str, calls: str) -> None:
    """Make so many calls, and tell what that took."""
    bodies = new_events(int(calls))
    with timed(len(bodies)):
        _MAKE[HandlerKind(kind)](url, int(at_once), bodies)


if __name__ == "__main__":
    main(*sys.argv[1:])
