"""Calls of claimed handlers: on the pool, under their claims, and watched."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from .event import Event
from .handlers import Handler, Pool, Returned, run_handler
from .ledger.ledger import Ledger
from .loop import Loop

OVERDUE_AFTER = 3
"""A call that lasts so many times as long as it may is taken not to return."""


class Caller:
    """Runs claimed handlers on the pool's threads and comes back to the loop with what they did."""

    def __init__(self, service: str, ledger: Ledger, loop: Loop, pool: Pool) -> None:
        self._service = service
        self._ledger, self._loop, self._pool = ledger, loop, pool
        self._overdue_s: dict[int, float] = {}
        self._calls = 0
        self._ended_by_s = math.inf

    def call(
        self,
        handler: Handler,
        event: Event,
        lease: int,
        done: Callable[[Returned | None], None],
    ) -> None:
        """Run the handler under a claim; ``done`` gets None where there is no time left for it.

        The claim's lease is asked as late as can be: the job may have waited for a thread.
        """
        timeout_s = handler.timeout_s or 0.0
        self._calls += 1
        call = self._calls
        self._overdue_s[call] = math.inf  # It cannot hang before a thread has taken it.

        def job() -> None:
            returned, now_s = None, self._loop.now_s()
            self._overdue_s[call] = now_s + OVERDUE_AFTER * timeout_s
            left_s = min(self._ledger.claim_remaining_s(lease), self._ended_by_s - now_s)
            if left_s > timeout_s:
                returned = run_handler(handler, event, self._service, self._ledger.why_never)
            self._loop.call_soon(partial(finished, returned))

        def finished(returned: Returned | None) -> None:
            del self._overdue_s[call]
            done(returned)

        self._pool.run(job)

    def end_by(self, now_s: float) -> None:
        """Start no call any more that might not have ended by then."""
        self._ended_by_s = now_s

    @property
    def ending(self) -> bool:
        """Whether calls are no longer started, or soon will not be."""
        return self._ended_by_s < math.inf

    def overdue(self) -> int:
        """Return how many calls have lasted far longer than they may."""
        now_s = self._loop.now_s()
        return sum(overdue_s < now_s for overdue_s in self._overdue_s.values())
