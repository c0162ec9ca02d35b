"""Handlers, and the calls of those with an effect outside, in bounded number."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from contextlib import suppress
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from structlog.contextvars import bind_contextvars, reset_contextvars
from structlog.typing import FilteringBoundLogger

from .event import NO_EFFECTS, Checked, Effects, Event, check_effects
from .ledger import Ledger
from .metrics import Outcome

if TYPE_CHECKING:
    from .service import Running

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
    """A service's function for one event type; ``timeout_s`` is set for a claimed one.

    ``at_once`` bounds its calls, and ``retry_delays`` are its own, each where it is set. Of
    ``model``, a class is called with an event's args as its keywords, and any other callable with
    the args.
    """

    function: Callable[..., Any]
    timeout_s: float | None = None
    at_once: int | None = None
    retry_delays: tuple[tuple[str, int], ...] | None = None
    model: Callable[..., Any] | None = None

    @cached_property
    def is_coroutine(self) -> bool:
        """Whether it is awaited on the event loop."""
        # An object is called by its class's method, and a static method calls its function.
        function = getattr(self.function, "__func__", self.function)
        return any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))

    @property
    def name(self) -> str:
        """What a message calls it."""
        return getattr(self.function, "__name__", repr(self.function))

    @property
    def claimed(self) -> bool:
        """Whether it has an effect outside, and so runs under a claim."""
        return self.timeout_s is not None

    def check(self) -> None:
        """Raise TypeError where its function cannot be called as it will be."""
        if self.is_coroutine and not self.claimed:
            raise TypeError(
                "a pure handler is a plain function, not async def: it runs on the event loop and "
                "does not wait. One that waits is a claimed handler"
            )
        if self.model is not None and not callable(self.model):
            raise TypeError(
                f"model is a class, or a function of an event's args: {self.model!r:.100}"
            )
        given = ["event"] + ["model"] * bool(self.model) + ["timeout_s"] * self.claimed
        with suppress(ValueError):  # Some of C's functions have no signature.
            parameters = inspect.signature(self.function)
            try:
                parameters.bind(*given)
            except TypeError as error:
                raise TypeError(
                    f"{self.name}{parameters} cannot be called with ({', '.join(given)}): {error}"
                ) from None

    def arguments(self, event: Event) -> tuple[Any, ...]:
        """Return what its function is called with, but for the time-out. Raises ModelError."""
        if self.model is None:
            return (event,)
        try:
            is_class = isinstance(self.model, type)
            return (event, self.model(**event.args) if is_class else self.model(event.args))
        except Exception as error:
            raise ModelError(one_line(error)) from error


class ModelError(Exception):
    """A handler's model does not take an event's args; the message is the model's own."""


class Reject(Exception):
    """Raised by a handler for an event that no retry can help: it is parked at once."""


class RetryAfter(Exception):
    """Raised by a handler whose receiver says when to try again. It counts as an attempt.

    The retry uses the shortest of the handler's delays that is at least ``seconds``, or else the
    longest. It never comes sooner than the next regular retry. ``seconds`` may be the text of a
    number, such as a header has. Raises ValueError or TypeError for anything that is not a number:
    in a handler, that counts as an ordinary failure.
    """

    def __init__(self, seconds: float | str, why: str = "") -> None:
        self.seconds = float(seconds)
        if math.isnan(self.seconds):
            raise ValueError(f"no number of seconds: {seconds!r}")
        super().__init__(why or f"try again after {self.seconds:g} s")

    def __reduce__(self) -> tuple[Any, ...]:
        # For process pools. Exception would call the constructor, which takes more than `args`.
        return Exception.__new__, (type(self), *self.args), self.__dict__


