"""The bounded cache of done records, kept up to date by an import and a watch on deletions.

A hit is authoritative; a miss means: ask etcd.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Any

from etcd3.etcdrpc import RangeRequest, WatchCreateRequest, WatchRequest
from google.protobuf.unknown_fields import UnknownFieldSet
from structlog.typing import FilteringBoundLogger

from .etcd import Client, EtcdError, Failure, prefix_end
from .records import digest_if_done
from .system import System, reconnect_wait

IMPORT_AFTER_S = 0.5
"""The import waits, so that what is in the queue at the start is recorded first. For the first page
etcd walks all the keys under a lock that blocks writes, and the other pages take CPU."""

PAGE_TIMEOUT_S = 60.0
"""For the first page etcd walks all the keys. With tens of millions of them that takes longer than
the deadline of other calls. gRPC's pings detect a member that has vanished."""

# A watch that fails this often in a row, each time this soon and at the same revision, is stuck.
# One that stayed open for longer is not: etcd sends what a watch has missed at once.
_STUCK_AFTER, _SOON_S = 5, 10.0

MAX_ENTRIES = 1 << 21

_ENTRY_BYTES = 16
_ENTRIES_A_BLOCK = 32
_MOST_BLOCKS = 1 << 16  # A block's number is taken from two bytes.
_NOBODYS = b"no event has it."  # The fingerprint of a digest that is not ours.


def _fingerprint(digest: str) -> bytes:
    """Return the 16 bytes of a record's digest. The digest covers the event's id too."""
    try:
        entry = bytes.fromhex(digest[2:])
    except ValueError:
        return _NOBODYS
    return entry if len(entry) == _ENTRY_BYTES else _NOBODYS


