"""The leases: one bounds how long records are kept, the other how long claims are held."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

from etcd3.etcdrpc import LeaseGrantRequest, LeaseKeepAliveRequest

from .etcd import CALL_TIMEOUT_S

MIN_CLAIM_TTL_S = 15

LONGEST_CALL_S = 3_000_000_000
"""A claim's lease is three times as long as its call, and etcd's MaxLeaseTTL is 9e9 s."""

_BUCKET_RECORDS = 10_000
"""Records under one lease. When it ends, etcd deletes them all in one step and does nothing else
meanwhile: measured 27 ms for 10,000, 571 ms for 200,000."""

AskUntilKnown = Callable[[str, Callable[[], Any]], Awaitable[Any]]
"""``EtcdLedger.ask``: makes and sends a request until etcd has answered it."""

Clock = Callable[[], float]


class _Lease:
    """A lease that is shared by many records and replaced when it is used up.

    It is used for up to ``most_records`` records, and while more than ``least_s`` of it are left.
    """

    def __init__(
        self, ask: AskUntilKnown, clock: Clock, ttl_s: int, least_s: int, most_records: float
    ) -> None:
        self._ask, self._clock, self._ttl_s = ask, clock, ttl_s
        self._least_s, self._most_records = least_s, most_records
        self._granting = asyncio.Lock()
        # The id and the end in one value, because other threads read them.
        self._lease, self._records_left = (0, 0.0), 0.0

    def remaining_s(self, lease: int) -> float:
        """Return for how long, at least, etcd keeps what is under this lease. Any thread.

        It is 0 for a lease that has been given up or replaced.
        """
        current, ends_s = self._lease
        return ends_s - self._clock() if lease == current else 0.0

    async def take(self, records: int) -> int:
        """Return a lease for this many records, granting a new one if necessary.

        If there are no records, or they are kept for ever, it is 0, which means "no lease" to etcd.
        """
        if not records or not self._ttl_s:
            return 0
        async with self._granting:
            # A lease that was granted late may already have too little time left.
            while self._records_left < records or self._lease[1] - self._clock() <= self._least_s:
                await self._grant()
            self._records_left -= records
            return self._lease[0]

    def give_up(self) -> None:
        """Stop using the current lease: it has ended, or is to end."""
        self._lease = (0, 0.0)

    async def _grant(self) -> None:
        self._lease = await self._send("LeaseGrant", LeaseGrantRequest(TTL=self._ttl_s))
        self._records_left = self._most_records
        # If etcd is slow, a short lease would always come too late to be used.
        late_s = self._clock() + self._least_s - self._lease[1]
        if late_s >= 0:
            # Beyond etcd's time-out, it was this process that was suspended or blocked.
            self._ttl_s += math.ceil(min(late_s, CALL_TIMEOUT_S)) + 1

    async def _send(self, method: str, request: Any) -> tuple[int, float]:
        """Return a lease and its end, counted from the sending: at etcd it begins later."""
        sent_s = 0.0

        def make() -> Any:
            nonlocal sent_s
            sent_s = self._clock()
            return request

        reply = await self._ask(method, make)
        return reply.ID, sent_s + reply.TTL


class WindowLease(_Lease):
    """The lease that keeps each record for at least the window, or for ever if that is 0."""

    def __init__(self, ask: AskUntilKnown, clock: Clock, window_s: int) -> None:
        # A lease takes new records for a tenth of the window, at most ten minutes.
        ttl_s = window_s and window_s + max(1, min(600, window_s // 10))
        super().__init__(ask, clock, ttl_s, window_s, _BUCKET_RECORDS)


class ClaimLease(_Lease):
    """The lease of the process's claims, kept alive from the first claim until it is given up.

    It lasts three times the longest call and is renewed after a third of that, so while etcd
    answers, twice that call's time is left. A call only starts if the lease outlasts its time-out,
    so calls under way end in time even if the lease is given up.
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
