"""One process of the service: its life on the simulated clock, where it freezes and dies."""

from __future__ import annotations

import traceback
from collections.abc import Callable, MutableMapping
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, NoReturn

from pika import spec
from structlog import DropEvent

from idempotent_consumer import Service
from idempotent_consumer.testing.broker import Sent
from idempotent_consumer.testing.etcd import Call
from idempotent_consumer.testing.loop import Killed, Threads
from idempotent_consumer.testing.process import Process, captured
from simulation.run import SERVICE

if TYPE_CHECKING:
    from simulation.servers import SimulatedBroker
    from simulation.world import World


class Life(Process):
    """A process from its start to its end.

    Steps are counted: each callback, and within it each action that the outside sees. It dies
    at the step that ``dies_at`` says and freezes, between two callbacks, at those in
    ``freezes_at``, which has the seconds. What etcd has told it: ``answered`` requests, the last
    of them number ``last_answered``, up to the ``highest_revision``; ``told_s`` is when it was
    last told of each record, ``lineage`` the life of etcd's data that it has reached first.
    """

    broker: SimulatedBroker

    def __init__(self, name: str, world: World, on_ended: Callable[[Life], None]) -> None:
        run = self.run = world.run
        rng, plan = run.rng, run.plan
        self.name, self._on_ended = name, on_ended
        self.ended_s: float | None = None
        self.steps, self.dies_at, self._cancelled = 0, 0, False
        self.freezes_at: dict[int, float] = {}
        self.answered = self.last_answered = self.highest_revision = 0
        self.told_s: dict[bytes, float] = {}
        self.lineage: int | None = None
        super().__init__(
            Service(SERVICE, noun="orders"),
            world.broker,
            world.etcd,
            plan.settings,
            clock_s=rng.uniform(0.0, 1e5),
            random=Random(rng.getrandbits(64)),
            threads=partial(Threads, starts_after_s=lambda: rng.expovariate(1000)),
            log=captured(self._note_line),
            cache_entries=plan.cache_entries,
            max_bytes=plan.max_bytes,
        )
        self.task.add_done_callback(lambda _: self.end())
        run.note(name, "starts")

    # Where it freezes and dies.

    def between_steps(self) -> None:
        self.steps += 1
        if self.steps == self.dies_at:
            self.run.fault("killed between two steps", self.name)
            self.end()
        elif self.steps in self.freezes_at:
            self.freeze(self.freezes_at[self.steps])

    def act(self, when: str, what: Any) -> None:
        super().act(when, what)
        if when == "before" and isinstance(what, Sent):
            self._judge_method(what.method)
        self.steps += 1
        if self.steps == self.dies_at and self.in_step:
            self.run.fault("killed within a step", self.name)
            self.end()
            raise Killed

    def _judge_method(self, method: Any) -> None:
        """Judge what the process is about to send to the broker."""
        if isinstance(method, spec.Basic.Consume) and not self.answered:
            self.run.violation("consuming before etcd is ready", self.name)
        if isinstance(method, spec.Basic.Ack) and self.running.ledger.halted:
            kind = "an ack by a process that knows that etcd is another"
            self.run.violation(kind, self.name, method)
        # Each costs a message one of its returns. pika does so with what arrives behind a cancel.
        if isinstance(method, spec.Basic.Reject) and not self._cancelled:
            self.run.violation("a delivery was handed back", self.name, method.delivery_tag)
        self._cancelled |= isinstance(method, spec.Basic.Cancel)

    def freeze(self, seconds: float) -> None:
        self.run.fault("frozen", self.name, round(seconds, 2))
        super().freeze(seconds)
        self.broker.go_silent(self, seconds)

    def stop(self) -> None:
        """Stop it as SIGTERM does; a second signal changes nothing."""
        in_flight = self.running.intake.in_hand
        self.run.note(self.name, f"is stopped, {in_flight} in flight")
        super().stop()

    def end(self) -> None:
        if self.ended_s is None:
            self.ended_s = self.agenda.now_s
            self.run.note(self.name, "is gone")
            self._on_ended(self)
            self.kill()

    def on_defect(self, error: BaseException) -> None:
        """Judge what would end a real service, and never should."""
        lines = traceback.format_exception(error)
        self.run.violation("an exception ended the process", repr(error), *lines[-5:])

    # What is known of it.

    def hear(self, call: Call) -> None:
        """Remember what etcd has told: how these records stand is known from now on."""
        self.answered += 1
        self.last_answered = max(self.last_answered, call.number)
        self.highest_revision = max(self.highest_revision, call.outcome.header.revision)
        if call.method == "Txn":
            if self.lineage is None:
                self.lineage = call.life - 1
            if call.outcome.succeeded:
                for operation in call.request.success:
                    key = getattr(operation, operation.WhichOneof("request")).key
                    self.told_s[key] = self.agenda.now_s

    @property
    def token(self) -> str:
        """What the tokens of its records begin with, once its first step is behind it."""
        return self.running.process if hasattr(self, "running") else ""

    @property
    def is_idle(self) -> bool:
        """Whether it is not frozen, has no event in flight, and has read what was sent to it."""
        connections = self.broker.connections_of(self)
        return (
            self.frozen_until_s <= self.agenda.now_s
            and not any(connection.to_client.under_way for connection in connections)
            and not (self.token and self.running.consumer.busy)
        )

    def judge_counts(self) -> None:
        if miscounted := self.miscounted():
            self.run.violation("the counters do not add up", self.name, miscounted)

    def _note_line(self, _logger: object, _level: str, line: MutableMapping[str, Any]) -> NoReturn:
        """Take the library's log into the account of the run, as long as the process lives."""
        if self.alive:
            event = line.pop("event")
            if event.startswith("circuit breaker closed"):
                self.run.fired["held by a circuit breaker"] += line["held"]
            self.run.note(self.name, event, line)
        raise DropEvent
