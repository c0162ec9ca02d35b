"""The receiver of notifications: an HTTP server that refuses, delays and holds calls.

And the account of them: who called for what, how often, and why again.
"""

import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

from chaos.checks import lines
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


class Receiver(ThreadingHTTPServer):
    """Accepts POSTs with 204 until told otherwise, and keeps its ``calls`` in order of arrival.

    `close` ends it. ``status`` is the answer to calls whose key is not refused.
    """

    # The default backlog refuses some of a service's calls when they come all at once.
    request_queue_size = 512

    def __init__(self, latency_s: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.latency_s, self.status = latency_s, int(HTTPStatus.NO_CONTENT)
        self.calls: list[Call] = []
        self._failures: dict[str, int | None] = {}
        self._open, self._let_through = True, set[str]()
        self.url = f"http://127.0.0.1:{self.server_port}/notifications"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def url_for(self, caller: str) -> str:
        """Where a process of this name POSTs, so that its calls are known to be its own."""
        return f"{self.url}/{caller}"

    # What it has seen.

    def per_key(self) -> Counter[str]:
        return Counter(call.key for call in self.calls)

    def accepted(self) -> set[str]:
        """Return the ids of the calls that were answered with 204."""
        return {each.key for each in self.calls if each.answered and each.status == 204}

    def under_way(self, caller: str) -> set[str]:
        """Return the ids of the calls of one process that have not ended."""
        return {call.key for call in self.calls if call.caller == caller and call.ended_s is None}

    def held(self, caller: str) -> set[str]:
        """Return the ids of the calls of one process that wait for `release`.

        One that was about to be answered when the hold began is still under way, and not held.
        """
        mine = (call for call in self.calls if call.caller == caller)
        return {call.key for call in mine if call.held and call.ended_s is None}

    def number_held(self, caller: str) -> int:
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
        self.shutdown()
        self.server_close()

    # On the threads of its calls.

    def take(self, call: Call) -> None:
        left = self._failures.get(call.key, 0)
        call.status = 500 if left is None or left > 0 else self.status
        if left:
            self._failures[call.key] = left - 1
        self.calls.append(call)

    def holds(self, call: Call) -> bool:
        return not self._open and call.caller not in self._let_through


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        """Take a call, hold it if so told, and answer it unless its caller hangs up before."""
        with suppress(OSError, ValueError):  # Its caller was killed while it sent this.
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            caller = self.path.rpartition("/")[2]
            call = Call(self.headers["Idempotency-Key"], body, caller, time.monotonic())
            self.server.take(call)
            try:
                if self._waited(call):
                    self.send_response(call.status)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    call.answered = True  # Not before: its caller may be frozen from then on.
            finally:
                call.ended_s = time.monotonic()

    def _waited(self, call: Call) -> bool:
        """Wait as told; returns False where the caller has hung up meanwhile."""
        due_s = call.began_s + self.server.latency_s
        while (left_s := due_s - time.monotonic()) > 0 or self.server.holds(call):
            call.held = self.server.holds(call)
            self.connection.settimeout(min(left_s, _LOOK_EVERY_S) if left_s > 0 else _LOOK_EVERY_S)
            with suppress(TimeoutError):
                # A caller that has sent its request sends nothing more: this is its end.
                self.connection.recv(1)
                return False
        return True

    def log_message(self, *_: Any) -> None:
        """Say nothing of it."""


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
    repeats = [pair for each in by_id.values() for pair in pairwise(each)]
    for before, again in repeats:
        ended = before.ended_s is not None and before.ended_s <= again.began_s
        assert ended, f"at the same time: {before}, {again}"
        assert explains(before, again), f"without a cause: {before}, {again}"
    return {before.key for before, _ in repeats}


def lost_claims(service: Service) -> set[str]:
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
