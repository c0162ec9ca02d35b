"""The two leases: one that bounds how long records are kept, one that bounds claims."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

from etcd3.etcdrpc import LeaseGrantRequest, LeaseKeepAliveRequest

MIN_CLAIM_TTL_S = 15

_BUCKET_RECORDS = 10_000
"""Records under one lease. Its end deletes them in one step, in which etcd does nothing else:
measured 27 ms for 10,000, 571 ms for 200,000."""


AskUntilKnown = Callable[[str, Callable[[], Any]], Awaitable[Any]]
"""The ledger's: makes and sends a request of a method until etcd has answered it."""


class _Lease:
    """A lease that is asked for and counted by a clock."""

    def __init__(self, ask: AskUntilKnown, clock: Callable[[], float]) -> None:
        self._ask, self._clock = ask, clock
        self._granting = asyncio.Lock()

    async def _send(self, method: str, request: Any) -> tuple[Any, float]:
        """Return the reply, and when the lease ends: counted from the sending, it began later."""
        sent_s = 0.0

        def make() -> Any:
            nonlocal sent_s
            sent_s = self._clock()
            return request

        reply = await self._ask(method, make)
        return reply, sent_s + reply.TTL


class WindowLease(_Lease):
    """The lease for records that are done: each is kept for the window at least.

    One lease serves many records, bounded in time and in records.
    """

    def __init__(self, ask: AskUntilKnown, clock: Callable[[], float], window_s: int) -> None:
        super().__init__(ask, clock)
        self._window_s = window_s
        # New records go to one lease for a tenth of the window, at most ten minutes.
        self._ttl_s = window_s + max(1, min(600, window_s // 10))
        self._id = self._records_left = 0
        self._usable_until_s = 0.0

    async def take(self, records: int) -> int:
        """Return a lease that has the whole window left for so many records.

        That is at once but for the first batch of each bucket. Where records are kept for good it
        is 0, which is how etcd writes "no lease".
        """
        if self._window_s == 0:
            return 0
        async with self._granting:
            # One that was granted late may have less than the window left already.
            while self._records_left < records or self._clock() >= self._usable_until_s:
                request = LeaseGrantRequest(TTL=self._ttl_s)
                reply, ends_s = await self._send("LeaseGrant", request)
                self._id, self._records_left = reply.ID, _BUCKET_RECORDS
                self._usable_until_s = ends_s - self._window_s
            self._records_left -= records
            return self._id

    def lost(self) -> None:
        """Put nothing more under the current lease: etcd does not know it."""
        self._usable_until_s = 0.0


class ClaimLease(_Lease):
    """The process's lease for its claims, kept alive from the first claim until it is given up.

    It lasts three times the longest call it covers and is renewed after a third of that, so a
    call that starts has twice its time left while etcd answers. Other threads read how much time
    is left, so the id and the end of the lease are one value.
    """

    def __init__(
        self,
        ask: AskUntilKnown,
        clock: Callable[[], float],
        longest_call_s: float,
        tasks: asyncio.TaskGroup,
    ) -> None:
        super().__init__(ask, clock)
        self._tasks = tasks
        self._ttl_s = max(MIN_CLAIM_TTL_S, math.ceil(3 * longest_call_s))
        self._lease = (0, 0.0)

    def remaining_s(self, lease: int) -> float:
        """Return for how long a claim under this lease holds at the least. Any thread.

        That is no time for a lease that has been given up: nobody keeps it alive.
        """
        current, ends_s = self._lease
        return ends_s - self._clock() if lease == current else 0.0

    async def take(self) -> int:
        """Return a lease for a new claim."""
        async with self._granting:
            if self._lease[1] <= self._clock():
                request = LeaseGrantRequest(TTL=self._ttl_s)
                reply, ends_s = await self._send("LeaseGrant", request)
                self._lease = (reply.ID, ends_s)
                self._tasks.create_task(self._keep_alive(reply.ID))
            return self._lease[0]

    def give_up(self) -> None:
        """Keep the current lease alive no more, so that every claim under it ends.

        The calls under way end within the time that it has left: they were started so.
        """
        self._lease = (0, 0.0)

    async def _keep_alive(self, lease: int) -> None:
        while self._lease[0] == lease:
            await asyncio.sleep(self._ttl_s / 3)
            if self._lease[0] == lease:
                reply, ends_s = await self._send("LeaseKeepAlive", LeaseKeepAliveRequest(ID=lease))
                if self._lease[0] == lease:
                    self._lease = (lease, ends_s) if reply.TTL > 0 else (0, 0.0)
