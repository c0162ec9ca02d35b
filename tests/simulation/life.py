"""One life of a process: its steps on the simulated clock, where it freezes and where it dies."""

from __future__ import annotations

import traceback
from collections.abc import Callable

from simulation.agenda import Agenda
from simulation.trace import Trace


class Killed(BaseException):
    """The process is gone in the middle of a step. No handler of the library may catch it."""


class Life:
    """A process from its start to its end, and the library's loop in it.

    Steps are counted: each callback, and within it each action that the outside sees. It dies
    at the step that ``dies_at`` says and freezes, between two callbacks, at those in
    ``freezes_at``, which has the seconds. ``clock_s`` is what its own clock shows at first.
    ``told_s`` is when etcd has last told it of each record.
    """

    def __init__(self, name: str, token: str, agenda: Agenda, trace: Trace, clock_s: float) -> None:
        self.name, self.token = name, token
        self.agenda, self.trace = agenda, trace
        self.alive = True
        self.frozen_until_s = 0.0
        self.ended_s: float | None = None
        self.steps = 0
        self.dies_at: int | None = None
        self.freezes_at: dict[int, float] = {}
        self.told_s: dict[bytes, float] = {}
        self.on_frozen: list[Callable[[float], None]] = []
        self.on_ended: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None
        self.in_step = False
        self._clock_s = clock_s

    # The library's loop.

    def now_s(self) -> float:
        """Return the process's own monotonic clock."""
        return self._clock_s + self.agenda.now_s

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call after a delay."""
        self.agenda.later(delay_s, callback, self)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call after what is waiting already."""
        if self.captured is not None:
            self.captured.append(callback)
        else:
            self.agenda.later(0.0, callback, self)

    # The process.

    def between_steps(self) -> None:
        """Count a step, and die or freeze if it is the one."""
        self.steps += 1
        if self.steps == self.dies_at:
            self.trace.fault("killed between two steps", self.name)
            self.end()
        elif self.steps in self.freezes_at:
            self.freeze(self.freezes_at[self.steps])

    def run(self, callback: Callable[[], None]) -> None:
        """Do one step. What it raises would end a real service, and never should."""
        self.in_step = True
        try:
            callback()
        except Killed:
            pass
        except Exception as error:  # noqa: BLE001 - judged, whatever it is
            self.trace.violation(
                "an exception ended the process",
                repr(error),
                *traceback.format_exc().splitlines()[-5:],
            )
        finally:
            self.in_step = False

    def act(self) -> None:
        """Stand before or behind an action that the outside sees."""
        self.steps += 1
        if self.steps == self.dies_at and self.in_step:
            self.trace.fault("killed within a step", self.name)
            self.end()
            raise Killed

    def freeze(self, seconds: float) -> None:
        """Do nothing for a time, as after SIGSTOP."""
        self.trace.fault("frozen", self.name, round(seconds, 2))
        self.frozen_until_s = self.agenda.now_s + seconds
        for callback in self.on_frozen:
            callback(seconds)

    def end(self) -> None:
        """Be gone."""
        self.alive, self.ended_s = False, self.agenda.now_s
        self.trace.note(self.name, "is gone")
        for callback in self.on_ended:
            callback()
