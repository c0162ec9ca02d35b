"""Handlers, how they are run, and the circuit breaker of those that are claimed."""

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
from typing import Any, NamedTuple

from structlog.contextvars import bind_contextvars, reset_contextvars
from structlog.typing import FilteringBoundLogger

from .event import NO_EFFECTS, Checked, Effects, Event, check_effects
from .health import Health
from .ledger import Ledger
from .metrics import Outcome, Tally

PureHandler = Callable[[Event], Effects]
"""Returns what is to be recorded with the event, and has no outside effect. It runs on the event
loop: while it computes, no heartbeat is sent and nothing else is processed."""

ClaimedHandler = Callable[[Event, float], Effects | Awaitable[Effects]]
"""Has an outside effect, and returns within the seconds it is given. A coroutine function runs on
the event loop and is cancelled at its time-out; a plain function runs on a thread. If a process
dies during a call, the call is made again."""

OVERDUE_AFTER = 3
"""A call that takes this many times its time-out is assumed never to return."""


@dataclass(frozen=True)
class Handler:
    """A service's function for one event type. A pure one has no ``timeout_s``.

    ``at_once``, if set, bounds its calls, and ``retry_delays`` replace the service's. A ``model``
    that is a class is called with an event's args as keywords, any other callable with the args.
    """

    function: Callable[..., Any]
    timeout_s: float = 0.0
    at_once: int | None = None
    retry_delays: tuple[tuple[str, int], ...] | None = None
    model: Callable[..., Any] | None = None

    @cached_property
    def is_coroutine(self) -> bool:
        """Whether it is awaited on the event loop."""
        # Calling an object runs its class's __call__, and a static method runs its function.
        function = getattr(self.function, "__func__", self.function)
        return any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))

    @property
    def name(self) -> str:
        """Its name in messages."""
        return getattr(self.function, "__name__", repr(self.function))

    @property
    def claimed(self) -> bool:
        """Whether it has an outside effect, and so runs under a claim."""
        return self.timeout_s > 0

    def check(self) -> None:
        """Raise TypeError if its function or model cannot be called as it will be."""
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
        with suppress(ValueError):  # Some functions written in C have no signature.
            parameters = inspect.signature(self.function)
            try:
                parameters.bind(*given)
            except TypeError as error:
                raise TypeError(
                    f"{self.name}{parameters} cannot be called with ({', '.join(given)}): {error}"
                ) from None

    def arguments(self, event: Event) -> tuple[Any, ...]:
        """Return what its function is called with. Raises ModelError."""
        arguments: tuple[Any, ...] = (event,)
        if self.model is not None:
            try:
                is_class = isinstance(self.model, type)
                made = self.model(**event.args) if is_class else self.model(event.args)
            except Exception as error:
                raise ModelError(one_line(error)) from error
            arguments = (event, made)
        return (*arguments, self.timeout_s) if self.claimed else arguments


class ModelError(Exception):
    """A handler's model refused an event's args; the message is the model's own."""


class Reject(Exception):
    """Raised by a handler for an event that no retry can help: the event is parked at once."""


class RetryAfter(Exception):
    """Raised by a handler whose receiver says when to try again. It counts as an attempt.

    The retry uses the shortest of the handler's delays that is at least ``seconds``, or else the
    longest. It never comes sooner than the next regular retry. ``seconds`` may be a number's text,
    as in a header. Raises ValueError or TypeError for anything else, which in a handler counts as
    an ordinary failure.
    """

    def __init__(self, seconds: float | str, why: str = "") -> None:
        self.seconds = float(seconds)
        if math.isnan(self.seconds):
            raise ValueError(f"no number of seconds: {seconds!r}")
        super().__init__(why or f"try again after {self.seconds:g} s")

    def __reduce__(self) -> tuple[Any, ...]:
        # For process pools. By default the constructor is called with `args`, which lack `seconds`.
        return Exception.__new__, (type(self), *self.args), self.__dict__


class Returned(NamedTuple):
    """The result of a handler's run: its effects, or the ``error`` in one line.

    ``outcome`` is how the event ends after an error: at once, or after its retries if that is
    ``FAILED``. ``after_s`` is what ``RetryAfter`` asks for. ``raised`` is an unexpected exception.
    """

    effects: Checked
    error: str
    elapsed_s: float
    outcome: Outcome = Outcome.FAILED
    after_s: float = 0.0
    raised: BaseException | None = None