class Returned(NamedTuple):
    """What a handler's run came to: its effects, or what it raised, in one line and itself.

    ``outcome`` is how an event ends for which it has failed often enough: at once, unless that is
    ``FAILED``. ``after_s`` is what ``RetryAfter`` asks for.
    """

    effects: Checked
    error: str
    elapsed_s: float
    outcome: Outcome = Outcome.FAILED
    after_s: float = 0.0
    raised: BaseException | None = None


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

    def run(self, handler: Handler, event: Event, *timeout_s: float) -> Returned:
        """Run a plain handler on the caller's thread; raises nothing.

        It has context variables of its own: what it binds is in no other event's log lines.
        """
        return copy_context().run(self._run, handler, event, *timeout_s)

    def _run(self, handler: Handler, event: Event, *timeout_s: float) -> Returned:
        """Run it. An exit is a failure like others: it would end the thread with its event."""
        started_s = self._clock()
        _bind(event)
        try:
            returned = handler.function(*handler.arguments(event), *timeout_s)
            return self._returned(returned, event, started_s)
        except BaseException as raised:  # noqa: BLE001 - whatever a handler raises is its failure
            return self._failed(raised, started_s)

    async def _wait(
        self, handler: Handler, event: Event, timeout_s: float, starts: Callable[[], bool]
    ) -> Returned | None:
        """Await a coroutine handler, or return None where it no longer ``starts``.

        It is cancelled at its time-out, and has failed then.
        """
        started_s = self._clock()
        # A handler, or a library that it uses, may cancel the task that it runs in, even once it
        # has returned. In a task of its own that ends its call, and not the way of its event.
        call = asyncio.create_task(self._run_until(timeout_s, handler, event, starts))
        try:
            returned = await call
        except asyncio.CancelledError as raised:
            returned = self._failed(raised, started_s)
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            # This process ends, whatever the handler made of it: nothing more can be asked.
            raise asyncio.CancelledError
        return returned

    async def _run_until(
        self, timeout_s: float, handler: Handler, event: Event, starts: Callable[[], bool]
    ) -> Returned | None:
        if not starts():
            return None
        started_s = self._clock()
        _bind(event)
        time_out = asyncio.timeout(timeout_s)
        try:
            async with time_out:
                awaited = handler.function(*handler.arguments(event), timeout_s)
                returned = self._returned(await awaited, event, started_s)
            if time_out.expired():
                self._log.warning(
                    "a handler caught its own cancellation: let CancelledError pass, the call is "
                    "taken to have failed",
                    **event.about,
                    seconds=round(returned.elapsed_s, 3),
                )
        except BaseException as raised:  # noqa: BLE001 - whatever a handler raises is its failure
            returned = self._failed(raised, started_s)
        if time_out.expired():
            # Whatever it returned or raised instead says nothing of the call that was cut off.
            error = f"TimeoutError: it took longer than {timeout_s:g} s"
            return Returned(NO_EFFECTS, error, self._clock() - started_s)
        return returned

    def _failed(self, raised: BaseException, started_s: float) -> Returned:
        elapsed_s = self._clock() - started_s
        # So a TaskGroup raises what one of its tasks has raised.
        while isinstance(raised, BaseExceptionGroup) and len(raised.exceptions) == 1:
            (raised,) = raised.exceptions
        if isinstance(raised, Reject):
            return Returned(NO_EFFECTS, one_line(raised), elapsed_s, Outcome.REJECTED)
        if isinstance(raised, ModelError):
            return Returned(NO_EFFECTS, str(raised), elapsed_s, Outcome.INVALID)
        if isinstance(raised, RetryAfter):
            try:
                after_s = float(raised.seconds)
            except Exception:  # noqa: BLE001 - a subclass may have none
                after_s = 0.0
            return Returned(NO_EFFECTS, one_line(raised), elapsed_s, after_s=after_s)
        return Returned(NO_EFFECTS, in_full(raised), elapsed_s, raised=raised)

    def _returned(self, returned: object, event: Event, started_s: float) -> Returned:
        """Return the effects, or why they can never be recorded: that is a failure too."""
        effects, error = NO_EFFECTS, ""
        if returned is not None:
            effects = check_effects(returned, self._service, event)  # type: ignore[arg-type]
            error = self._ledger.why_never(effects) or ""
        return Returned(effects, error, self._clock() - started_s)

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
            # Asked as late as can be, in the step or on the thread that calls the handler.
            if not self.has_time(handler, self._ledger.claim_remaining_s(lease)):
                return False
            self._overdue_s[call] = self._clock() + OVERDUE_AFTER * timeout_s
            return True

        def on_thread() -> Returned | None:
            return self._run(handler, event, timeout_s) if starts() else None

        try:
            if handler.is_coroutine:
                return await self._wait(handler, event, timeout_s, starts)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, copy_context().run, on_thread)
        finally:
            self._overdue_s.pop(call, None)

    def overdue(self) -> int:
        """Return how many calls have lasted far longer than they may."""
        now_s = self._clock()
        return sum(overdue_s < now_s for overdue_s in list(self._overdue_s.values()))


FIRST_PROBE_S, LONGEST_PROBE_S = 1.0, 30.0


