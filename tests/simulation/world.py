"""One run: a world drawn from a seed, with its processes and faults, judged at its end."""

from __future__ import annotations

import gc
import math
import traceback
from collections import Counter
from collections.abc import Callable, MutableMapping
from functools import partial
from random import Random
from typing import Any, NoReturn

from pika import spec
from structlog import DropEvent

from idempotent_consumer import Service
from idempotent_consumer.bus import COMMITS_IN_FLIGHT, MAX_BYTES_IN_FLIGHT
from idempotent_consumer.settings import Settings
from idempotent_consumer.testing.broker import ChannelError, Sent, Session
from idempotent_consumer.testing.etcd import Call
from idempotent_consumer.testing.loop import Killed, Threads
from idempotent_consumer.testing.process import Process, captured
from simulation.checker import Checker
from simulation.run import OF_DATA, OF_PROCESSES, PER_MESSAGE, PER_REQUEST, SERVICE, Plan, Run
from simulation.servers import DEAD_LETTERS, SimulatedBroker, SimulatedEtcd
from simulation.workload import Handlers, Outside, Producer

DRAINED_WITHIN_S = 400.0
"""Far longer than the retries, the longest lease and the calls on few threads together, and shorter
than the ten minutes after which a process takes a new lease for its records."""

_HEARD_WITHIN_S = 2.0
"""By then everything has followed from the last event."""

_LOOKED_AT_EVERY = 8
"""The number of steps between two checks whether a run is over."""

_MOST_STEPS = 400_000
_NOTICED_WITHIN_S = 15.0
"""A process notices by then that etcd was wiped or restored: it asks every 5 s, and once more after
a lost request."""


class Life(Process):
    """A process from its start to its end.

    Its steps are counted: each callback, and within it each action that the outside sees. It dies
    at step ``dies_at``, and freezes between two callbacks at the steps in ``freezes_at``, which has
    the seconds. Of the requests that etcd has answered, ``last_answered`` is the highest number and
    ``highest_revision`` the highest revision. ``told_s`` is when it last heard of each record, and
    ``lineage`` the index of the life of etcd's data that it reached first.
    """

    broker: SimulatedBroker

    def __init__(self, world: World, slot: int, number: int) -> None:
        run = self.run = world.run
        rng, plan = run.rng, run.plan
        self.world, self.slot, self.number, self.name = world, slot, number, f"p{slot}.{number}"
        self.ended_s: float | None = None
        self.steps, self.dies_at, self._cancelled = 0, 0, False
        self.freezes_at: dict[int, float] = {}
        self.last_answered = self.highest_revision = 0
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
        run.note(self.name, "starts")

    # Where it freezes and dies.

    def between_steps(self) -> None:
        self.steps += 1
        if self.steps == self.dies_at and self.run.faulty:
            self.run.fault("killed between two steps", self.name)
            self.end()
        elif self.steps in self.freezes_at and self.run.faulty:
            self.freeze(self.freezes_at[self.steps])

    def act(self, when: str, what: Any) -> None:
        super().act(when, what)
        if when == "before" and isinstance(what, Sent):
            self._judge_method(what.method)
        self.steps += 1
        if self.steps == self.dies_at and self.in_step and self.run.faulty:
            self.run.fault("killed within a step", self.name)
            self.end()
            raise Killed

    def _judge_method(self, method: Any) -> None:
        """Judge what the process is about to send to the broker."""
        if isinstance(method, spec.Basic.Consume) and not self.last_answered:
            self.run.violation("consuming before etcd is ready", self.name)
        if isinstance(method, spec.Basic.Ack) and self.running.ledger.halted:
            kind = "an ack by a process that knows that etcd is another"
            self.run.violation(kind, self.name, method)
        # Each costs a message one of its returns. After a cancel pika itself rejects deliveries.
        if isinstance(method, spec.Basic.Reject) and not self._cancelled:
            self.run.violation("a delivery was handed back", self.name, method.delivery_tag)
        self._cancelled |= isinstance(method, spec.Basic.Cancel)

    def freeze(self, seconds: float) -> None:
        self.run.fault("frozen", self.name, round(seconds, 2))
        super().freeze(seconds)
        self.broker.go_silent(self, seconds)

    def stop(self) -> None:
        in_flight = self.running.intake.in_hand
        self.run.note(self.name, f"is stopped, {in_flight} in flight")
        super().stop()

    def end(self) -> None:
        if self.ended_s is None:
            self.ended_s = self.agenda.now_s
            self.run.note(self.name, "is gone")
            self.world.ended(self)
            self.kill()

    def on_defect(self, error: BaseException) -> None:
        lines = traceback.format_exception(error)
        self.run.violation("an exception ended the process", repr(error), *lines[-5:])

    # What is known of it.

    def hear(self, call: Call) -> None:
        """Remember what the process has learned from a reply of etcd."""
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
        """What the tokens of its records begin with; empty before its first step."""
        return self.running.process if hasattr(self, "running") else ""

    @property
    def is_idle(self) -> bool:
        """Whether it is not frozen, and has read and settled everything."""
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
        """Note the library's log lines in the run's account, while the process is alive."""
        if self.alive:
            event = line.pop("event")
            if event.startswith("circuit breaker closed"):
                self.run.fired["held by a circuit breaker"] += line["held"]
            self.run.note(self.name, event, line)
        raise DropEvent


