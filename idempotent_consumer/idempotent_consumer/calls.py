"""Handlers, and the calls of those with an effect outside, in bounded number."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from structlog.typing import FilteringBoundLogger

from .event import NO_EFFECTS, Checked, Effects, Event, check_effects
from .ledger import Ledger

PureHandler = Callable[[Event], Effects]
"""Returns what is to be recorded with the event, and touches nothing outside. It runs on the
event loop: while it computes, heartbeats stop and nothing else is processed."""

ClaimedHandler = Callable[[Event, float], Effects | Awaitable[Effects]]
"""Has an effect outside, and returns within the seconds it is given. A coroutine function runs on
the event loop and is cancelled at its time-out; a plain function runs on a thread. The outside may
see the event again when a process dies in the middle of a call."""

OVERDUE_AFTER = 3
"""A call that lasts so many times as long as it may is taken not to return."""


@dataclass(frozen=True)
class Handler:
    """A service's function for one event type; ``timeout_s`` is set for a claimed one."""

    function: Callable[..., Any]
    timeout_s: float | None = None

    @cached_property
    def is_coroutine(self) -> bool:
        """Whether it is awaited on the event loop."""
        # An object is called by its class's method.
        called = (self.function, type(self.function).__call__)
        return any(map(inspect.iscoroutinefunction, called))

    @property
    def claimed(self) -> bool:
        """Whether it has an effect outside, and so runs under a claim."""
        return self.timeout_s is not None


class Returned(NamedTuple):
    """What a handler's run came to: its effects, or what it raised, in one line."""

    effects: Checked
    error: str
    elapsed_s: float


class Calls:
    """Runs handlers, and turns whatever they return or raise into what can be recorded.

    Of those that are claimed it calls ``at_once`` at the most. A ``slot`` is taken before the claim
    and kept until the record has taken the claim's place, so that a process that dies leaves no
    more claims behind than it has slots. ``clock`` returns seconds, on any thread, by the clock of
    the event loop.
    """

    def __init__(
        self,
        service: str,
        ledger: Ledger,
        log: FilteringBoundLogger,
        clock: Callable[[], float],
        at_once: int,
        threads: Executor,
    ) -> None:
        self._service, self._ledger, self._log = service, ledger, log
        self._clock, self._threads = clock, threads
        self.slot = asyncio.Semaphore(at_once)
        self.end_by_s = math.inf
        """No call starts that might not have ended by then, by the loop's clock."""
        self._overdue_s: dict[object, float] = {}

    def run(self, function: Callable[..., object], event: Event, *timeout_s: float) -> Returned:
        """Run a plain handler on the caller's thread; raises nothing.

        An exit is a failure like others: it would end the thread with the event in flight.
        """
        started_s = self._clock()
        try:
            effects, error = self._check(function(event, *timeout_s), event)
        except BaseException as raised:  # noqa: BLE001 - whatever a handler raises is its failure
            effects, error = NO_EFFECTS, one_line(raised)
        return Returned(effects, error, self._clock() - started_s)

    async def wait(
        self, function: Callable[..., Awaitable[object]], event: Event, timeout_s: float
    ) -> Returned:
        """Await a coroutine handler; it is cancelled at its time-out, and has failed then."""
        started_s = self._clock()
        effects, error = NO_EFFECTS, ""
        time_out = asyncio.timeout(timeout_s)
        try:
            async with time_out:
                effects, error = self._check(await function(event, timeout_s), event)
        except GeneratorExit:
            raise  # The loop itself has gone.
        except BaseException as raised:  # noqa: BLE001 - whatever a handler raises is its failure
            error = one_line(raised)
        else:
            if time_out.expired():
                self._log.warning(
                    "a handler caught its own cancellation: let CancelledError pass, the call is "
                    "taken to have failed",
                    **event.about,
                    seconds=round(self._clock() - started_s, 3),
                )
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            # This process ends, whatever the handler made of it: nothing more can be asked.
            raise asyncio.CancelledError
        if time_out.expired():
            # Whatever it returned or raised instead says nothing of the call that was cut off.
            effects, error = NO_EFFECTS, f"TimeoutError: it took longer than {timeout_s:g} s"
        return Returned(effects, error, self._clock() - started_s)

    def _check(self, returned: object, event: Event) -> tuple[Checked, str]:
        """Return the effects, or why they can never be recorded: that is a failure too."""
        effects = check_effects(returned, self._service, event.id)  # type: ignore[arg-type]
        return effects, self._ledger.why_never(effects) or ""

    def has_time(self, handler: Handler, claim_remaining_s: float = math.inf) -> bool:
        """Return whether a call can last as long as it may before its claim or this process ends.

        Any thread may ask: a plain function may have waited for one.
        """
        left_s = min(claim_remaining_s, self.end_by_s - self._clock())
        return left_s > (handler.timeout_s or 0.0)

    async def call(self, handler: Handler, event: Event, lease: int) -> Returned | None:
        """Call a handler under a claim; None where there is no time left for it."""
        timeout_s, call = handler.timeout_s or 0.0, object()

        def starts() -> bool:
            # Asked as late as can be.
            if not self.has_time(handler, self._ledger.claim_remaining_s(lease)):
                return False
            self._overdue_s[call] = self._clock() + OVERDUE_AFTER * timeout_s
            return True

        def on_thread() -> Returned | None:
            return self.run(handler.function, event, timeout_s) if starts() else None

        try:
            if handler.is_coroutine:
                return await self.wait(handler.function, event, timeout_s) if starts() else None
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, on_thread)
        finally:
            self._overdue_s.pop(call, None)

    def overdue(self) -> int:
        """Return how many calls have lasted far longer than they may."""
        now_s = self._clock()
        return sum(overdue_s < now_s for overdue_s in list(self._overdue_s.values()))


def one_line(error: BaseException) -> str:
    """Write an exception for a log line or a header: bounded, without line breaks."""
    try:
        text = " ".join(f"{type(error).__name__}: {error}".split())
    except Exception:  # noqa: BLE001 - an exception's own text can fail as well
        text = type(error).__name__
    return text.encode(errors="replace").decode()[:500]
