"""The receiver of notifications: an HTTP server that refuses, delays and holds calls.

And the account of them: who called for what, how often, and why again.
"""

import asyncio
import json
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from itertools import combinations, pairwise
from typing import Any

from chaos.checks import lines
from chaos.threads import LoopThread
from servers.etcd import Store
from servers.services import Service

_LOOK_EVERY_S = 0.02


@dataclass(eq=False)
class Call:
    """One POST: its id, its body, who made it, and its time on `time.monotonic`.

    It ends when it is answered, or when its caller has hung up, as the kernel does for one that
    was killed. A frozen caller hangs up as little as one that waits. ``held``: it has met a hold,
    so it does not end by being answered before the release. ``status`` is what it is to get.
    """

    key: str
    body: Any
    caller: str
    began_s: float
    ended_s: float | None = None
    answered: bool = False
    held: bool = False
    status: int = HTTPStatus.NO_CONTENT

    def overlaps(self, other: "Call") -> bool:
        """Return whether both were under way at one instant."""
        first, second = sorted((self, other), key=lambda call: call.began_s)
        return first.ended_s is None or second.began_s < first.ended_s


class Receiver:
    """Accepts POSTs with 204 until told otherwise. `close` ends it."""

    def __init__(self, latency_s: float = 0.0) -> None:
        self._latency_s = latency_s
        self._calls: list[Call] = []
        self._failures: dict[str, int | None] = {}
        self.status: int = HTTPStatus.NO_CONTENT
        """What calls are answered with, but for those with a key that is refused."""
        self._open = True
        self._let_through: set[str] = set()
        # The default backlog refuses some of a service's calls when they come all at once.
        listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._port: int = listener.getsockname()[1]
        self._thread = LoopThread("receiver")
        self._server: asyncio.Server = self._thread.run(
            asyncio.start_server(self._serve, sock=listener)
        )

    def url_for(self, caller: str) -> str:
        """Where a process of this name POSTs, so that its calls are known to be its own."""
        return f"{self.url}/{caller}"

    @property
    def url(self) -> str:
        """Where to POST."""
        return f"http://127.0.0.1:{self._port}/notifications"

    # What it has seen.

    @property
    def calls(self) -> list[Call]:
        """Every call so far, in order of arrival, the refused and the held ones too."""
        return list(self._calls)

    def per_key(self) -> Counter[str]:
        """Return how many calls each idempotency key has had."""
        return Counter(call.key for call in self.calls)

    def accepted(self) -> set[str]:
        """Return the ids of the calls that were answered with 204."""
        return {each.key for each in self.calls if each.answered and each.status == 204}

    def under_way(self, caller: str) -> set[str]:
        """Return the ids of the calls of one process that have not ended."""
        return {call.key for call in self.calls if call.caller == caller and call.ended_s is None}

    def number_under_way(self, caller: str) -> int:
        """Return how many calls of one process have not ended."""
        return len(self.under_way(caller))

    def held(self, caller: str) -> set[str]:
        """Return the ids of the calls of one process that wait for `release`.

        One that was about to be answered when the hold began is still under way, and not held.
        """
        return {
            call.key
            for call in self.calls
            if call.caller == caller and call.held and call.ended_s is None
        }

    def number_held(self, caller: str) -> int:
        """Return how many of them there are."""
        return len(self.held(caller))

    # What it can be told.

    def refuse(self, key: str, times: int | None = None) -> None:
        """Answer the next calls with this key with 500: so many of them, or all."""
        self._failures[key] = times

    def hold(self) -> None:
        """Leave calls without an answer until `release`."""
        self._let_through.clear()
        self._open = False

    def let_through(self, caller: str) -> None:
        """Answer the calls of one process all the same."""
        self._let_through.add(caller)

    def release(self) -> None:
        """Answer those held, and the following ones at once."""
        self._open = True

    def close(self) -> None:
        """Stop listening; calls under way are not answered."""
        self._thread.run(self._end())
        self._thread.stop()

    # On the loop's thread.

    async def _end(self) -> None:
        self._server.close()
        mine = asyncio.current_task()
        calls = [task for task in asyncio.all_tasks() if task is not mine]
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take a call, hold it if so told, and answer it unless its caller hangs up before."""
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            call = await self._taken(reader)
            if await self._waited(call, reader):
                head = f"HTTP/1.1 {call.status} As told\r\nContent-Length: 0\r\n"
                writer.write(f"{head}Connection: close\r\n\r\n".encode())
                call.answered = True
            call.ended_s = time.monotonic()
        writer.close()

    async def _taken(self, reader: asyncio.StreamReader) -> Call:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        request, *lines = head.splitlines()[:-1]
        headers = {name.lower(): value for name, _, value in (s.partition(": ") for s in lines)}
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        caller = request.split()[1].rpartition("/")[2]
        call = Call(headers["idempotency-key"], body, caller, time.monotonic())
        left = self._failures.get(call.key, 0)
        call.status = 500 if left is None or left > 0 else self.status
        if left:
            self._failures[call.key] = left - 1
        self._calls.append(call)
        return call

    async def _waited(self, call: Call, reader: asyncio.StreamReader) -> bool:
        """Wait as told; returns False where the caller has hung up meanwhile."""
        hanging_up = asyncio.create_task(_hangs_up(reader))
        due_s = call.began_s + self._latency_s
        try:
            while (left_s := due_s - time.monotonic()) > 0 or self._holds(call):
                call.held = self._holds(call)
                look_s = min(left_s, _LOOK_EVERY_S) if left_s > 0 else _LOOK_EVERY_S
                if (await asyncio.wait({hanging_up}, timeout=look_s))[0]:
                    return False
            return True
        finally:
            hanging_up.cancel()

    def _holds(self, call: Call) -> bool:
        return not self._open and call.caller not in self._let_through


async def _hangs_up(reader: asyncio.StreamReader) -> None:
    """Wait for the end: a caller that has sent its request sends nothing more."""
    with suppress(OSError):
        await reader.read(1)


def account(
    calls: Iterable[Call], done: set[str], explains: Callable[[Call, Call], bool]
) -> set[str]:
    """Return the ids that were called for more than once.

    Raises AssertionError where an event was not called for, where two calls for one were under
    way at the same time, and where `explains` knows no cause of a repeat from the call before it.
    """
    by_id: defaultdict[str, list[Call]] = defaultdict(list)
    for call in sorted(calls, key=lambda call: call.began_s):
        by_id[call.key].append(call)
    assert set(by_id) == done, f"not called: {done - set(by_id)}, not done: {set(by_id) - done}"
    each_id = by_id.values()
    overlapping = [
        (first, second)
        for each in each_id
        for first, second in combinations(each, 2)
        if first.overlaps(second)
    ]
    assert not overlapping, f"at the same time: {overlapping}"
    unexplained = [pair for each in each_id for pair in pairwise(each) if not explains(*pair)]
    assert not unexplained, f"without a cause: {unexplained}"
    return {event_id for event_id, each in by_id.items() if len(each) > 1}


def lost_claims(service: Service) -> set[str]:
    """Return the ids for which a service has logged that a claim was lost during the call."""
    return {line["event_id"] for line in lines(service, "the claim was lost during the call")}


def ended_claims(store: Store) -> dict[str, int]:
    """Return how often a claim of each of notify's events has ended with its lease.

    Raises AssertionError unless each was gone before the next was taken, and the last one done.
    """
    steps = store.steps("notify")
    ended = {event_id: states.count("gone") for event_id, states in steps.items()}
    for event_id, times in ended.items():
        assert steps[event_id] == ["claimed", "gone"] * times + ["claimed", "done"]
    return ended