class World:
    """Everything in a run."""

    def __init__(self, run: Run) -> None:
        self.run, self.plan, self.agenda = run, run.plan, run.agenda
        self.etcd = SimulatedEtcd(run)
        self.store = self.etcd.store
        self.broker = SimulatedBroker(run, self.store)
        self.outside = Outside(run)
        self.producer = Producer(run, self.broker)
        self.lives: list[Life] = []
        self._kills_left = int(self.plan.rates.get("killed", 0))
        self._freezes_left = int(self.plan.rates.get("frozen", 0))
        self._may_start, self._snapshot = True, self.store.snapshot()
        plan, rng, later = self.plan, self.run.rng, self.agenda.later
        for slot in range(plan.replicas):
            later(rng.uniform(0.0, 1.0), partial(self._start, slot, 1))
        for kind, happen in TIMED.items():
            for _ in range(int(plan.rates.get(kind, 0))):
                # Some at the very start: a service must also cope with faults while it starts.
                at_s = rng.uniform(0.0, plan.faulty_s) * rng.choice([0.02, 1.0, 1.0, 1.0])
                later(at_s, partial(happen, self, kind))
        if "etcd restored" in plan.rates:
            later(rng.uniform(0.0, plan.faulty_s), self._take_snapshot)

    def play(self) -> None:
        self._pass_s(self.plan.faulty_s)
        self.run.note("", "no more faults from here on")
        self.run.faulty = False
        self.etcd.be_away(False)
        self.broker.be_away(False)
        self.store.out_of_space = False
        for kind in OF_DATA:
            if kind in self.plan.rates and not self._broken():
                self._lose_data(kind)
        self._pass_s(DRAINED_WITHIN_S, self._is_over)
        if not self._broken() and not self._is_drained():
            left = [message.body for message in self.broker.unsettled(DEAD_LETTERS)]
            held = sum(life.running.consumer.held for life in self.running())
            self.run.violation("stuck", f"{len(left)} not settled, {held} held,", left[:3])
        self._pass_s(_HEARD_WITHIN_S)
        if not self._broken():
            Checker(self).judge()
        for life in self.lives:
            life.kill()

    def _pass_s(self, seconds: float, enough: Callable[[], bool] = lambda: False) -> None:
        """Let time pass, at most until ``enough`` returns true or the run is broken."""
        agenda = self.agenda
        agenda.run(
            agenda.now_s + seconds,
            lambda: agenda.happened % _LOOKED_AT_EVERY == 0 and (self._broken() or enough()),
        )

    def _broken(self) -> bool:
        if self.agenda.happened > _MOST_STEPS and not self.run.violations:
            self.run.violation("a hot loop", f"{self.agenda.happened} steps")
        return bool(self.run.violations)

    def _is_drained(self) -> bool:
        return not (self.producer.unsent or any(self.broker.unsettled(DEAD_LETTERS)))

    def _is_over(self) -> bool:
        """Return whether all is settled, and nothing under way can still have an effect.

        Requests may apply late, processes may be frozen, and a call may last longer than its event,
        which another process has settled. What a process reads after its session has ended, it
        handles once more.
        """
        return (
            self._is_drained()
            and self.agenda.now_s >= self.etcd.applies_until_s
            and all(life.is_idle for life in self.living())
        )

    def _take_snapshot(self) -> None:
        self._snapshot = self.store.snapshot()
        self.run.note("etcd", "a snapshot is taken at revision", self.store.revision)

    # Processes.

    def _start(self, slot: int, number: int) -> None:
        if not self._may_start:
            self.agenda.later(1.0, partial(self._start, slot, number))
            return
        run, rng = self.run, self.run.rng
        life = Life(self, slot, number)
        Handlers(life, self.outside)
        # It dies and freezes at early steps as likely as at late ones.
        if run.faulty and self._kills_left and rng.random() < 0.8:
            self._kills_left -= 1
            life.dies_at = int(math.exp(rng.uniform(math.log(4), math.log(600))))
        while run.faulty and self._freezes_left and rng.random() < 0.7:
            self._freezes_left -= 1
            step = int(math.exp(rng.uniform(math.log(4), math.log(600))))
            seconds = rng.choice([rng.uniform(0.5, 5.0), rng.uniform(5.0, 40.0)])
            life.freezes_at[step] = min(seconds, self.plan.longest_freeze_s)
        self.lives.append(life)

    def ended(self, life: Life) -> None:
        """Note the end of a process, and start another one in its place."""
        if not life.in_step or life.task.done():
            life.judge_counts()
        self.outside.process_ended(life)
        self.broker.gone(life)
        rng = self.run.rng
        again_s = rng.choice([rng.uniform(0.05, 2.0), rng.uniform(2.0, 30.0)])
        self.agenda.later(again_s, partial(self._start, life.slot, life.number + 1))

    def living(self) -> list[Life]:
        return [life for life in self.lives if life.alive]

    def running(self) -> list[Life]:
        """Return the living processes that have done their first step."""
        return [life for life in self.living() if life.token]

    def _lose_data(self, kind: str) -> None:
        """Wipe or restore etcd; those who can know must not settle. Restart all processes."""
        run = self.run
        if run.rng.random() < 0.5:
            # What is unconfirmed when the data is lost is confirmed once the loss is known.
            seconds = (_NOTICED_WITHIN_S / 2, 2 * _NOTICED_WITHIN_S)
            run.lasts("alarm", "broker", seconds, self.broker.set_alarm)
            self._pass_s(_NOTICED_WITHIN_S / 3)
        # Commits under way may raise the restored etcd's revision before their senders see a reply.
        known = self._snapshot.revision + COMMITS_IN_FLIGHT * self.plan.replicas + 4
        living = self.living()
        knowing = [
            life
            for life in living
            if life.frozen_until_s < self.agenda.now_s
            and life.last_answered
            and (kind == "etcd wiped" or life.highest_revision > known)
        ]
        run.fault(kind, "etcd", f"{len(knowing)} processes know better")
        self._may_start = False
        if kind == "etcd wiped":
            # Other services write to it too, so its revision may be any.
            revision = self.store.revision
            self.store.wipe(run.rng.choice([1, revision, 2 * revision]))
        else:
            self.store.restore(self._snapshot)
        if not self.plan.restarted_at_once:
            self._pass_s(_NOTICED_WITHIN_S)
            if kind == "etcd restored" and len(knowing) < len(living):
                # Revisions do not show it if a process that has seen little past the snapshot goes
                # on writing before the others look: etcd's revision is then theirs again.
                run.fired["restored to nearly what it was"] += 1
            else:
                self.broker.must_not_ack.update(knowing)
            self._pass_s(_NOTICED_WITHIN_S)
        self._may_start = True
        for life in self.living():
            life.end()


