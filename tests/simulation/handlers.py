"""The service's handlers, every kind that a user can write, and the outside that they call."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from idempotent_consumer import Service
from idempotent_consumer.event import Effect, Event, Publish, Put
from simulation.process import Life
from simulation.run import SERVICE, Run
from simulation.workload import ANNOUNCED, Sent

SHARED_KEY = "/latest"
PARTS = 3

Wanted = Callable[[Event], Sequence[Effect]]


@dataclass
class Call:
    """One call as the outside sees it, from its start to its end on the world's clock.

    ``reached`` is false where the process died before the request had left it. ``cut_s`` is when
    the process gave it up before its end. ``decided_s`` is when it looked at its claim: long
    before the start, where it froze in between.
    """

    event: Event
    life: Life
    decided_s: float
    start_s: float
    end_s: float
    raised: bool
    reached: bool = True
    cut_s: float | None = None

    @property
    def returned(self) -> bool:
        """Whether the process has had the answer."""
        ended_s = self.life.ended_s
        return self.cut_s is None and (ended_s is None or ended_s >= self.end_s)

    def result(self, wanted: Wanted) -> Sequence[Effect]:
        """Return what the handler returns, or raise."""
        if self.raised:
            raise ConnectionError("refused")
        return wanted(self.event)


class Outside:
    """Takes the calls and keeps them. ``runs`` has the event of each run of a pure handler."""

    def __init__(self, run: Run) -> None:
        self._rng, self._plan, self._run = run.rng, run.plan, run
        self.calls: list[Call] = []
        self.runs: list[Event] = []

    def call(self, event: Event, life: Life, raises: bool) -> Call:
        """Make a call, which ends within the handler's time-out."""
        decided_s = life.agenda.now_s
        if "frozen" in self._plan.rates and self._rng.random() < 0.03:
            # The narrow place that no lease can guard: frozen just before it sends.
            life.freeze(min(self._rng.uniform(1.0, 40.0), self._plan.longest_freeze_s))
        start_s = max(decided_s, life.frozen_until_s)
        took_s = self._rng.uniform(0.0, self._plan.call_s)
        call = Call(event, life, decided_s, start_s, start_s + took_s, raises)
        self.calls.append(call)
        self._run.note(life.name, "calls", event.id, f"until {call.end_s:.3f}")
        return call

    def process_ended(self, life: Life) -> None:
        """Decide what the outside has seen of the calls that were under way."""
        now_s = life.agenda.now_s
        for call in self.calls:
            if call.life is life and call.cut_s is None and now_s < call.end_s:
                call.reached = self._rng.random() < 0.5 and call.start_s <= now_s
                call.end_s = now_s if math.isinf(call.end_s) else call.end_s
                which = "reached" if call.reached else "did not reach"
                self._run.fault(f"killed in a call that {which} the outside", life.name)


def effect_keys(event_type: str, event_id: str) -> list[str]:
    """Return the keys that a type's handler writes, but for the one that events share."""
    if event_type == "parts":
        return [f"/parts/{event_id}/{number}" for number in range(PARTS)]
    if event_type in ("order", "flaky", "flaky_call", "announce", "call_announce"):
        return [f"/{event_type}/{event_id}"]
    return []


def announcements(sent: Sent) -> list[bytes]:
    """Return the bodies of the events that an event's handler publishes."""
    if not sent.event_type.endswith("announce"):
        return []
    number = orjson.loads(sent.body)["args"]["number"]
    return [
        orjson.dumps({"id": f"{sent.event_id}/{SERVICE}/{n}", "type": ANNOUNCED, "args": args})
        for n, args in enumerate([{"number": number}, {}])
    ]


def effects(event: Event) -> list[Put]:
    """Return what most handlers write."""
    value = event.digest.encode()
    return [Put(key, value) for key in effect_keys(event.type, event.id)]


def announce(event: Event) -> list[Effect]:
    """Return what is written, between two events to be published."""
    number = Publish(ANNOUNCED, {"number": event.args["number"]})
    return [number, *effects(event), Publish(ANNOUNCED)]


class Handlers:
    """The handlers of one process."""

    def __init__(self, life: Life, outside: Outside) -> None:
        self._life, self._outside = life, outside
        self._rng, self._plan = life.run.rng, life.run.plan

    def register(self, service: Service) -> None:
        """Give them to a service; a claimed one is a coroutine function or a plain one."""
        for event_type, function in {
            "order": effects,
            "parts": effects,
            "nothing": lambda _: None,
            "shared": lambda event: Put(SHARED_KEY, event.digest.encode()),
            "flaky": self._flaky,
            "doomed": self._doomed,
            "greedy": self._greedy,
            "announce": announce,
        }.items():
            service.handler(event_type)(self._pure(function))
        for event_type, fails, wanted in (
            ("call", 0.0, effects),
            ("call_announce", 0.0, announce),
            ("flaky_call", 0.4, effects),
            ("doomed_call", 1.0, effects),
        ):
            claimed = self._coroutine if self._rng.random() < 0.5 else self._on_thread
            register = service.claimed_handler(event_type, timeout_s=self._plan.call_timeout_s)
            register(claimed(fails, wanted))

    def _flaky(self, event: Event) -> list[Put]:
        if self._rng.random() < 0.4:
            raise RuntimeError("out of stock")
        return effects(event)

    def _doomed(self, _: Event) -> list[Put]:
        raise RuntimeError("never in stock")

    def _greedy(self, event: Event) -> list[Put]:
        operations = self._plan.settings.etcd_max_txn_ops
        return [Put(f"/greedy/{event.id}/{n}", b"") for n in range(operations)]

    def _pure(self, function: Callable[[Event], Any]) -> Callable[[Event], Any]:
        def run(event: Event) -> Any:
            self._outside.runs.append(event)
            return function(event)

        return run

    def _call(self, event: Event, fails: float) -> Call:
        return self._outside.call(event, self._life, self._rng.random() < fails)

    def _on_thread(self, fails: float, wanted: Wanted) -> Callable[..., Any]:
        def run(event: Event, _timeout_s: float) -> Sequence[Effect]:
            call = self._call(event, fails)
            self._life.spend(call.end_s - self._life.agenda.now_s)
            return call.result(wanted)

        return run

    def _coroutine(self, fails: float, wanted: Wanted) -> Callable[..., Any]:
        async def run(event: Event, _timeout_s: float) -> Sequence[Effect]:
            call = self._call(event, fails)
            if call.raised and self._rng.random() < 0.3:
                call.end_s = math.inf  # It fails by its time-out.
            try:
                await asyncio.sleep(call.end_s - self._life.agenda.now_s)
            except asyncio.CancelledError:
                call.cut_s = self._life.agenda.now_s
                call.end_s = min(call.end_s, call.cut_s)
                self._life.run.fault("call cut off", self._life.name)
                raise
            # It has ended, though the clock may be a rounding error before its end.
            call.end_s = min(call.end_s, self._life.agenda.now_s)
            return call.result(wanted)

        return run
