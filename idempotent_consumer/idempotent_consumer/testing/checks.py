"""Checks for handlers of your own: what the outside sees stays the same, whatever happens twice.

Both run a fresh service in memory again and again, and compare what came of it with an undisturbed
run: the keys that were written, the events that were published (each once: a repeat has the same
id) and ``outside``, which is what you make of it: what a `Receiver` has stored, a list of files.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from ..service import Service
from .world import InMemory

Events = Sequence[Mapping[str, Any]]
Make = Callable[[], tuple[Service, Callable[[], object]]]
"""Returns a fresh service, and a function that returns what the outside has seen of it."""

_SEEDS = 20
_TIMES = 3


class Seen(NamedTuple):
    """What came of a run."""

    effects: dict[str, bytes]
    published: list[str]
    parked: list[tuple[bytes, str]]
    outside: object


def check_duplicates(make: Make, events: Events) -> None:
    """Deliver each event several times, in many orders and batches.

    Raises AssertionError where that is seen, with the deliveries in their order.
    """
    undisturbed, _ = _run(make, [events])
    for seed in range(_SEEDS):
        chance = random.Random(seed)
        deliveries = _repeated(events, chance)
        seen, _ = _run(make, _in_batches(deliveries, chance))
        order = ", ".join(str(event.get("id")) for event in deliveries)
        _compare(undisturbed, seen, f"with deliveries in the order {order}")


def check_crashes(make: Make, events: Events) -> None:
    """Kill the process at each of its steps in turn, and let another one go on.

    Raises AssertionError where that is seen, with the step. A handler with an effect outside is
    called again after some of them: the receiver has to know a repeat by the event's id.
    """
    undisturbed, steps = _run(make, [events])
    for number, step in enumerate(steps, start=1):
        seen, _ = _run(make, [events], dies_at=number)
        _compare(undisturbed, seen, f"killed at step {number}, {step}")


def _run(
    make: Make, batches: Sequence[Events], dies_at: int | None = None
) -> tuple[Seen, list[str]]:
    service, outside = make()
    world = InMemory(service, dies_at=dies_at)
    for batch in batches:
        world.publish(*batch)
    published = sorted({str(event) for event in world.published})
    parked = sorted({(letter.body, letter.reason) for letter in world.parked})
    return Seen(world.effects, published, parked, outside()), world.steps


def _repeated(events: Events, chance: random.Random) -> list[Mapping[str, Any]]:
    """Return each event several times. The first copies keep their order: it may mean something."""
    deliveries = list(events)
    for event in events:
        first = next(at for at, other in enumerate(deliveries) if other is event)
        for _ in range(_TIMES - 1):
            deliveries.insert(chance.randint(first + 1, len(deliveries)), event)
    return deliveries


def _in_batches(deliveries: Events, chance: random.Random) -> list[Events]:
    cuts = sorted(chance.sample(range(len(deliveries) + 1), min(3, len(deliveries) + 1)))
    edges = [0, *cuts, len(deliveries)]
    return [deliveries[start:end] for start, end in pairwise(edges)]


def _compare(undisturbed: Seen, seen: Seen, how: str) -> None:
    for what, expected, found in zip(Seen._fields, undisturbed, seen, strict=True):
        if found != expected:
            raise AssertionError(
                f"{what} differs {how}:\n  {found!r}\nundisturbed it is\n  {expected!r}"
            )
