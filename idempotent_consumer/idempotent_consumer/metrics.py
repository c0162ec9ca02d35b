"""Counters and timers, summed up on the loop and sent to statsd twice a second."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import Counter

import statsd

SEND_EVERY_S = 0.5
RESOLVE_EVERY_S = 30.0
"""statsd's client looks its server's name up once; a moved server is found again this soon."""

_MAX_SENDINGS = 20
"""Kept for a thread that waits for the name service; what is counted then is summed up here."""

_MAX_TIMINGS = 20
"""Timings sent for one name at a time: more say nothing new, and cost a datagram each few."""


class Metrics:
    """Counts on the loop's thread, sends from its own; a statsd that is away never holds it up.

    What is counted while statsd's name does not resolve is sent once it does. Counters are sent
    before timers, since Graphite may limit how many new series it makes at a time.
    """

    def __init__(self, host: str, port: int, prefix: str) -> None:
        self._address = (host, port, prefix or None)
        self._counts: Counter[str] = Counter()
        self._timings_ms: dict[str, list[float]] = {}
        self._sendings: queue.SimpleQueue[tuple[Counter[str], dict[str, list[float]]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._send_all, name="statsd", daemon=True)
        self._thread.start()

    def count(self, name: str, by: int = 1) -> None:
        """Add to a counter; adding 0 makes it show."""
        self._counts[name] += by

    def timing(self, name: str, elapsed_s: float) -> None:
        """Note how long something took."""
        timings = self._timings_ms.setdefault(name, [])
        if len(timings) < _MAX_TIMINGS:
            timings.append(elapsed_s * 1000)

    def send(self) -> None:
        """Hand what has been counted since the last call to the sending thread."""
        if (self._counts or self._timings_ms) and self._sendings.qsize() < _MAX_SENDINGS:
            self._sendings.put((self._counts, self._timings_ms))
            self._counts, self._timings_ms = Counter(), {}

    def close(self) -> None:
        """Send what is left, for half a second at most."""
        self.send()
        self._sendings.put(None)
        self._thread.join(0.5)

    def _send_all(self) -> None:
        client: statsd.StatsClient | None = None
        resolved_s = 0.0
        unsent: Counter[str] = Counter()
        while (sending := self._sendings.get()) is not None:
            counts, timings_ms = sending
            unsent.update(counts)
            if client is None or time.monotonic() - resolved_s > RESOLVE_EVERY_S:
                client, resolved_s = self._resolve(client), time.monotonic()
            if client is not None:
                _send(client, unsent, timings_ms)
                unsent = Counter()
        if client is not None:
            client.close()

    def _resolve(self, client: statsd.StatsClient | None) -> statsd.StatsClient | None:
        host, port, prefix = self._address
        with contextlib.suppress(OSError, UnicodeError):
            found = statsd.StatsClient(host, port, prefix, maxudpsize=1432, ipv6=":" in host)
            if client is not None:
                client.close()
            return found
        return client


def _send(
    client: statsd.StatsClient, counts: Counter[str], timings_ms: dict[str, list[float]]
) -> None:
    with client.pipeline() as pipeline:
        for name, by in counts.items():
            pipeline.incr(name, by)
        for name, timings in timings_ms.items():
            for elapsed_ms in timings:
                pipeline.timing(name, elapsed_ms)