class Calls:
    """Runs handlers, and turns whatever they return or raise into something that can be recorded.

    At most ``at_once`` claimed handlers are called at a time. A ``slot`` is taken before the claim
    and kept until the record has replaced it, so a process that dies leaves no more claims behind
    than it has slots. ``clock`` is the event loop's; any thread may call it.
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
        """No call starts that could last beyond this time, by the loop's clock."""
        self._overdue_s: dict[object, float] = {}

    def run(self, handler: Handler, event: Event) -> Returned:
        """Run a plain handler on the caller's thread. Raises nothing.

        It runs in a context of its own: what it binds does not appear in other events' log lines.
        """
        return copy_context().run(self._run, handler, event)

    def _run(self, handler: Handler, event: Event) -> Returned:
        started_s = self._clock()
        _bind(event)
        try:
            returned = handler.function(*handler.arguments(event))
            return self._returned(returned, event, started_s)
        except BaseException as raised:  # noqa: BLE001 - an exit too: it would end the thread
            return self._failed(raised, started_s)

    async def _wait(
        self, handler: Handler, event: Event, starts: Callable[[], bool]
    ) -> Returned | None:
        """Await a coroutine handler, or return None if it no longer ``starts``."""
        started_s = self._clock()
        # A handler, or a library it uses, may cancel the task that it runs in, even after it has
        # returned. In a task of its own, that ends only the call.
        call = asyncio.create_task(self._run_until_time_out(handler, event, starts))
        try:
            returned = await call
        except asyncio.CancelledError as raised:
            returned = self._failed(raised, started_s)
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            # The process is ending, whatever the handler has made of that: no ask can follow.
            raise asyncio.CancelledError
        return returned

    async def _run_until_time_out(
        self, handler: Handler, event: Event, starts: Callable[[], bool]
    ) -> Returned | None:
        if not starts():
            return None
        started_s = self._clock()
        _bind(event)
        time_out = asyncio.timeout(handler.timeout_s)
        try:
            async with time_out:
                awaited = handler.function(*handler.arguments(event))
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
            # Whatever it returned or raised instead says nothing about the call that was cut off.
            error = f"TimeoutError: it took longer than {handler.timeout_s:g} s"
            return Returned(NO_EFFECTS, error, self._clock() - started_s)
        return returned

    def _failed(self, raised: BaseException, started_s: float) -> Returned:
        elapsed_s = self._clock() - started_s
        # A TaskGroup wraps what one of its tasks has raised.
        while isinstance(raised, BaseExceptionGroup) and len(raised.exceptions) == 1:
            (raised,) = raised.exceptions
        if isinstance(raised, Reject):
            return Returned(NO_EFFECTS, one_line(raised), elapsed_s, Outcome.REJECTED)
        if isinstance(raised, ModelError):
            return Returned(NO_EFFECTS, str(raised), elapsed_s, Outcome.INVALID)
        if isinstance(raised, RetryAfter):
            try:
                after_s = float(raised.seconds)
            except Exception:  # noqa: BLE001 - a subclass may not have set it
                after_s = 0.0
            return Returned(NO_EFFECTS, one_line(raised), elapsed_s, after_s=after_s)
        return Returned(NO_EFFECTS, in_full(raised), elapsed_s, raised=raised)

    def _returned(self, returned: object, event: Event, started_s: float) -> Returned:
        """Return a handler's effects, or as an error why they can never be recorded."""
        effects, error = NO_EFFECTS, ""
        if returned is not None:
            effects = check_effects(returned, self._service, event)  # type: ignore[arg-type]
            error = self._ledger.why_never(effects) or ""
        return Returned(effects, error, self._clock() - started_s)

    def has_time(self, handler: Handler, claim_remaining_s: float = math.inf) -> bool:
        """Return whether a call's whole time-out fits before its claim or this process ends.

        Any thread may call it: a plain function may have waited for a thread.
        """
        return min(claim_remaining_s, self.end_by_s - self._clock()) > handler.timeout_s

    async def call(self, handler: Handler, event: Event, lease: int) -> Returned | None:
        """Call a handler under a claim, or return None if there is not enough time left for it."""
        call = object()

        def starts() -> bool:
            # Checked as late as possible: in the step, or on the thread, that calls the handler.
            if not self.has_time(handler, self._ledger.claim_remaining_s(lease)):
                return False
            self._overdue_s[call] = self._clock() + OVERDUE_AFTER * handler.timeout_s
            return True

        def on_thread() -> Returned | None:
            return self._run(handler, event) if starts() else None

        try:
            if handler.is_coroutine:
                return await self._wait(handler, event, starts)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, copy_context().run, on_thread)
        finally:
            self._overdue_s.pop(call, None)

    def overdue(self) -> int:
        """Return how many calls have lasted far longer than their time-out."""
        now_s = self._clock()
        return sum(overdue_s < now_s for overdue_s in list(self._overdue_s.values()))


