"""One run: a world drawn from a seed, its faults, its end, and the judgement."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from idempotent_consumer import Service
from idempotent_consumer.bus import COMMITS_IN_FLIGHT
from idempotent_consumer.testing.amqp import Connection
from idempotent_consumer.testing.loop import Agenda
from simulation.auditor import Auditor
from simulation.broker import SimulatedBroker
from simulation.checker import judge
from simulation.etcd import HistoricStore, SimulatedEtcd
from simulation.faults import Faults
from simulation.handlers import Handlers, Outside
from simulation.keys import SERVICE
from simulation.plan import OF_DATA, TIMED, Plan, draw_plan
from simulation.process import Life, SimulatedProcess
from simulation.trace import Trace
from simulation.workload import Producer

DRAINED_WITHIN_S = 400.0
"""Far more than the retries, the longest lease and the calls on few threads add up to, and less
than the ten minutes after which a process takes a new lease for its records by itself."""

_OVER_WITHIN_S = 60.0
"""Requests apply late, processes are frozen, and calls go on whose events others have ended."""

_HEARD_WITHIN_S = 2.0
"""So long after the last of that, whatever follows from it has."""

_LOOKED_AT_EVERY = 8
"""So many steps apart it is looked at whether a run is over."""

_MOST_STEPS = 400_000
_NOTICED_WITHIN_S = 15.0
"""A wiped or restored etcd: its guard asks every 5 s, and once more after a lost request."""


@dataclass
class Result:
    """What a run came to."""

    seed: int
    plan: str
    violations: list[str]
    fired: Counter[str]
    confirmed: int
    acks: int
    trace: Trace = field(repr=False)

    def report(self) -> str:
        """Write everything there is to know, for a reader."""
        return (
            f"seed {self.seed}: {self.plan}\n{self.trace.text()}\n"
            f"seed {self.seed}: {self.plan}\n" + "\n".join(self.violations)
        )


def simulate(seed: int) -> Result:
    """Do one run. Equal seeds are equal runs, step by step."""
    world = run_world(seed)
    return Result(
        seed,
        world.plan.describe(),
        world.trace.violations,
        world.trace.fired,
        len(world.producer.confirmed),
        world.auditor.acks,
        world.trace,
    )


def run_world(seed: int, draw: Callable[[random.Random], Plan] = draw_plan) -> World:
    """Do one run of a plan that is drawn, and return everything that it leaves behind."""
    world = World(seed, draw)
    world.run()
    world.end()
    return world


class World:
    """Everything in a run."""

    def __init__(self, seed: int, draw: Callable[[random.Random], Plan]) -> None:
        self.rng = rng = random.Random(seed)
        self.agenda = agenda = Agenda()
        self.trace = trace = Trace(agenda.time)
        self.plan = plan = draw(rng)
        self.store = HistoricStore(agenda, plan.settings.etcd_max_txn_ops, trace)
        self.etcd = SimulatedEtcd(agenda, self.store, rng, plan, trace)
        self.auditor = Auditor(self.store, trace)
        self.broker = SimulatedBroker(agenda, rng, plan, trace, self.auditor)
        self.outside = Outside(rng, plan, trace)
        self.faults = Faults(rng, self.broker, self.etcd, trace)
        self.producer = Producer(rng, plan, self.broker)
        self.processes: list[SimulatedProcess] = []
        self.kills_left = int(plan.rate("killed"))
        self.freezes_left = int(plan.rate("frozen"))
        self.faulty = True
        self.may_start = True
        self._schedule()

    def run(self) -> None:
        """Run to the end, and judge."""
        ends_s = self.plan.faulty_s
        self.agenda.run(ends_s, self._broken)
        self._stop_faults()
        for kind in OF_DATA:
            if self.plan.rate(kind) and not self._broken():
                self._lose_data(kind)
        self.agenda.run(self.agenda.now_s + DRAINED_WITHIN_S, self._drained)
        if not self._broken() and not (self.producer.unsent == 0 and self.broker.drained):
            self._say_stuck()
        # What is still under way may apply now, when everything seems settled.
        self.agenda.run(self.agenda.now_s + _OVER_WITHIN_S, self._is_over)
        self.agenda.run(self.agenda.now_s + _HEARD_WITHIN_S, self._broken)
        if not self._broken():
            judge(self)

    def end(self) -> None:
        """End what still runs; nothing of it is judged."""
        for process in self.processes:
            process.life.kill()

    def _schedule(self) -> None:
        plan, rng = self.plan, self.rng
        for slot in range(plan.replicas):
            self.agenda.later(rng.uniform(0.0, 1.0), partial(self._start, slot, 1))
        timed = {**self.faults.timed, "stopped": self._stop_one}
        for kind in TIMED:
            for _ in range(int(plan.rate(kind))):
                # Some at the very start: a service must also begin in a bad moment.
                at_s = rng.uniform(0.0, plan.faulty_s) * rng.choice([0.02, 1.0, 1.0, 1.0])
                self.agenda.later(at_s, timed[kind])
        if plan.rate("etcd restored"):
            self.agenda.later(rng.uniform(0.0, plan.faulty_s), self._snapshot)
        self.snapshot = self.store.take_snapshot()

    def _snapshot(self) -> None:
        self.snapshot = self.store.take_snapshot()
        self.trace.note("etcd", "a snapshot is taken at revision", self.store.revision)

    # Processes.

    def _start(self, slot: int, number: int) -> None:
        if not self.may_start:
            self.agenda.later(1.0, lambda: self._start(slot, number))
            return
        rng = self.rng
        life = Life(f"p{slot}.{number}", self.agenda, self.trace, rng.uniform(0.0, 1e5))
        self._doom(life)
        service = Service(SERVICE, noun="orders")
        Handlers(life, self.outside, rng, self.plan).register(service)
        process = SimulatedProcess(life, service, self.plan, rng, self.broker, self.etcd)
        life.on_ended.append(lambda: self._ended(process, slot, number))
        life.on_frozen.append(lambda seconds: self._frozen(process, seconds))
        self.processes.append(process)
        self.trace.note(life.name, "starts")

    def _doom(self, life: Life) -> None:
        """Decide at which steps a process dies and freezes; early ones are as likely as late."""
        rng = self.rng
        if self.faulty and self.kills_left and rng.random() < 0.8:
            self.kills_left -= 1
            life.dies_at = int(math.exp(rng.uniform(math.log(4), math.log(600))))
        while self.faulty and self.freezes_left and rng.random() < 0.7:
            self.freezes_left -= 1
            step = int(math.exp(rng.uniform(math.log(4), math.log(600))))
            seconds = rng.choice([rng.uniform(0.5, 5.0), rng.uniform(5.0, 40.0)])
            life.freezes_at[step] = min(seconds, self.plan.longest_freeze_s)

    def _ended(self, process: SimulatedProcess, slot: int, number: int) -> None:
        life = process.life
        if not life.in_step:
            process.judge_counts()
        self.outside.process_ended(life)
        for connection in self._connections(life):
            self.faults.leave(connection)
        again_s = self.rng.choice([self.rng.uniform(0.05, 2.0), self.rng.uniform(2.0, 30.0)])
        self.agenda.later(again_s, lambda: self._start(slot, number + 1))

    def _frozen(self, process: SimulatedProcess, seconds: float) -> None:
        for connection in self._connections(process.life):
            self.faults.go_silent(connection, seconds)

    def _stop_one(self) -> None:
        living = self._living()
        if living:
            self.rng.choice(living).stop()

    def _living(self) -> list[SimulatedProcess]:
        return [process for process in self.processes if process.life.alive]

    def _connections(self, life: Life) -> list[Connection]:
        return [one for one in self.broker.connections if one.loop is life]

    # The end.

    def _stop_faults(self) -> None:
        self.trace.note("", "no more faults from here on")
        self.faulty = False
        self.faults.stop_all()
        for process in self._living():
            process.life.dies_at = None
            process.life.freezes_at.clear()

    def _lose_data(self, kind: str) -> None:
        """Wipe or restore etcd; whoever knows better must not settle; then restart everything."""
        rng = self.rng
        if rng.random() < 0.5:
            # What waits for a confirm when the data goes has one when that is known.
            self.faults.alarm(_NOTICED_WITHIN_S / 2, 2 * _NOTICED_WITHIN_S)
            self.agenda.run(self.agenda.now_s + _NOTICED_WITHIN_S / 3, self._broken)
        now_s = self.agenda.now_s
        # Each commit on its way applies before its sender sees a reply, and takes the revision on.
        on_their_way = COMMITS_IN_FLIGHT * self.plan.replicas + 4
        known = self.snapshot[0].revision + on_their_way
        living = self._living()
        knowing = [
            process.life
            for process in living
            if process.life.frozen_until_s < now_s
            and process.life.answered
            and (kind == "etcd wiped" or process.life.highest_revision > known)
        ]
        self.trace.fault(kind, "etcd", f"{len(knowing)} processes know better")
        self.may_start = False
        if kind == "etcd wiped":
            # Others have data in it, too: its revision may be any.
            self.store.start_anew(rng.choice([1, self.store.revision, 2 * self.store.revision]))
        else:
            self.store.go_back(self.snapshot)
        self.etcd.end_watches()
        if not self.plan.restarted_at_once:
            self.agenda.run(now_s + _NOTICED_WITHIN_S, self._broken)
            if kind == "etcd restored" and len(knowing) < len(living):
                # Revisions alone do not tell, where a process that has seen little or nothing past
                # the snapshot writes on before the others look: etcd's revision is theirs again.
                self.trace.fired["restored to nearly what it was"] += 1
            else:
                self.auditor.must_not_ack.update(knowing)
            self.agenda.run(now_s + 2 * _NOTICED_WITHIN_S, self._broken)
        self.may_start = True
        for process in self._living():
            process.life.end()

    def _broken(self) -> bool:
        if self.agenda.happened > _MOST_STEPS and not self.trace.violations:
            self.trace.violation("a hot loop", f"{self.agenda.happened} steps")
        return bool(self.trace.violations)

    def _drained(self) -> bool:
        return self._broken() or (
            self.agenda.happened % _LOOKED_AT_EVERY == 0
            and self.producer.unsent == 0
            and self.broker.drained
        )

    def _is_over(self) -> bool:
        now_s = self.agenda.now_s
        return self._broken() or (
            self.agenda.happened % _LOOKED_AT_EVERY == 0
            and now_s >= self.etcd.applies_until_s
            and all(process.is_idle for process in self._living())
        )

    def _say_stuck(self) -> None:
        held = [message.body for message in self.broker.unacked]
        self.trace.violation(
            "stuck",
            f"{len(self.broker.queues[SERVICE].ready)} ready, {len(held)} not acked,",
            f"{self.broker.waiting} waiting for a retry",
            held[:3],
        )
