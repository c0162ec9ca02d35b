"""A history that grows, and everything that is measured at each of its sizes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

from harness.process import Child
from harness.servers import Servers
from harness.statsd import StatsdListener
from harness.wait import eventually, stands_still

from .gauges import Gauges, read_gauges
from .history import History
from .loading import Loader
from .preparing import channel
from .progress import Rate, follow, rate
from .records import Records
from .startup import NEW, Start, measure_start, new_body, wait_imported
from .subjects import LARGE, bare

DUPLICATES = 5_000
SKIPPED = "events_processed_skipped"


class Repeats(NamedTuple):
    """Duplicates of what was imported: how many came, and what etcd was asked for them."""

    events: int
    transactions: int


class Grown(NamedTuple):
    """All that is measured at one size."""

    records: int
    etcd: Gauges
    starts: Sequence[Start]
    repeats: Repeats
    rate: Rate


class Growth:
    """The servers, the service, and the history between them."""

    def __init__(self, servers: Servers, statsd: StatsdListener, starts: int, events: int) -> None:
        self._servers, self._statsd = servers, statsd
        self._starts, self._events = starts, events
        self._subject = bare(servers, {**LARGE, **statsd.settings()})
        self._history = History(servers, self._subject.queue)

    def measure(self, size: int) -> Grown:
        """Let the history grow to that size and measure everything at it."""
        print(f"{size:,} records", file=sys.stderr)
        Records(self._servers.etcd).clear(self._subject.records[0] + NEW)
        self._history.grow(size)
        with channel(self._servers) as declaring:
            self._subject.declare(declaring)
        starts = [measure_start(self._servers, self._subject) for _ in range(self._starts)]
        # Not before: the pages that a write frees count as used until the next one.
        etcd = read_gauges(self._servers.etcd)
        with self._subject.process() as child:
            child.start()
            wait_imported(child)
            repeats = self._repeat()
            measured = self._rate(child)
        return Grown(size, etcd, starts, repeats, measured)

    def deletion_bytes(self) -> float:
        """Delete all records, and return what each deletion adds to etcd's file, in bytes."""
        etcd = self._servers.etcd

        def used_now() -> int:
            # What is in use changes once etcd has written to its file, every 0.1 s.
            return stands_still(lambda: read_gauges(etcd).used)

        before = used_now()
        deleted, _ = Records(etcd).delete(self._subject.records[0])
        return (used_now() - before) / deleted

    def close(self) -> None:
        """Close the connection to etcd."""
        self._history.close()

    def _repeat(self) -> Repeats:
        """Publish duplicates from all over the history, and count what etcd is asked meanwhile."""
        bodies = self._history.sample(DUPLICATES)
        if not bodies:
            return Repeats(0, 0)
        asked, skipped = self._transactions(), self._statsd.count(SKIPPED)
        Loader(self._servers.rabbitmq.url, self._subject.queue, bodies).run()

        def all_skipped() -> None:
            if (count := self._statsd.count(SKIPPED) - skipped) != len(bodies):
                raise AssertionError(f"{count} of {len(bodies)} duplicates skipped")

        eventually(all_skipped)
        return Repeats(len(bodies), self._transactions() - asked)

    def _transactions(self) -> int:
        return read_gauges(self._servers.etcd).transactions

    def _rate(self, child: Child) -> Rate:
        """Return the rate of new events: they are published while the service is frozen."""
        bodies = [new_body() for _ in range(self._events)]
        child.pause()
        Loader(self._servers.rabbitmq.url, self._subject.queue, bodies).run()
        child.resume()
        with channel(self._servers) as asking:
            return rate(follow(asking, self._subject.queue, child), len(bodies))
