"""Metrics for statsd: the outcomes of deliveries, timers, and the ages of duplicates."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import queue
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import statsd
from structlog.typing import FilteringBoundLogger

from .etcd import EtcdError
from .event import Event
from .ledger import Ledger
from .records import DONE, Record
from .settings import duration_s

SEND_EVERY_S = 0.5

_RESOLVE_EVERY_S = 30.0
"""How often a new statsd client is made: one resolves its server's name only once, and the server
may move."""

_MAX_TIMINGS = 20
"""The most timings of one name that are sent at a time. More would only cost datagrams."""

_Sending = tuple[Counter[str], dict[str, list[float]], dict[str, int]]


class Metrics:
    """Counts on the loop's thread and sends on its own, so an absent statsd delays no event.

    What is counted while statsd's name does not resolve is sent once it does. Counters are sent
    before timers, because Graphite may limit how many new series it creates at a time.
    """

    def __init__(self, host: str, port: int, prefix: str) -> None:
        self._address = (host, port, prefix)
        self._counts: Counter[str] = Counter()
        self._timings_ms: dict[str, list[float]] = defaultdict(list)
        self._gauges: dict[str, int] = {}
        self._sendings: queue.SimpleQueue[_Sending | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send_all, name="statsd", daemon=True)
        self._thread.start()

    def count(self, name: str, by: int = 1) -> None:
        """Add to a counter. Adding 0 makes it appear."""
        self._counts[name] += by

    def gauge(self, name: str, value: int) -> None:
        """Set a value, which stays until it is set again."""
        self._gauges[name] = value

    def timing(self, name: str, elapsed_s: float) -> None:
        """Record how long something took."""
        timings = self._timings_ms[name]
        if len(timings) < _MAX_TIMINGS:
            timings.append(elapsed_s * 1000)

    def send(self) -> None:
        """Pass what has been counted to the sending thread, unless it is still busy."""
        sending = self._counts, self._timings_ms, self._gauges
        if any(sending) and self._sendings.empty():
            self._sendings.put(sending)
            self._counts, self._timings_ms, self._gauges = Counter(), defaultdict(list), {}

    def close(self) -> None:
        """Send what is left, within half a second."""
        self._sendings.put((self._counts, self._timings_ms, self._gauges))
        self._sendings.put(None)
        self._thread.join(0.5)

    def _send_all(self) -> None:
        client: statsd.StatsClient | None = None
        resolved_s = 0.0
        unsent, gauges = Counter[str](), dict[str, int]()
        while (sending := self._sendings.get()) is not None:
            counts, timings_ms, latest = sending
            unsent.update(counts)
            gauges.update(latest)
            if client is None or time.monotonic() - resolved_s > _RESOLVE_EVERY_S:
                client, resolved_s = self._resolve(client), time.monotonic()
            if client is not None:
                with client.pipeline() as pipeline:
                    for name, by in unsent.items():
                        pipeline.incr(name, by)
                    for name, timings in timings_ms.items():
                        for elapsed_ms in timings:
                            pipeline.timing(name, elapsed_ms)
                    for name, value in gauges.items():
                        pipeline.gauge(name, value)
                unsent.clear()
                gauges.clear()
        if client is not None:
            client.close()

    def _resolve(self, client: statsd.StatsClient | None) -> statsd.StatsClient | None:
        host, port, prefix = self._address
        for ipv6 in (False, True):  # statsd's client resolves a name for only one of them.
            with contextlib.suppress(OSError, UnicodeError):
                found = statsd.StatsClient(host, port, prefix, maxudpsize=1432, ipv6=ipv6)
                if client is not None:
                    client.close()
                return found
        return client


# Outcomes.

_LINES_AT_ONCE = 10
"""Up to this many deliveries settled together get a line each; more get one line for all."""


class Outcome(enum.StrEnum):
    """How a delivery ended. The value is the suffix of its counter's name."""

    PROCESSED = "processed"
    SKIPPED = "processed_skipped"
    IGNORED = "ignored"
    CONFLICTED = "conflicted"
    INVALID = "invalid"
    REJECTED = "rejected"
    FAILED = "failed"
    RETRIED = "retried"
    RETURNED = "returned"


_SAY = {
    Outcome.PROCESSED: "processed",
    Outcome.SKIPPED: "skipped: a duplicate",
    Outcome.IGNORED: "ignored: no handler for its type",
    Outcome.CONFLICTED: "parked: its id was used before with another body",
    Outcome.INVALID: "parked: no valid event",
    Outcome.REJECTED: "parked: its handler rejected it",
    Outcome.FAILED: "parked: it failed once more than it is retried",
    Outcome.RETRIED: "failed: it comes back later",
}

