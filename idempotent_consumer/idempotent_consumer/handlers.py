"""Handlers: what a service does with an event of one type."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from .effects import NO_EFFECTS, Checked, Effects, check_effects
from .event import Event

PureHandler = Callable[[Event], Effects]
"""Returns what is to be recorded with the event, and touches nothing outside. It runs on the
loop's thread: while it blocks, heartbeats stop and nothing else is processed."""

ClaimedHandler = Callable[[Event, float], Effects]
"""Has an effect outside, and returns within the seconds it is given. It runs on a thread of a
pool, under a claim. The outside may see it again when a process dies in the middle of it."""


@dataclass(frozen=True, slots=True)
class Handler:
    """A service's function for one event type; ``timeout_s`` is set for a claimed one."""

    function: Callable[..., Effects]
    timeout_s: float | None = None

    @property
    def claimed(self) -> bool:
        """Whether it has an effect outside, and so runs under a claim."""
        return self.timeout_s is not None


class Returned(NamedTuple):
    """What came of a handler's run: its effects, or what it raised, in one line."""

    effects: Checked
    error: str
    elapsed_s: float


def run_handler(
    handler: Handler, event: Event, service: str, why_never: Callable[[Checked], str | None]
) -> Returned:
    """Run a handler on the thread of the caller; raises nothing.

    An exit is a failure like others: it would end the thread with the event in hand. What can
    never be recorded (``why_never`` says why) is the handler's failure too.
    """
    started_s = time.perf_counter()
    effects = NO_EFFECTS
    error = ""
    try:
        arguments = (event,) if handler.timeout_s is None else (event, handler.timeout_s)
        returned = handler.function(*arguments)
        effects = check_effects(returned, service, event.id)
        error = why_never(effects) or ""
    except BaseException as raised:  # noqa: BLE001 - whatever a handler raises is its failure
        error = one_line(raised)
    return Returned(effects, error, time.perf_counter() - started_s)


class Pool:
    """A few threads for handlers that wait for the outside.

    Daemon threads: a call that hangs must not keep the process from ending.
    """

    def __init__(self, threads: int) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        for number in range(threads):
            threading.Thread(target=self._work, name=f"call-{number}", daemon=True).start()

    def run(self, job: Callable[[], None]) -> None:
        """Run a job, which raises nothing, on one of the threads as soon as one is free."""
        self._jobs.put(job)

    def _work(self) -> None:
        while True:
            self._jobs.get()()


def one_line(error: BaseException) -> str:
    """Write an exception for a log line or a header: bounded, without line breaks."""
    try:
        text = " ".join(f"{type(error).__name__}: {error}".split())
    except Exception:  # noqa: BLE001 - an exception's own text can fail as well
        text = type(error).__name__
    return text.encode(errors="replace").decode()[:500]
