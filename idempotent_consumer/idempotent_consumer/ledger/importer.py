"""Fills the cache from etcd: the records there at the start, and later what is deleted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol

from structlog.typing import FilteringBoundLogger

from ..loop import Loop
from ..policies import RECONNECT, Backoff
from . import messages as m
from .cache import Cache, fingerprint
from .etcd import Answered, EtcdError, Failure, begin
from .keyspace import Pages
from .records import digest_if_done

BEGIN_AFTER_S = 0.5
"""What waits in the queue at the start is recorded first: etcd's first page walks all the keys,
under a lock that writes wait for, and the rest takes CPU."""


class Reader(Protocol):
    """The part of etcd's client that is used here."""

    def call(self, method: str, request: Any, answered: Answered) -> None:
        """Send a request and return at once."""
        ...

    def watch(self, request: Any) -> Iterator[Any]:
        """Open a watch and iterate over its replies; blocks. Raises EtcdError."""
        ...


class Importer:
    """Reads all records at one revision, beside the consuming, and then watches the deletions.

    It ends early where the cache is full. Records that other replicas write are not followed: the
    first duplicate of each asks etcd once. Deletions are, so that an event whose record has gone
    (its window has passed, or an operator has deleted it) is new again.
    """

    def __init__(
        self,
        prefix: str,
        etcd: Reader,
        cache: Cache,
        loop: Loop,
        log: FilteringBoundLogger,
        revision: int = 0,
        begin_after_s: float = BEGIN_AFTER_S,
    ) -> None:
        """Begin soon, with the records as of a revision, or 0 for the present one."""
        self._prefix = prefix.encode()
        self._end = m.prefix_end(self._prefix)
        self._etcd, self._cache, self._loop, self._log = etcd, cache, loop, log
        self._begin_after_s, self._revision, self._next_revision = begin_after_s, revision, 0
        self._stopping = threading.Event()
        threading.Thread(target=self._run, name="import", daemon=True).start()

    def close(self) -> None:
        """Stop; the stream under way ends with its channel."""
        self._stopping.set()

    def _run(self) -> None:
        backoff, wait_s = Backoff(RECONNECT), self._begin_after_s
        while not self._stopping.wait(wait_s):
            try:
                self._import_and_watch()
            except EtcdError as error:
                self._failed(error)
                wait_s = backoff.next_s()

    def _import_and_watch(self) -> None:
        if not self._next_revision:
            self._import()
        self._watch()

    def _failed(self, error: EtcdError) -> None:
        """Go on from where the watch was, or import anew, what is there then."""
        if error.failure is Failure.COMPACTED:
            self._next_revision = 0
        if not self._next_revision:
            self._revision = 0
            # What has been imported may be gone since, unwatched.
            self._loop.call_soon(self._cache.clear)

    def _import(self) -> None:
        imported = of = 0
        started_s = self._loop.now_s()
        for reply in self._pages():
            of = of or reply.count  # The first page's range, and so its count, is all there is.
            found = [
                fingerprint(digest) for kv in reply.kvs if (digest := digest_if_done(kv.value))
            ]
            imported += len(found)
            self._loop.call_soon(partial(self._cache.add_all, found))
            if imported >= self._cache.max_entries:
                break  # One more would push out another.
        self._next_revision = self._revision + 1
        self._log.info(
            "records imported: their duplicates are skipped at once",
            records=imported,
            of=of,
            seconds=round(self._loop.now_s() - started_s, 3),
        )

    def _pages(self) -> Iterator[Any]:
        """Yield replies that together hold each record once, all of one revision.

        While a page is worked on, etcd is at the next.
        """
        pages = Pages(self._prefix, self._revision)
        wait = begin(self._etcd.call, "Range", pages.request)
        while True:
            reply = wait()
            pages.took(reply)
            self._revision = pages.revision
            if pages.request is None or self._stopping.is_set():
                yield reply
                return
            wait = begin(self._etcd.call, "Range", pages.request)
            yield reply

    def _watch(self) -> None:
        create = m.WatchCreateRequest(
            key=self._prefix,
            range_end=self._end,
            prev_kv=True,
            start_revision=self._next_revision,
            filters=[m.WatchCreateRequest.NOPUT],
            progress_notify=True,
        )
        for reply in self._etcd.watch(m.WatchRequest(create_request=create)):
            if reply.events:
                self._forget(reply.events)
                self._next_revision = reply.events[-1].kv.mod_revision + 1
            elif not reply.created:  # Progress: nothing is outstanding up to this revision.
                self._next_revision = reply.header.revision + 1

    def _forget(self, events: Any) -> None:
        values = [event.prev_kv.value for event in events]
        if not all(values):
            # The deleted value was compacted away, so which fingerprint it had is not known.
            self._loop.call_soon(self._cache.clear)
            return
        gone = [fingerprint(digest) for value in values if (digest := digest_if_done(value))]
        if gone:
            self._loop.call_soon(partial(self._cache.discard_all, gone))