FIRST_PROBE_S, LONGEST_PROBE_S = 1.0, 30.0


class Breaker:
    """Holds the events of a handler whose calls fail, until a call succeeds again.

    It opens after ``failures`` failed calls in a row; 0: never. While it is open, one event at a
    time makes its call as a probe: the first after 1 s, each next one after twice as long, up to
    30 s. A probe that tells nothing, as when its event is rejected, is followed by another at once.
    """

    def __init__(
        self,
        event_type: str,
        failures: int,
        health: Health,
        tally: Tally,
        log: FilteringBoundLogger,
    ) -> None:
        self._type, self._failures = event_type, failures
        self._name = f"circuit breaker of {event_type}"
        self._health, self._tally, self._log = health, tally, log
        self._in_a_row, self._wait_s, self._due = 0, FIRST_PROBE_S, False
        self._probe: object | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_open = False
        self.held: deque[tuple[object, asyncio.Event]] = deque()

    def admits(self, flight: object) -> bool:
        """Return whether an event may be called: any while it is closed, else only the probe."""
        return not self._is_open or flight is self._probe

    async def turn(self, flight: object) -> None:
        """Hold an event until it is the probe, or a call has succeeded."""
        turn = asyncio.Event()
        self.held.append((flight, turn))
        if self._due:
            self._send_probe()
        await turn.wait()

    def succeeded(self) -> None:
        """Note that a call succeeded: all held events go on."""
        self._in_a_row = 0
        if not self._is_open:
            return
        self._is_open = False
        self._tally.breakers(-1)
        self._health.has(self._name)
        if self._timer is not None:
            self._timer.cancel()  # It would cut short the first wait of the next time.
        self._log.info(
            "circuit breaker closed: a call succeeded", type=self._type, held=len(self.held)
        )
        for _, turn in self.held:
            turn.set()
        self.held.clear()
        self._probe, self._due = None, False

    def failed(self, flight: object, error: str) -> bool:
        """Note that a call failed, and return whether its event is to be held."""
        self._in_a_row += 1
        if not self._is_open and self._in_a_row == self._failures:
            self._is_open = True
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
        return self._is_open

    def passed(self, flight: object) -> None:
        """Note that an event has had its turn. A probe that told nothing is followed at once."""
        if flight is self._probe:
            self._send_probe()

    def _send_probe_after(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._send_probe)

    def _send_probe(self) -> None:
        """Let the next held event be called, or the first that comes."""
        self._probe, self._due = None, not self.held
        if self.held:
            self._probe, turn = self.held.popleft()
            turn.set()


# structlog's context variables for a handler's event. bind_contextvars looks them up each time, and
# takes three times as long.
_tokens = bind_contextvars(event_id="", type="", trace_id="")
_VARIABLES: dict[str, ContextVar[Any]] = {name: token.var for name, token in _tokens.items()}
reset_contextvars(**_tokens)


def _bind(event: Event) -> None:
    """Name the event in the lines that are logged in this context from here on."""
    for name, text in event.about.items():
        _VARIABLES[name].set(text)


def in_full(raised: BaseException) -> str:
    """Describe what a service's own code raised, and where in it: ``(billing.py:17)``.

    Removes the frames of this library, which called that code, from the exception's traceback.
    """
    frames = raised.__traceback__
    while frames is not None and _package(frames.tb_frame) == __package__:
        frames = frames.tb_next
    # A frozen dataclass would refuse an assignment.
    BaseException.with_traceback(raised, frames)
    found = list(walk_tb(frames))
    own = [(frame, line) for frame, line in found if _package(frame) == _package(found[0][0])]
    places = [f"({Path(each.f_code.co_filename).name}:{line})" for each, line in own[-1:]]
    return " ".join([one_line(raised), *map(_shortened, places)])


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def one_line(error: BaseException, *, named: bool = True) -> str:
    """Describe an exception for a log line or a header: in at most 500 characters, on one line.

    Its type comes first, if it is ``named``.
    """
    name = type(error).__name__
    try:
        text = f"{name}: {error}" if named else f"{error}"
    except BaseException:  # noqa: BLE001 - an exception's own text can fail as well
        text = name
    return _shortened(text)


def _shortened(text: str) -> str:
    return " ".join(text.split()).encode(errors="replace").decode()[:500]
