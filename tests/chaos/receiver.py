"""The receiver of notifications: an HTTP server that refuses, delays and holds calls.

`account` then judges the calls: which were made, which repeated, and for what cause.
"""

import json
import sys
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
    """One POST: its id, its body, its caller, and its times by `time.monotonic`.

    It ends when it is answered, or when its caller closes the connection, which the kernel does
    for a killed process but not for a frozen one. ``held``: it is answered only after the release.
    ``status`` is the answer that it gets.
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
    """Answers POSTs with ``status``, 204 at first, and keeps its ``calls`` in order of arrival."""

    # The default backlog refuses some of the calls that a service makes at the same time.
    request_queue_size = 512

    def __init__(self, latency_s: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.latency_s, self.status = latency_s, int(HTTPStatus.NO_CONTENT)
        self.calls: list[Call] = []
        self._refusals = Counter[str]()
        self._open, self._let_through = True, set[str]()
        self.url = f"http://127.0.0.1:{self.server_port}/notifications"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def url_for(self, caller: str) -> str:
        """Return the URL for one process: its end is the ``caller`` of the process's calls."""
        return f"{self.url}/{caller}"

    # What it has seen.

    def per_key(self) -> Counter[str]:
        return Counter(call.key for call in self.calls)

    def accepted(self) -> set[str]:
        """Return the ids of the calls that were answered with 204."""
        return {each.key for each in self.calls if each.answered and each.status == 204}

    def under_way(self, caller: str) -> set[str]:
        """Return the ids of one process's calls that have not ended."""
        return {call.key for call in self.calls if call.caller == caller and call.ended_s is None}

    def held(self, caller: str) -> set[str]:
        """Return the ids of one process's calls that wait for `release`.

        A call that was about to be answered when the hold began is under way, but not held.
        """
        mine = (call for call in self.calls if call.caller == caller)
        return {call.key for call in mine if call.held and call.ended_s is None}

    def number_held(self, caller: str) -> int:
        return len(self.held(caller))

    # What it can be told.

    def refuse(self, key: str, times: int = sys.maxsize) -> None:
        """Answer the next calls with this key with 500."""
        self._refusals[key] = times

    def hold(self) -> None:
        """Leave calls without an answer until `release`."""
        self._let_through.clear()
        self._open = False

    def let_through(self, caller: str) -> None:
        """Answer the calls of one process during a hold."""
        self._let_through.add(caller)

    def release(self) -> None:
        """Answer the held calls, and from now on all calls."""
        self._open = True

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    # On the threads of its calls.

    def take(self, call: Call) -> None:
        refused = self._refusals[call.key] > 0
        self._refusals[call.key] -= refused
        call.status = 500 if refused else self.status
        self.calls.append(call)

    def holds(self, call: Call) -> bool:
        return not self._open and call.caller not in self._let_through


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        """Take a call, hold it if told to, and answer it unless its caller hangs up first."""
        with suppress(OSError, ValueError):  # Its caller was killed while sending.
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
        """Wait for the latency and the hold; return False if the caller hangs up meanwhile."""
        due_s = call.began_s + self.server.latency_s
        while (left_s := due_s - time.monotonic()) > 0 or self.server.holds(call):
            call.held = self.server.holds(call)
            self.connection.settimeout(min(left_s, _LOOK_EVERY_S) if left_s > 0 else _LOOK_EVERY_S)
            with suppress(TimeoutError):
                # A caller sends nothing after its request, so this returns when it hangs up.
                self.connection.recv(1)
                return False
        return True

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


def account(
    calls: Iterable[Call], done: set[str], explains: Callable[[Call, Call], bool]
) -> set[str]:
    """Return the ids of the events with more than one call.

    Raises AssertionError if a done event had no call, if two calls for an event were under way at
    the same time, or if `explains(before, again)` knows no cause for a repeated call.
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
    """Return how often the lease of a claim has expired, for each of notify's events.

    Raises AssertionError unless each claim was gone before the next one, and the last one is done.
    """
    steps = store.steps("notify")
    ended = {event_id: states.count("gone") for event_id, states in steps.items()}
    for event_id, times in ended.items():
        assert steps[event_id] == ["claimed", "gone"] * times + ["claimed", "done"]
    return ended
