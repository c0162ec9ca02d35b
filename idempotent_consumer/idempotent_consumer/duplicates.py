"""How long after its record a duplicate comes: what ``DEDUP_WINDOW`` has to outlast."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from datetime import datetime
from itertools import accumulate
from types import MappingProxyType
from typing import Any, Protocol

from .ledger.records import DONE, Record
from .loop import Loop

READ_EVERY_S = 1.0
BOUNDS_S = MappingProxyType(
    {
        "1s": 1,
        "10s": 10,
        "1m": 60,
        "10m": 600,
        "1h": 3600,
        "6h": 21_600,
        "1d": 86_400,
        "7d": 604_800,
    }
)
_BOUNDS = list(BOUNDS_S.values())


class Reading(Protocol):
    """The part of a ledger that is needed here."""

    def read(self, key: bytes, found: Callable[[Record | None], None]) -> None:
        """Read a record once; nothing is called where etcd does not answer."""
        ...


class DuplicateAges:
    """The ages of the duplicates whose record was read, in seconds, of this process's life.

    A duplicate that etcd was asked about comes with its record. One that the cache knows does
    not, and the record is read for it: for each where there are few, for one a second where
    there are many. The ages compare the clock of this process with that of the record's writer.
    """

    def __init__(self, ledger: Reading, loop: Loop, timed: Callable[[float], None]) -> None:
        self._ledger, self._loop, self._timed = ledger, loop, timed
        self._due_s = loop.now_s()
        self._oldest_s = 0.0
        # By the first bound that they are within; the last is of those that are within none.
        self._ages = [0] * (len(BOUNDS_S) + 1)

    @property
    def document(self) -> dict[str, Any]:
        """``read`` ages, how many of them were ``within`` each bound, and the ``oldest_s``.

        Any thread may ask: it is made of one copy of the counts.
        """
        *within, read = accumulate(list(self._ages))
        return {
            "read": read,
            "oldest_s": round(self._oldest_s, 3),
            "within": dict(zip(BOUNDS_S, within, strict=True)),
        }

    def known(self, key: bytes) -> None:
        """Note a duplicate that is skipped without asking etcd."""
        now_s = self._loop.now_s()
        if now_s >= self._due_s:
            self._due_s = now_s + READ_EVERY_S
            self._ledger.read(key, self.met)

    def met(self, record: Record | None) -> None:
        """Note a duplicate whose record has been read; one that nobody here wrote has no time."""
        if record is None or record.state != DONE:
            return
        try:
            written_s = datetime.fromisoformat(record.time).timestamp()
        except (ValueError, OverflowError):
            return
        age_s = max(0.0, time.time() - written_s)
        self._timed(age_s)
        self._oldest_s = max(self._oldest_s, age_s)
        self._ages[bisect_left(_BOUNDS, age_s)] += 1