Timed = Callable[["World", str], None]


def _lasts(
    server: str, seconds: tuple[float, float], switch: Callable[[World], Callable[[bool], None]]
) -> Timed:
    return lambda world, kind: world.run.lasts(kind, server, seconds, switch(world))


def _receiver(state: str) -> Timed:
    return _lasts("outside", (2.0, 20.0), lambda w: partial(w.outside.be, state))


def _flaps(world: World, kind: str) -> None:
    """Let the receiver be down for a moment, and again after another."""
    world.run.lasts(kind, "outside", (0.1, 2.0), partial(world.outside.be, "down"))
    if world.run.faulty and world.run.rng.random() < 0.8:
        world.agenda.later(world.run.rng.uniform(0.5, 5.0), partial(_flaps, world, kind))


TIMED: dict[str, Timed] = {
    "etcd away": _lasts("etcd", (0.5, 8.0), lambda w: w.etcd.be_away),
    "etcd away for longer than a lease": _lasts("etcd", (16.0, 45.0), lambda w: w.etcd.be_away),
    "etcd out of space": _lasts(
        "etcd", (1.0, 10.0), lambda w: partial(setattr, w.store, "out_of_space")
    ),
    "broker restarted": _lasts("broker", (0.5, 10.0), lambda w: w.broker.be_away),
    "receiver down": _receiver("down"),
    "receiver slow": _receiver("slow"),
    "receiver rejecting": _receiver("rejecting"),
    "receiver flapping": _flaps,
    "alarm": _lasts("broker", (1.0, 15.0), lambda w: w.broker.set_alarm),
    "lease revoked": lambda w, kind: w.run.hits(kind, w.etcd.leases_of_claims(), w.store.revoke),
    "connection lost": lambda w, kind: w.run.hits(kind, w.broker.connections, w.broker.cut),
    "channel closed": lambda w, kind: w.run.hits(
        kind,
        [session for session in w.broker.sessions if session.is_open],
        lambda session: session.close_channel(ChannelError(541, "INTERNAL_ERROR")),
    ),
    "consumer cancelled": lambda w, kind: w.run.hits(
        kind,
        [session for session in w.broker.sessions if session.consuming],
        Session.cancelled_by_broker,
    ),
    "queue deleted": lambda w, kind: w.run.hits(kind, w.broker.idle_retries, w.broker.delete_queue),
    "stopped": lambda w, kind: w.run.hits(kind, w.running(), Life.stop),
}
"""Faults that happen at a time, with what they do."""


