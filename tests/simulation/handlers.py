"""The service's handlers: every kind that a user can write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from random import Random

import orjson

from idempotent_consumer.effects import Effect, Effects, Publish, Put
from idempotent_consumer.event import Event
from idempotent_consumer.handlers import Handler, PureHandler
from simulation.calls import Outside, SimulatedPool
from simulation.keys import SERVICE
from simulation.life import Life
from simulation.plan import Plan
from simulation.workload import ANNOUNCED, Sent

SHARED_KEY = "/latest"
PARTS = 3


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


def make_handlers(
    life: Life, outside: Outside, pool: SimulatedPool, rng: Random, plan: Plan
) -> dict[str, Handler]:
    """Return the handlers of one process."""

    def sometimes(event: Event) -> list[Put]:
        if rng.random() < 0.4:
            raise RuntimeError("out of stock")
        return effects(event)

    def always(_: Event) -> list[Put]:
        raise RuntimeError("never in stock")

    def shared(event: Event) -> Put:
        return Put(SHARED_KEY, event.digest.encode())

    def greedy(event: Event) -> list[Put]:
        return [Put(f"/greedy/{event.id}/{n}", b"") for n in range(plan.settings.etcd_max_txn_ops)]

    def calling(
        fails: float, wanted: Callable[[Event], Sequence[Effect]] = effects
    ) -> Callable[[Event, float], Sequence[Effect]]:
        def call(event: Event, _timeout_s: float) -> Sequence[Effect]:
            raises = rng.random() < fails
            pool.current = outside.call(event, life, raises)
            if raises:
                raise ConnectionError("refused")
            return wanted(event)

        return call

    pure, timeout_s = partial(_pure, outside), plan.call_timeout_s
    return {
        "order": pure(effects),
        "parts": pure(effects),
        "nothing": pure(lambda _: None),
        "shared": pure(shared),
        "flaky": pure(sometimes),
        "doomed": pure(always),
        "greedy": pure(greedy),
        "announce": pure(announce),
        "call": Handler(calling(0.0), timeout_s),
        "call_announce": Handler(calling(0.0, announce), timeout_s),
        "flaky_call": Handler(calling(0.4), timeout_s),
        "doomed_call": Handler(calling(1.0), timeout_s),
    }


def _pure(outside: Outside, function: PureHandler) -> Handler:
    """Return a pure handler whose runs are kept."""

    def run(event: Event) -> Effects:
        outside.runs.append(event)
        return function(event)

    return Handler(run)
