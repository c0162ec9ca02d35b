"""The service's handlers: every kind that a user can write."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random

from idempotent_consumer.event import Event
from idempotent_consumer.handlers import Effects, Handler, PureHandler
from idempotent_consumer.ledger.records import Put
from simulation.calls import Outside, SimulatedPool
from simulation.life import Life
from simulation.plan import Plan

SHARED_KEY = "/latest"
PARTS = 3


def effect_keys(event_type: str, event_id: str) -> list[str]:
    """Return the keys that a type's handler writes, but for the one that events share."""
    if event_type == "parts":
        return [f"/parts/{event_id}/{number}" for number in range(PARTS)]
    if event_type in ("order", "flaky", "flaky_call"):
        return [f"/{event_type}/{event_id}"]
    return []


def make_handlers(life: Life, outside: Outside, pool: SimulatedPool, rng: Random, plan: Plan
                  ) -> dict[str, Handler]:
    """Return the handlers of one process."""

    def effects(event: Event) -> list[Put]:
        value = event.digest.encode()
        return [Put(key, value) for key in effect_keys(event.type, event.id)]

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

    def calling(fails: float) -> Callable[[Event, float], list[Put]]:
        def call(event: Event, _timeout_s: float) -> list[Put]:
            raises = rng.random() < fails
            pool.current = outside.call(event, life, raises)
            if raises:
                raise ConnectionError("refused")
            return effects(event)

        return call

    pure, timeout_s = partial(_pure, outside), plan.call_timeout_s
    return {
        "order": pure(effects), "parts": pure(effects), "nothing": pure(lambda _: None),
        "shared": pure(shared), "flaky": pure(sometimes), "doomed": pure(always),
        "greedy": pure(greedy), "call": Handler(calling(0.0), timeout_s),
        "flaky_call": Handler(calling(0.4), timeout_s),
        "doomed_call": Handler(calling(1.0), timeout_s),
    }


def _pure(outside: Outside, function: PureHandler) -> Handler:
    """Return a pure handler whose runs are kept."""
    def run(event: Event) -> Effects:
        outside.runs.append(event)
        return function(event)

    return Handler(run)