class Breaker:
    """Holds the events of a handler whose calls fail, until one call succeeds again.

    After BREAKER_FAILURES failed calls in a row it opens; with 0 it never does. While it is open,
    one event after the other makes its call as a probe: the first after 1 s, each next one after
    twice as long, up to 30 s. ``resume`` takes what was held, and returns False for an event that
    is not to be called any more.
    """

    def __init__(self, event_type: str, resume: Callable[[Any], bool], run: Running) -> None:
        self._type, self._failures = event_type, run.settings.breaker_failures
        self._name, self._resume = f"circuit breaker of {event_type}", resume
        self._health, self._tally, self._log = run.health, run.tally, run.log
        self._in_a_row, self._wait_s, self._due = 0, FIRST_PROBE_S, False
        self._probe: object | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.is_open = False
        self.held: deque[Any] = deque()

    def admits(self, flight: object) -> bool:
        """Return whether an event may be called: any while it is closed, else the one probe."""
        return not self.is_open or flight is self._probe

    def hold(self, flight: object) -> None:
        """Keep an event until its turn as a probe comes, or the first success."""
        self.held.append(flight)
        if self._due:
            self._send_probe()

    def succeeded(self) -> None:
        """Take note of a call that succeeded: all that is held goes on."""
        self._in_a_row = 0
        if not self.is_open:
            return
        self.is_open = False
        self._tally.breakers(-1)
        self._health.has(self._name)
        if self._timer is not None:
            self._timer.cancel()  # It would cut short the first wait of the next time.
        self._log.info(
            "circuit breaker closed: a call succeeded", type=self._type, held=len(self.held)
        )
        held, self.held, self._probe, self._due = self.held, deque(), None, False
        for flight in held:
            self._resume(flight)

    def failed(self, flight: object, error: str) -> bool:
        """Take note of a call that failed, and return whether its event is to be held."""
        self._in_a_row += 1
        if not self.is_open and self._in_a_row == self._failures:
            self.is_open = True
            self._tally.breakers(1)
            self._health.lacks(self._name, f"open: {error}")
            self._log.warning(
                "circuit breaker opened: this handler's events are held, and one at a time is "
                "tried",
                type=self._type,
                failures=self._in_a_row,
                error=error,
            )
            self._send_probe_after(FIRST_PROBE_S)
        elif flight is self._probe:
            self._probe = None
            self._send_probe_after(min(2 * self._wait_s, LONGEST_PROBE_S))
        return self.is_open

    def passed(self, flight: object) -> None:
        """Take note that an event has had its turn. A probe that told nothing is made up for."""
        if flight is self._probe:
            self._send_probe()

    def _send_probe_after(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._send_probe)

    def _send_probe(self) -> None:
        """Let the next event that is held be called, or the first that comes."""
        self._probe, self._due = None, False
        while self.is_open and self._probe is None:
            if not self.held:
                self._due = True
                return
            flight = self.held.popleft()
            self._probe = flight if self._resume(flight) else None


# The variables of structlog's that a handler's event is bound in. To look them up for each event,
# as bind_contextvars does, takes three times as long.
_tokens = bind_contextvars(event_id="", type="", trace_id="")
_VARIABLES: dict[str, ContextVar[Any]] = {name: token.var for name, token in _tokens.items()}
reset_contextvars(**_tokens)


def _bind(event: Event) -> None:
    """Have the lines that are logged in this context from here on tell the event."""
    for name, text in event.about.items():
        _VARIABLES[name].set(text)


def in_full(raised: BaseException) -> str:
    """Write what a service's own code has raised, with its last line there: ``billing.py:17``.

    The exception loses the frames of this library that called that code, and what they hold.
    """
    frames = raised.__traceback__
    while frames is not None and _package(frames.tb_frame) == __package__:
        frames = frames.tb_next
    # Never refused, as an assignment is by a frozen dataclass.
    BaseException.with_traceback(raised, frames)
    found = list(walk_tb(frames))
    own = [(frame, line) for frame, line in found if _package(frame) == _package(found[0][0])]
    places = [f"({Path(each.f_code.co_filename).name}:{line})" for each, line in own[-1:]]
    return " ".join([one_line(raised), *map(_shortened, places)])


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def one_line(error: BaseException, *, named: bool = True) -> str:
    """Write an exception for a log line or a header: bounded, without line breaks.

    Its type comes first, unless it is not to be ``named``.
    """
    name = type(error).__name__
    try:
        text = f"{name}: {error}" if named else f"{error}"
    except BaseException:  # noqa: BLE001 - an exception's own text can fail as well
        text = name
    return _shortened(text)


def _shortened(text: str) -> str:
    return " ".join(text.split()).encode(errors="replace").decode()[:500]
