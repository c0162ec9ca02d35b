"""Where to cut a range of keys, so that its parts hold about equally many."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import Any

from . import messages as m

PAGE_RECORDS = 5_000
_SAMPLED = 100
"""One of so many keys tells which bytes keys are made of."""

_DIGITS = 136
"""No record's id is longer: at most 128 bytes in its key, and the NUL after a page."""


class KeySpace:
    """The keys with a prefix, measured as numbers whose digits are the bytes seen in keys.

    Read in base 256 they would lie in clusters, with wide gaps that no key is in: ids are made of
    digits and letters, mostly. A byte not seen counts as the next one that was, so the measure
    can be wrong; every cut is a valid one all the same.
    """

    def __init__(self, prefix: bytes) -> None:
        self._prefix, self._end = prefix, m.prefix_end(prefix)
        self._bytes = list(range(256))
        self._seen: set[int] = set()

    def learn(self, keys: Iterable[bytes]) -> None:
        """Take the bytes of these keys for digits too. All widths change by that."""
        self._seen.update(*(key[len(self._prefix) :] for key in keys))
        self._bytes = sorted(self._seen | {0})

    def width(self, first: bytes, last: bytes) -> int:
        """Return how far two keys lie apart, at least 1."""
        return max(1, self._number(last) - self._number(first))

    def cut(self, start: bytes, width: int) -> bytes:
        """Return a key behind ``start`` by about this width, or the end of all."""
        number = self._number(start)
        while (stop := self._key(number + width)) <= start:
            width *= 2
        return stop

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


class Pages:
    """Requests that together bring each key with a prefix once, all as of one revision.

    etcd walks and counts a whole range for every page of it, so the pages are sub-ranges: each is
    as wide as the last full page was, doubled where one came back with room to spare. ``request``
    is the next, None behind the last; ``revision`` is 0 until the first reply, where none is given.
    """

    def __init__(self, prefix: bytes, revision: int = 0) -> None:
        self._space, self._end = KeySpace(prefix), m.prefix_end(prefix)
        self._start, self._width, self.revision = prefix, 0, revision
        self.request: Any = self._range(self._end)

    def took(self, reply: Any) -> None:
        """Go on to the next request, by the reply to this one."""
        self.revision = self.revision or reply.header.revision
        if reply.more:
            self._space.learn(kv.key for kv in reply.kvs[::_SAMPLED])
            self._width = self._space.width(reply.kvs[0].key, reply.kvs[-1].key)
            self._start = reply.kvs[-1].key + b"\0"
        else:
            self._width *= 1 if len(reply.kvs) > PAGE_RECORDS // 2 else 2
            self._start = self.request.range_end
        more = self._start < self._end
        self.request = self._range(self._space.cut(self._start, self._width)) if more else None

    def _range(self, stop: bytes) -> Any:
        return m.RangeRequest(
            key=self._start, range_end=stop, limit=PAGE_RECORDS, revision=self.revision
        )
