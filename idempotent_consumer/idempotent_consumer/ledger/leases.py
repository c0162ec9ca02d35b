"""The two leases: one that bounds how long records are kept, one that bounds claims."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..loop import Loop
from . import messages as m
from .calls import Calls

MIN_CLAIM_TTL_S = 15

_BUCKET_RECORDS = 10_000
"""Records under one lease. Its end deletes them in one step, in which etcd does nothing else:
measured 27 ms for 10,000, 571 ms for 200,000."""


def _bucket_s(window_s: int) -> int:
    """Return how long new records go to one lease: a tenth of the window, at most ten minutes."""
    return max(1, min(600, window_s // 10))


class WindowLease:
    """The lease for records that are done: each is kept for the window at least.

    One lease serves many records, bounded in time and in records. ``current`` is 0 where records
    are kept for good, which is how etcd writes "no lease".
    """

    def __init__(self, calls: Calls, loop: Loop, window_s: int) -> None:
        self._calls, self._loop, self._window_s = calls, loop, window_s
        self._id = 0
        self._usable_until_s = 0.0
        self._records_left = 0
        self._waiting: list[tuple[int, Callable[[], None]]] = []

    @property
    def current(self) -> int:
        """Return the id of the lease to put a record under now."""
        return self._id

    def usable(self, records: int, then: Callable[[], None]) -> None:
        """Call ``then`` once ``current`` is a lease with the whole window left for these records.

        That is at once but for the first batch of each bucket.
        """
        if self._window_s == 0 or (
            self._records_left >= records and self._loop.now_s() < self._usable_until_s
        ):
            self._records_left -= records
            then()
            return
        self._waiting.append((records, then))
        if len(self._waiting) == 1:
            self._grant()

    def lost(self) -> None:
        """Put nothing more under the current lease: etcd does not know it."""
        self._usable_until_s = 0.0

    def _grant(self) -> None:
        ttl_s = self._window_s + _bucket_s(self._window_s)
        self._calls.until_known("LeaseGrant", lambda: m.LeaseGrantRequest(TTL=ttl_s), self._granted)

    def _granted(self, reply: Any, sent_s: float) -> None:
        self._id = reply.ID
        self._usable_until_s = sent_s + reply.TTL - self._window_s
        self._records_left = _BUCKET_RECORDS
        waiting, self._waiting = self._waiting, []
        for records, then in waiting:
            self._records_left -= records
            then()


class ClaimLease:
    """The process's lease for its claims, kept alive from the first claim until it is given up.

    It lasts three times the longest call it covers and is renewed after a third of that, so a
    call that starts has twice its time left while etcd answers. Read from other threads, so the
    id and the end of the lease are one value.
    """

    def __init__(self, calls: Calls, loop: Loop, longest_call_s: float) -> None:
        self._calls, self._loop = calls, loop
        self._ttl_s = max(MIN_CLAIM_TTL_S, math.ceil(3 * longest_call_s))
        self._lease = (0, 0.0)
        self._waiting: list[Callable[[], None]] = []

    @property
    def current(self) -> int:
        """Return the id of the lease to put a claim under now."""
        return self._lease[0]

    def remaining_s(self, lease: int) -> float:
        """Return for how long a claim under this lease holds at the least. Any thread.

        That is no time for a lease given up: nobody keeps it alive.
        """
        current, ends_s = self._lease
        return ends_s - self._loop.now_s() if lease == current else 0.0

    def usable(self, then: Callable[[], None]) -> None:
        """Call ``then`` once there is a lease for a new claim."""
        if self.remaining_s(self.current) > 0:
            then()
            return
        self._waiting.append(then)
        if len(self._waiting) == 1:
            self._grant()

    def give_up(self) -> None:
        """Keep the current lease alive no more, so that every claim under it ends.

        The calls under way end within the time that it has left: they were started so. The id
        stays: 0 is no lease to etcd, and a claim put under it would never end.
        """
        self._lease = (self.current, 0.0)

    def _grant(self) -> None:
        self._calls.until_known(
            "LeaseGrant", lambda: m.LeaseGrantRequest(TTL=self._ttl_s), self._granted
        )

    def _granted(self, reply: Any, sent_s: float) -> None:
        self._lease = (reply.ID, sent_s + reply.TTL)
        self._keep_alive_later(reply.ID)
        waiting, self._waiting = self._waiting, []
        for then in waiting:
            then()

    def _keeps(self, lease_id: int) -> bool:
        current, ends_s = self._lease
        return lease_id == current and ends_s > 0

    def _keep_alive_later(self, lease_id: int) -> None:
        self._loop.call_later(self._ttl_s / 3, lambda: self._keep_alive(lease_id))

    def _keep_alive(self, lease_id: int) -> None:
        if self._keeps(lease_id):
            self._calls.until_known(
                "LeaseKeepAlive",
                lambda: m.LeaseKeepAliveRequest(ID=lease_id),
                lambda reply, sent_s: self._kept_alive(lease_id, reply, sent_s),
            )

    def _kept_alive(self, lease_id: int, reply: Any, sent_s: float) -> None:
        if not self._keeps(lease_id):
            return
        if reply.TTL <= 0:
            self.give_up()
            return
        self._lease = (lease_id, sent_s + reply.TTL)
        self._keep_alive_later(lease_id)
