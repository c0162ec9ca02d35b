"""Fills the cache from etcd: the records there at the start, and later what is deleted."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol

from structlog.typing import FilteringBoundLogger

from ..loop import Loop
from ..policies import RECONNECT, until_stopped
from . import messages as m
from .cache import Cache, fingerprint
from .etcd import EtcdError, Failure
from .records import DONE, decode

PAGE_RECORDS = 5_000


class Reader(Protocol):
    """The blocking part of etcd's client. Both raise EtcdError."""

    def call_and_wait(self, method: str, request: Any) -> Any:
        """Send a request and return its reply."""
        ...

    def watch(self, request: Any) -> Iterator[Any]:
        """Open a watch and iterate over its replies."""
        ...


class Importer:
    """Reads all records at one revision, beside the consuming, and then watches the deletions.

    Records that other replicas write are not followed: the first duplicate of each asks etcd
    once. Deletions are, so that an event whose record has gone (its window has passed, or an
    operator has deleted it) is new again.
    """

    def __init__(
        self, prefix: str, etcd: Reader, cache: Cache, loop: Loop, log: FilteringBoundLogger
    ) -> None:
        self._prefix = prefix.encode()
        self._etcd, self._cache, self._loop, self._log = etcd, cache, loop, log
        self._next_revision = 0
        self._stopping = threading.Event()
        threading.Thread(target=self._run, name="import", daemon=True).start()

    def close(self) -> None:
        """Stop; the stream under way ends with its channel."""
        self._stopping.set()

    def _run(self) -> None:
        with contextlib.suppress(EtcdError):  # The last one, once it is stopping.
            for attempt in until_stopped(RECONNECT, self._stopping, EtcdError):
                with attempt:
                    self._import_and_watch()

    def _import_and_watch(self) -> None:
        try:
            if not self._next_revision:
                self._import()
            self._watch()
        except EtcdError as error:
            if error.failure is Failure.COMPACTED:
                self._next_revision = 0
            raise

    def _import(self) -> None:
        imported = revision = 0
        # What an attempt before this one added may be gone since, unwatched.
        self._loop.call_soon(self._cache.clear)
        for reply in self._pages():
            revision = revision or reply.header.revision
            found = [
                fingerprint(record.digest)
                for kv in reply.kvs
                if (record := decode(kv.value, kv.mod_revision)).state == DONE
            ]
            imported += len(found)
            self._loop.call_soon(partial(self._cache.add_all, found))
        self._next_revision = revision + 1
        self._log.info("records imported: their duplicates are skipped at once", records=imported)

    def _pages(self) -> Iterator[Any]:
        """Yield replies that together hold each record once, all of one revision.

        etcd walks and counts a whole range for every page of it, so the pages are sub-ranges:
        keys are read as numbers, and each step is as wide as the last page was, doubled where it
        came back with room to spare.
        """
        end = m.prefix_end(self._prefix)
        start, width, revision = self._prefix, 0, 0
        while start < end and not self._stopping.is_set():
            stop = min(end, _plus(start, width)) if width else end
            reply = self._etcd.call_and_wait("Range", m.RangeRequest(
                key=start, range_end=stop, limit=PAGE_RECORDS, revision=revision
            ))
            revision = revision or reply.header.revision
            yield reply
            if reply.more:
                width = max(1, _number(reply.kvs[-1].key) - _number(start))
                start = reply.kvs[-1].key + b"\0"
            else:
                width *= 1 if len(reply.kvs) > PAGE_RECORDS // 2 else 2
                start = stop

    def _watch(self) -> None:
        create = m.WatchCreateRequest(
            key=self._prefix, range_end=m.prefix_end(self._prefix), prev_kv=True,
            start_revision=self._next_revision, filters=[m.WatchCreateRequest.NOPUT],
            progress_notify=True,
        )
        for reply in self._etcd.watch(m.WatchRequest(create_request=create)):
            if reply.events:
                self._forget(reply.events)
                self._next_revision = reply.events[-1].kv.mod_revision + 1
            elif not reply.created:  # Progress: nothing is outstanding up to this revision.
                self._next_revision = reply.header.revision + 1

    def _forget(self, events: Any) -> None:
        gone = [
            fingerprint(decode(event.prev_kv.value, 0).digest)
            for event in events
            if event.prev_kv.value
        ]
        if len(gone) < len(events):
            # The deleted value was compacted away, so which fingerprint it had is not known.
            self._loop.call_soon(self._cache.clear)
        elif gone:
            self._loop.call_soon(partial(self._cache.discard_all, gone))


_NUMBER_BYTES = 208
"""No record key is longer: at most 73 bytes of prefix, 128 of id, and the NUL after a page."""


def _number(key: bytes) -> int:
    return int.from_bytes(key[:_NUMBER_BYTES].ljust(_NUMBER_BYTES, b"\0"), "big")


def _plus(key: bytes, width: int) -> bytes:
    total = min(_number(key) + width, (1 << 8 * _NUMBER_BYTES) - 1)
    return total.to_bytes(_NUMBER_BYTES, "big")