_CALM = {Outcome.PROCESSED, Outcome.SKIPPED, Outcome.IGNORED}
"""Logged at INFO. The others may need an operator, and are logged at WARNING."""


class Tally:
    """Counts outcomes, and logs a few singly and many together."""

    def __init__(self, noun: str, metrics: Metrics, log: FilteringBoundLogger) -> None:
        self._noun, self._metrics, self._log = noun, metrics, log
        self._lines: list[tuple[Outcome, Mapping[str, object]]] = []
        self._settled: Counter[str] = Counter()
        self._unlogged: Counter[str] = Counter()
        self.open_breakers = 0
        for name in ("received", *Outcome):
            self.count(name, 0)

    def count(self, name: str, by: int = 1) -> None:
        """Add to one of the service's counters, whose names start with its noun."""
        self._metrics.count(f"{self._noun}_{name}", by)

    def timing(self, name: str, elapsed_s: float) -> None:
        """Record how long a step took."""
        self._metrics.timing(f"{self._noun}_{name}", elapsed_s)

    def breakers(self, opened: int = 0) -> None:
        """Set the gauge of open circuit breakers after this many more have opened."""
        self.open_breakers += opened
        self._metrics.gauge(f"{self._noun}_breaker_open", self.open_breakers)

    def settled(self, outcome: Outcome, about: Event | dict[str, object]) -> None:
        """Count a settled delivery. ``about`` goes into its log line."""
        self._settled[outcome] += 1
        if len(self._lines) <= _LINES_AT_ONCE:
            self._lines.append((outcome, about.about if isinstance(about, Event) else about))

    def returned(self, deliveries: int) -> None:
        """Count deliveries that were requeued when their channel closed."""
        self.count(Outcome.RETURNED, deliveries)
        if deliveries:
            self._log.warning(
                "deliveries went back to the broker and will come again", deliveries=deliveries
            )

    def flush(self, *, log: bool = True) -> None:
        """Count what has been settled since the last call; log it too, unless that can wait."""
        for outcome, number in self._settled.items():
            self.count(outcome, number)
        self._unlogged.update(self._settled)
        self._settled.clear()
        if not log:
            return
        if len(self._lines) <= _LINES_AT_ONCE:
            for outcome, about in self._lines:
                say = self._log.info if outcome in _CALM else self._log.warning
                say(_SAY[outcome], **about)
        elif self._unlogged.keys() <= _CALM:
            self._log.info("settled a batch", **self._unlogged)
        else:
            self._log.warning("settled a batch", **self._unlogged)
        self._unlogged.clear()
        self._lines.clear()


# Duplicates.

READ_EVERY_S = 1.0
BOUNDS_S = {text: duration_s(text) for text in ["1s", "10s", "1m", "10m", "1h", "6h", "1d", "7d"]}


class DuplicateAges:
    """How long after its record a duplicate arrives, which ``DEDUP_WINDOW`` has to outlast.

    It counts the duplicates since the start of this process. Ages are in seconds, and compare the
    clock of this process, ``now_s``, with that of the record's writer. If the cache knows a
    duplicate, its record has to be read for the age; this is done at most once a second.
    """

    def __init__(
        self, ledger: Ledger, tally: Tally, now_s: Callable[[], float], tasks: asyncio.TaskGroup
    ) -> None:
        self._ledger, self._tally, self._now_s, self._tasks = ledger, tally, now_s, tasks
        self._due_s = 0.0
        self.document: dict[str, Any] = {
            "read": 0,
            "oldest_s": 0.0,
            "within": dict.fromkeys(BOUNDS_S, 0),
        }
        """How many ages were ``read``, how many were ``within`` each bound, and the ``oldest_s``.

        It is replaced and never changed in place, so any thread may read it.
        """

    def known(self, key: bytes) -> None:
        """Take note of a duplicate that the cache knows."""
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._due_s:
            self._due_s = now_s + READ_EVERY_S
            self._tasks.create_task(self._look(key))

    async def _look(self, key: bytes) -> None:
        with contextlib.suppress(EtcdError):
            self.met(await self._ledger.read(key))

    def met(self, record: Record | None) -> None:
        """Take note of a duplicate by its record. One in another format has no time."""
        if record is None or record.state != DONE:
            return
        try:
            written_s = datetime.fromisoformat(record.time).timestamp()
        except (ValueError, OverflowError):
            return
        age_s = max(0.0, self._now_s() - written_s)
        self._tally.timing("duplicate_age", age_s)
        within = self.document["within"].items()
        self.document = {
            "read": self.document["read"] + 1,
            "oldest_s": max(self.document["oldest_s"], round(age_s, 3)),
            "within": {name: number + (age_s <= BOUNDS_S[name]) for name, number in within},
        }