def draw_plan(rng: Random) -> Plan:
    timeout_s = rng.choice([1.0, 5.0])
    delays = [(("1s", 1),), (("1s", 1), ("2s", 2)), (("1s", 1), ("5s", 5), ("10s", 10))]
    return Plan(
        replicas=rng.choice([1, 2, 2, 3]),
        settings=Settings(
            enable_etcd=True,
            batch_size=rng.choice([1, 2, 3, 8, 128]),
            etcd_max_txn_ops=rng.choice([4, 5, 16, 128]),
            retry_delays=rng.choice(delays),
            dedup_window_s=rng.choice([86400, 86400, 0]),
            calls_at_once=rng.choice([1, 4, 16]),
            breaker_failures=rng.choice([0, 2, 5]),
        ),
        cache_entries=rng.choice([4, 1000]),
        call_timeout_s=timeout_s,
        call_s=timeout_s * rng.choice([0.05, 0.4, 1.0]),
        events=rng.randint(15, 40),
        faulty_s=rng.uniform(8, 40),
        latency_s=rng.choice([0.001, 0.02, 0.2]),
        max_bytes=rng.choice([8_000, 32_000, MAX_BYTES_IN_FLIGHT]),
        rates=_draw_rates(rng),
    )


def _draw_rates(rng: Random) -> dict[str, float]:
    """Draw some of the faults. One that always happened would hide others."""
    mood = rng.random()
    if mood < 0.03:
        return {}  # A run without faults, which the others are measured against.
    if mood < 0.15:
        return {"killed": rng.randint(1, 6)}
    if mood < 0.21:
        # Alone too: where no process dies, a late request has the most time to do harm.
        return {"applied late": rng.uniform(0.1, 0.4)}
    often = rng.choice([0.02, 0.1, 0.3])
    single = [fault for fault in (*PER_REQUEST, *PER_MESSAGE) if rng.random() < 0.35]
    rates = {fault: often * rng.uniform(0.3, 1.5) for fault in single}
    several = [fault for fault in (*TIMED, *OF_PROCESSES) if rng.random() < 0.25]
    rates.update({fault: rng.randint(1, 4) for fault in several})
    if rng.random() < 0.12:
        rates[rng.choice(OF_DATA)] = 1
    return rates


def simulate(seed: int, draw: Callable[[Random], Plan] = draw_plan) -> World:
    """Do one run and return what it leaves. Equal seeds are equal runs, step by step."""
    world = World(Run(seed, draw))
    world.play()
    return world


def run_seeds(seeds: range) -> tuple[Counter[str], int | None]:
    """Run seeds up to the first violation; return what has fired, and that seed.

    The counter includes "runs", and the "confirmed" and "acked" messages in them.
    """
    fired = Counter[str]()
    broken = None
    gc.disable()  # It would take a sixth of the time. 50 runs leave some 60 MB.
    for seed in seeds:
        world = simulate(seed)
        confirmed, acked = len(world.producer.confirmed), len(world.broker.acked)
        fired += world.run.fired + Counter(runs=1, confirmed=confirmed, acked=acked)
        if world.run.violations:
            broken = seed
            break
    gc.enable()
    return fired, broken
