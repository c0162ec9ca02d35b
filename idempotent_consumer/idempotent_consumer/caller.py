"""Calls of claimed handlers: on the pool, under their claims, and watched."""

from __future__ import annotations

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

    def __init__(self, ledger: Ledger, loop: Loop, pool: Pool) -> None:
        self._ledger, self._loop, self._pool = ledger, loop, pool
        self._overdue_s: dict[int, float] = {}
        self._calls = 0

    def call(
        self,
        handler: Handler,
        event: Event,
        lease: int,
        done: Callable[[Returned | None], None],
    ) -> None:
        """Run the handler under a claim; ``done`` gets None where the claim's lease is too short.

        The lease is asked as late as can be: the job may have waited for a thread.
        """
        timeout_s = handler.timeout_s or 0.0
        self._calls += 1
        call = self._calls
        self._overdue_s[call] = self._loop.now_s() + OVERDUE_AFTER * timeout_s

        def job() -> None:
            returned = None
            if self._ledger.claim_remaining_s(lease) > timeout_s:
                returned = run_handler(handler, event, self._ledger.why_never)
            self._loop.call_soon(partial(finished, returned))

        def finished(returned: Returned | None) -> None:
            del self._overdue_s[call]
            done(returned)

        self._pool.run(job)

    def overdue(self) -> int:
        """Return how many calls have lasted far longer than they may."""
        now_s = self._loop.now_s()
        return sum(overdue_s < now_s for overdue_s in self._overdue_s.values())
