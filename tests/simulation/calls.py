"""The outside: every call of a claimed handler, and a pool whose calls take simulated time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from idempotent_consumer.event import Event
from idempotent_consumer.handlers import Pool
from simulation.life import Life
from simulation.plan import Plan
from simulation.trace import Trace


@dataclass
class Call:
    """One call as the outside sees it, from its start to its end on the world's clock.

    ``reached`` is false where the process died before the request had left it. ``returned`` says
    that the process has had the answer. ``decided_s`` is when it looked at its claim: long before
    the start, where it froze in between.
    """

    event: Event
    life: Life
    decided_s: float
    start_s: float
    end_s: float
    raised: bool
    reached: bool = True
    returned: bool = False


class Outside:
    """Takes the calls and keeps them. ``runs`` has the event of each run of a pure handler."""

    def __init__(self, rng: Random, plan: Plan, trace: Trace) -> None:
        self._rng, self._plan, self._trace = rng, plan, trace
        self.calls: list[Call] = []
        self.runs: list[Event] = []

    def call(self, event: Event, life: Life, raises: bool) -> Call:
        """Make a call, which ends within the handler's time-out."""
        decided_s = life.agenda.now_s
        if self._plan.rate("frozen") and self._rng.random() < 0.03:
            # The narrow place that no lease can guard: frozen just before it sends.
            life.freeze(min(self._rng.uniform(1.0, 40.0), self._plan.longest_freeze_s))
        start_s = max(decided_s, life.frozen_until_s)
        took_s = self._rng.uniform(0.0, self._plan.call_s)
        call = Call(event, life, decided_s, start_s, start_s + took_s, raises)
        self.calls.append(call)
        self._trace.note(life.name, "calls", event.id, f"until {call.end_s:.3f}")
        return call

    def process_ended(self, life: Life) -> None:
        """Decide what the outside has seen of the calls that were under way."""
        now_s = life.agenda.now_s
        for call in self.calls:
            if call.life is life and not call.returned and now_s < call.end_s:
                call.reached = self._rng.random() < 0.5 and call.start_s <= now_s
                which = "reached" if call.reached else "did not reach"
                self._trace.fault(f"killed in a call that {which} the outside", life.name)


class SimulatedPool(Pool):
    """A pool without threads: what a job hands to the loop arrives there when its call has ended.

    A job runs at the start of its call, as far as it can be seen from outside: the check of the
    claim stands before the call, and its result depends on nothing that comes later.
    """

    def __init__(self, life: Life, rng: Random, threads: int) -> None:
        super().__init__(0)
        self._life, self._rng, self._free = life, rng, threads
        self._waiting: deque[Callable[[], None]] = deque()
        self.current: Call | None = None

    def run(self, job: Callable[[], None]) -> None:
        """Start a job as soon as a thread is free."""
        self._waiting.append(job)
        self._start_next()

    def _start_next(self) -> None:
        if self._free and self._waiting:
            self._free -= 1
            job = self._waiting.popleft()
            self._life.agenda.later(
                self._rng.expovariate(1000), lambda: self._start(job), self._life
            )

    def _start(self, job: Callable[[], None]) -> None:
        handed_over: list[Callable[[], None]] = []
        self._life.captured, self.current = handed_over, None
        try:
            job()
        finally:
            self._life.captured = None
        call, now_s = self.current, self._life.agenda.now_s
        ends_s = now_s if call is None else call.end_s

        def end() -> None:
            if call is not None:
                call.returned = True
            self._free += 1
            for callback in handed_over:
                self._life.call_soon(callback)
            self._start_next()

        self._life.agenda.later(ends_s - now_s, end, self._life)
