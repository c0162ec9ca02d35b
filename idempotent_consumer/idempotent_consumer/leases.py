"""The two leases: one that bounds how long records are kept, one that bounds claims."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

from etcd3.etcdrpc import LeaseGrantRequest, LeaseKeepAliveRequest

from .etcd import CALL_TIMEOUT_S

MIN_CLAIM_TTL_S = 15

LONGEST_CALL_S = 3_000_000_000
"""Its claim's lease is three times as long. etcd grants none above its MaxLeaseTTL, 9e9 s."""

_BUCKET_RECORDS = 10_000
"""Records under one lease. Its end deletes them in one step, in which etcd does nothing else:
measured 27 ms for 10,000, 571 ms for 200,000."""

AskUntilKnown = Callable[[str, Callable[[], Any]], Awaitable[Any]]
"""The ledger's: makes and sends a request of a method until etcd has answered it."""

Clock = Callable[[], float]


class _Lease:
    """A lease that is granted when it is needed, counted by a clock, and shared by many records.

    It is taken for ``most_records``, while it has more than ``least_s`` left. Other threads read
    how much time is left, so the id and the end of the lease are one value.
    """

    def __init__(
        self, ask: AskUntilKnown, clock: Clock, ttl_s: int, least_s: int, most_records: float
    ) -> None:
        self._ask, self._clock, self._ttl_s = ask, clock, ttl_s
        self._least_s, self._most_records = least_s, most_records
        self._granting = asyncio.Lock()
        self._lease, self._records_left = (0, 0.0), 0.0

    def remaining_s(self, lease: int) -> float:
        """Return for how long what stands under this lease is kept at the least. Any thread.

        That is no time for a lease that has been given up or replaced.
        """
        current, ends_s = self._lease
        return ends_s - self._clock() if lease == current else 0.0

    async def take(self, records: int) -> int:
        """Return a lease for so many records: at once, but for the first of each lease.

        For no records, or where they are kept for good, it is 0: etcd's way to write "no lease".
        """
        if not records or not self._ttl_s:
            return 0
        async with self._granting:
            # One that was granted late may have too little time left already.
            while self._records_left < records or self._lease[1] - self._clock() <= self._least_s:
                await self._grant()
            self._records_left -= records
            return self._lease[0]

    def give_up(self) -> None:
        """Put nothing more under the current lease: it has ended at etcd, or is to end."""
        self._lease = (0, 0.0)

    async def _grant(self) -> None:
        self._lease = await self._send("LeaseGrant", LeaseGrantRequest(TTL=self._ttl_s))
        self._records_left = self._most_records
        # Where etcd is slow a short one would always come too late to be of use.
        late_s = self._clock() + self._least_s - self._lease[1]
        if late_s >= 0:
            # What is later than etcd can be was suspended meanwhile, or blocked.
            self._ttl_s += math.ceil(min(late_s, CALL_TIMEOUT_S)) + 1

    async def _send(self, method: str, request: Any) -> tuple[int, float]:
        """Return a lease and when it ends: counted from the sending, it began later."""
        sent_s = 0.0

        def make() -> Any:
            nonlocal sent_s
            sent_s = self._clock()
            return request

        reply = await self._ask(method, make)
        return reply.ID, sent_s + reply.TTL


class WindowLease(_Lease):
    """The lease for records that are done: each is kept for the window at least, of 0 for good."""

    def __init__(self, ask: AskUntilKnown, clock: Clock, window_s: int) -> None:
        # New records go to one lease for a tenth of the window, at most ten minutes.
        ttl_s = window_s and window_s + max(1, min(600, window_s // 10))
        super().__init__(ask, clock, ttl_s, window_s, _BUCKET_RECORDS)


class ClaimLease(_Lease):
    """The process's lease for its claims, kept alive from the first claim until it is given up.

    It lasts three times the longest call it covers and is renewed after a third of that, so a
    call that starts has twice its time left while etcd answers. Once it is given up, the calls
    under way end within the time that it has left: they were started so.
    """

    def __init__(
        self, ask: AskUntilKnown, clock: Clock, longest_call_s: float, tasks: asyncio.TaskGroup
    ) -> None:
        ttl_s = max(MIN_CLAIM_TTL_S, math.ceil(3 * longest_call_s))
        super().__init__(ask, clock, ttl_s, 0, math.inf)
        self._tasks = tasks

    async def _grant(self) -> None:
        await super()._grant()
        self._tasks.create_task(self._keep_alive(self._lease[0]))

    async def _keep_alive(self, lease: int) -> None:
        while self.remaining_s(lease) > 0:
            await asyncio.sleep(self._ttl_s / 3)
            if self._lease[0] == lease:
                renewed = await self._send("LeaseKeepAlive", LeaseKeepAliveRequest(ID=lease))
                if self._lease[0] == lease:
                    self._lease = renewed
