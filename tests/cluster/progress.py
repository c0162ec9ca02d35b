"""When each record was first seen: watches on all members of etcd, so that one is always awake."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any

from servers.store import record_prefix
from servers.web import open_json

# A watch that was silent for so long is opened again, at the next revision: its member may be cut
# off without knowing it.
_SILENT_S = 3.0


class Progress:
    """The moments at which the records of a service appeared. Made by `watch_progress`.

    A record counts from when the first member has shown it, so one that is down, cut off or
    behind delays nothing.
    """

    def __init__(self, service: str, endpoints: Iterable[str], first_revision: int) -> None:
        self._prefix = record_prefix(service)
        self._first = first_revision
        self._lock = threading.Lock()
        self._seen_s: dict[str, float] = {}
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=self._follow, args=(endpoint,), daemon=True)
            for endpoint in endpoints
        ]
        for thread in self._threads:
            thread.start()

    def count(self) -> int:
        """Return how many events are recorded."""
        with self._lock:
            return len(self._seen_s)

    def shows(self, event_id: str) -> bool:
        """Return whether an event is recorded."""
        with self._lock:
            return event_id in self._seen_s

    def longest_gap_s(self, since_s: float, until_s: float) -> float:
        """Return the longest time between two moments without a new record in between."""
        with self._lock:
            inside = sorted(at for at in self._seen_s.values() if since_s < at < until_s)
        return max(after - before for before, after in pairwise([since_s, *inside, until_s]))

    def close(self) -> None:
        """End the watches."""
        self._closing.set()
        for thread in self._threads:
            thread.join()

    def _follow(self, endpoint: str) -> None:
        revision = self._first
        while not self._closing.is_set():
            with suppress(OSError, ValueError):  # ValueError: a line that was cut off
                for answer in self._answers(endpoint, revision):
                    for event in answer.get("events", ()):
                        self._note(event["kv"])
                        revision = max(revision, int(event["kv"]["mod_revision"]) + 1)
            self._closing.wait(0.1)

    def _answers(self, endpoint: str, revision: int) -> Iterator[Any]:
        first = self._prefix.encode()
        create = {
            "key": base64.b64encode(first).decode(),
            "range_end": base64.b64encode(first[:-1] + bytes([first[-1] + 1])).decode(),
            "start_revision": str(revision),
            "filters": ["NODELETE"],
        }
        request = {"create_request": create}
        with open_json(
            "POST", f"http://{endpoint}/v3/watch", request, timeout_s=_SILENT_S
        ) as stream:
            for line in stream:
                if self._closing.is_set():
                    return
                yield json.loads(line).get("result", {})

    def _note(self, kv: dict[str, str]) -> None:
        key, at_s = base64.b64decode(kv["key"]).decode(), time.monotonic()
        state = json.loads(base64.b64decode(kv["value"]))["state"]
        if state == "done":
            with self._lock:
                self._seen_s.setdefault(key.removeprefix(self._prefix), at_s)


@contextmanager
def watch_progress(
    service: str, endpoints: Iterable[str], first_revision: int
) -> Iterator[Progress]:
    """Watch for as long as the block runs."""
    progress = Progress(service, endpoints, first_revision)
    try:
        yield progress
    finally:
        progress.close()
