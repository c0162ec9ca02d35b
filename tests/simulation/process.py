"""One process of the service: its life on the simulated clock, where it freezes and dies."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

from idempotent_consumer import Service
from idempotent_consumer.testing.amqp import Sent
from idempotent_consumer.testing.broker import FakeBroker
from idempotent_consumer.testing.etcd import FakeEtcd
from idempotent_consumer.testing.loop import Agenda, Killed, Loop, Threads
from idempotent_consumer.testing.process import Process
from simulation.plan import Plan
from simulation.trace import Trace, TraceLog


class Life(Loop):
    """A process from its start to its end, and the event loop in it.

    Steps are counted: each callback, and within it each action that the outside sees. It dies
    at the step that ``dies_at`` says and freezes, between two callbacks, at those in
    ``freezes_at``, which has the seconds. What etcd has told it: ``answered`` requests, the last
    of them number ``last_answered``, up to the ``highest_revision``; ``told_s`` is when it was
    last told of each record, ``lineage`` the life of etcd's data that it has reached first.
    """

    def __init__(self, name: str, agenda: Agenda, trace: Trace, clock_s: float) -> None:
        super().__init__(agenda, clock_s)
        self.name, self.trace = name, trace
        self.ended_s: float | None = None
        self.steps = 0
        self.dies_at: int | None = None
        self.freezes_at: dict[int, float] = {}
        self.sent = self.answered = self.last_answered = self.highest_revision = 0
        self.told_s: dict[bytes, float] = {}
        self.lineage: int | None = None
        self.on_frozen: list[Callable[[float], None]] = []
        self.on_ended: list[Callable[[], None]] = []
        self.may_ack: Callable[[], bool] = lambda: False

    def between_steps(self) -> None:
        """Count a step, and die or freeze if it is the one."""
        self.steps += 1
        if self.steps == self.dies_at:
            self.trace.fault("killed between two steps", self.name)
            self.end()
        elif self.steps in self.freezes_at:
            self.freeze(self.freezes_at[self.steps])

    def act(self, when: str, what: Any) -> None:
        """Stand before or behind an action that the outside sees."""
        super().act(when, what)
        if when == "before" and isinstance(what, Sent):
            if what.method == "basic_consume" and not self.answered:
                self.trace.violation("consuming before etcd is ready", self.name)
            if what.method == "basic_ack" and not self.may_ack():
                self.trace.violation(
                    "an ack by a process that knows that etcd is another", self.name, what
                )
        self.steps += 1
        if self.steps == self.dies_at and self.in_step:
            self.trace.fault("killed within a step", self.name)
            self.end()
            raise Killed

    def freeze(self, seconds: float) -> None:
        """Do nothing for a time, as after SIGSTOP."""
        self.trace.fault("frozen", self.name, round(seconds, 2))
        super().freeze(seconds)
        for callback in self.on_frozen:
            callback(seconds)

    def end(self) -> None:
        """Be gone."""
        if self.ended_s is None:
            self.ended_s = self.agenda.now_s
            self.trace.note(self.name, "is gone")
            for callback in self.on_ended:
                callback()
            self.kill()

    def on_defect(self, error: BaseException) -> None:
        """Judge what would end a real service, and never should."""
        lines = traceback.format_exception(error)
        self.trace.violation("an exception ended the process", repr(error), *lines[-5:])


class SimulatedProcess(Process):
    """The service's own run in one life."""

    def __init__(
        self,
        life: Life,
        service: Service,
        plan: Plan,
        rng: Random,
        broker: FakeBroker,
        etcd: FakeEtcd,
    ) -> None:
        self.life = life
        life.may_ack = lambda: not self.running.ledger.halted
        super().__init__(
            service,
            broker,
            etcd,
            plan.settings,
            loop=life,
            random=Random(rng.getrandbits(64)),
            threads=partial(Threads, starts_after_s=lambda: rng.expovariate(1000)),
            log=TraceLog(life.trace, life.name, lambda: life.alive),
            cache_entries=plan.cache_entries,
            max_bytes=plan.max_bytes,
        )

    @property
    def token(self) -> str:
        """What the tokens of its records begin with; empty where it has not come so far."""
        return self.running.process if hasattr(self, "running") else ""

    @property
    def is_idle(self) -> bool:
        """Whether it is not frozen, and has no event in flight."""
        thawed = self.life.frozen_until_s <= self.life.agenda.now_s
        return thawed and not (hasattr(self, "running") and self.running.consumer.busy)

    def judge_counts(self) -> None:
        """Hold the contract's sum."""
        if miscounted := hasattr(self, "running") and self.miscounted():
            self.life.trace.violation("the counters do not add up", self.life.name, miscounted)

    def stop(self) -> None:
        """Stop it; a second signal changes nothing."""
        if hasattr(self, "running"):
            in_hand = self.running.intake.in_hand
            self.life.trace.fault("stopped", self.life.name, f"{in_hand} in hand")
            super().stop()

    def _ended(self, task: Any) -> None:
        super()._ended(task)
        self.judge_counts()
        self.life.end()