class Cache:
    """Fingerprints of done records, at most ``max_entries``; the oldest are forgotten first.

    Each is stored in one of many blocks of bytes, chosen by its first two bytes, which are as good
    as random. A full block forgets its oldest entry, so some are forgotten before every block is
    full. A million fingerprints take 26 bytes each (measured); in a set they would take 114.
    """

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self.max_entries = max_entries
        blocks = 1 << max(0, (max_entries // _ENTRIES_A_BLOCK).bit_length() - 1)
        self._mask = min(blocks, _MOST_BLOCKS) - 1
        self._block_bytes = _ENTRY_BYTES * max(1, max_entries // (self._mask + 1))
        self._deleted_revision = 0
        self.clear()

    def __len__(self) -> int:
        return sum(map(len, self._blocks)) // _ENTRY_BYTES

    def holds(self, digest: str) -> bool:
        """Return whether a record with this digest is known to be done."""
        entry = _fingerprint(digest)
        block = self._blocks[(entry[0] | entry[1] << 8) & self._mask]
        # Every event passes through here. Most are new, and for those this saves a call.
        return block.find(entry) >= 0 and _position(block, entry) >= 0

    def add(self, digest: str, revision: int = 0) -> None:
        """Remember a record that was done at this revision of etcd, or is done now if that is 0.

        If the watch has seen a later deletion, that may have been this record, which is then not
        remembered.
        """
        if revision and revision < self._deleted_revision:
            return
        entry = _fingerprint(digest)
        number = (entry[0] | entry[1] << 8) & self._mask
        block = self._blocks[number]
        if block.find(entry) < 0 or _position(block, entry) < 0:
            if len(block) == self._block_bytes:
                block = block[_ENTRY_BYTES:]
            self._blocks[number] = block + entry

    def discard_all(self, digests: Iterable[str], revision: int = 0) -> None:
        """Forget records that etcd has deleted up to this revision."""
        self._deleted_revision = max(self._deleted_revision, revision)
        for entry in map(_fingerprint, digests):
            number = (entry[0] | entry[1] << 8) & self._mask
            block = self._blocks[number]
            position = _position(block, entry)
            if position >= 0:
                self._blocks[number] = block[:position] + block[position + _ENTRY_BYTES :]

    def clear(self, revision: int = 0) -> None:
        """Forget everything, and from now on accept nothing older than this revision."""
        self._deleted_revision = max(self._deleted_revision, revision)
        self._blocks = [b""] * (self._mask + 1)


def _position(block: bytes, entry: bytes) -> int:
    # Negative if it is not there. The same bytes may also be found across two other entries.
    position = block.find(entry)
    while position > 0 and position % _ENTRY_BYTES:
        position = block.find(entry, position + 1)
    return position


class Follower:
    """Imports the records under a prefix into a cache, then watches for deletions.

    The import stops when the cache is full. New records of other replicas are not followed: for
    the first duplicate of each, etcd is asked. Deletions are, so that an event is new again when
    its window has passed, or an operator has deleted its record.
    """

    def __init__(
        self, cache: Cache, prefix: bytes, client: Client, system: System, log: FilteringBoundLogger
    ) -> None:
        self._cache, self._prefix, self._client = cache, prefix, client
        self._backoff, self._log = reconnect_wait(system.random), log
        self._next_revision = 0  # The first one that has not been watched; 0: import first.
        self._stuck, self._opened_s = 0, 0.0

    async def run(self, revision: int = 0) -> None:
        """Import as of a revision (0: now), then watch, until cancelled. Failures are retried."""
        wait_s = IMPORT_AFTER_S
        while True:
            await asyncio.sleep(wait_s)
            try:
                if not self._next_revision:
                    await self._import(revision)
                await self._watch()
            except EtcdError as error:
                self._failed(error)
                revision, wait_s = 0, self._backoff.next_s()

    def _failed(self, error: EtcdError) -> None:
        """Decide whether the watch can resume where it was, or everything has to be imported."""
        if asyncio.get_running_loop().time() - self._opened_s > _SOON_S:
            self._stuck = 0
        if stuck := self._stuck >= _STUCK_AFTER:
            self._log.warning(
                "the watch on deleted records makes no progress: all records are imported again",
                error=str(error),
                revision=self._next_revision,
            )
        if stuck or error.failure is Failure.COMPACTED or not self._next_revision:
            self._next_revision = self._stuck = 0
            # While nothing was watched, records may have been deleted.
            self._cache.clear()

    async def _import(self, revision: int) -> None:
        imported, of, pages = 0, 0, Pages(self._prefix, revision)
        started_s = asyncio.get_running_loop().time()
        # In a full cache each new entry would replace another.
        while pages.request is not None and imported < self._cache.max_entries:
            try:
                reply = await self._client.call("Range", pages.request, PAGE_TIMEOUT_S)
            except EtcdError as error:
                pages.failed(error)
                continue
            pages.took(reply)
            if not revision:
                revision = pages.revision
                # What was added since the last watch may have been deleted in between.
                self._cache.clear(revision)
            of = of or reply.count  # The first page's range has all the records.
            for digest in _digests_of_done(kv.value for kv in reply.kvs):
                self._cache.add(digest)
                imported += 1
        self._next_revision = revision + 1
        self._log.info(
            "records imported: their duplicates are skipped at once",
            records=imported,
            of=of,
            seconds=round(asyncio.get_running_loop().time() - started_s, 3),
        )

    async def _watch(self) -> None:
        """Forget what is deleted, until the watch ends with an EtcdError."""
        create = WatchCreateRequest(
            key=self._prefix,
            range_end=prefix_end(self._prefix),
            prev_kv=True,
            start_revision=self._next_revision,
            filters=[WatchCreateRequest.NOPUT],
            progress_notify=True,
        )
        create.MergeFromString(_IN_FRAGMENTS)
        async for reply in self._client.watch(WatchRequest(create_request=create)):
            if reply.created:
                self._stuck += 1
                self._opened_s = asyncio.get_running_loop().time()
                continue
            if reply.events:
                deleted = [event.prev_kv.value for event in reply.events]
                revision = reply.events[-1].kv.mod_revision
                if all(deleted):
                    self._cache.discard_all(_digests_of_done(deleted), revision)
                else:  # A value has been compacted away, so its fingerprint is not known.
                    self._cache.clear(revision)
                # The rest of the revision may follow in another fragment.
                next_revision = revision + (not _is_fragment(reply))
            else:  # Progress: everything up to this revision has been sent.
                self._stuck, next_revision = 0, reply.header.revision + 1
            if next_revision > self._next_revision:
                self._next_revision, self._stuck = next_revision, 0


def _digests_of_done(values: Iterable[bytes]) -> Iterator[str]:
    return filter(None, map(digest_if_done, values))


_IN_FRAGMENTS = b"\x40\x01"
"""``WatchCreateRequest.fragment`` (field 8), which etcd3's messages lack. Without it etcd sends all
deletions of a revision in one reply, which may be larger than gRPC's limit."""

_FRAGMENT = 7  # ``WatchResponse.fragment``, which they lack too: more of this reply follows.


def _is_fragment(reply: Any) -> bool:
    unknown: Any = UnknownFieldSet(reply)
    return any(field.field_number == _FRAGMENT and field.data for field in unknown)


# The pages of an import.

PAGE_RECORDS = 5_000
_SAMPLED = 100  # Every 100th key of a page is looked at for the bytes that keys are made of.
_DIGITS = 136  # An id has fewer bytes in its key: at most 128, and a NUL after a page.


class Pages:
    """Requests that together return each key with a prefix once, all as of one revision.

    For every page etcd walks and counts the whole range, so the pages are sub-ranges: each is as
    wide as the last full page, and twice as wide after one that was not half full. ``revision`` is
    that of the first reply, if none is given.

    A width is the difference of two keys, read as numbers whose digits are the bytes seen in keys.
    In base 256 keys would be clustered with wide gaps between them, because most ids are made of
    digits and letters. A byte not seen yet counts as the next one that was, so a width may be
    wrong; the page is still valid.
    """

    def __init__(self, prefix: bytes, revision: int = 0) -> None:
        self._prefix, self._start, self._end = prefix, prefix, prefix_end(prefix)
        self._stop, self._limit, self.revision = self._end, PAGE_RECORDS, revision
        self._width, self._bytes = 0, [0]

    @property
    def request(self) -> Any:
        """The next request, or None after the last one."""
        if self._start >= self._end:
            return None
        return RangeRequest(
            key=self._start, range_end=self._stop, limit=self._limit, revision=self.revision
        )

    def failed(self, error: EtcdError) -> None:
        """Ask for smaller pages if the reply was too large; otherwise raise the error."""
        self._limit //= 8
        if error.failure is not Failure.TOO_LARGE or not self._limit:
            raise error

    def took(self, reply: Any) -> None:
        """Go on to the next request after this reply."""
        self.revision = self.revision or reply.header.revision
        if reply.more:
            sample = (kv.key[len(self._prefix) :] for kv in reply.kvs[::_SAMPLED])
            self._bytes = sorted({*self._bytes}.union(*sample))
            first, last = reply.kvs[0].key, reply.kvs[-1].key
            self._width = max(1, self._number(last) - self._number(first))
            self._start = last + b"\0"
        else:
            self._width *= 1 if len(reply.kvs) > self._limit // 2 else 2
            self._start = self._stop
        number, width = self._number(self._start), self._width
        while (stop := self._key(number + width)) <= self._start < self._end:
            width *= 2
        self._stop = stop

    def _number(self, key: bytes) -> int:
        number, base = 0, len(self._bytes)
        for byte in key[len(self._prefix) :][:_DIGITS].ljust(_DIGITS, b"\0"):
            number = number * base + min(bisect_left(self._bytes, byte), base - 1)
        return number

    def _key(self, number: int) -> bytes:
        digits, base = bytearray(_DIGITS), len(self._bytes)
        for position in reversed(range(_DIGITS)):
            number, digit = divmod(number, base)
            digits[position] = self._bytes[digit]
        return self._end if number else self._prefix + bytes(digits)
