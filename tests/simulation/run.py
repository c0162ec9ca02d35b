"""What all parts of a run share: its plan, its clock, its randomness and its account."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

from grpc import StatusCode

from idempotent_consumer.etcd import CALL_TIMEOUT_S
from idempotent_consumer.settings import Settings
from idempotent_consumer.testing.etcd import TIMED_OUT, Change, Fate, refused
from idempotent_consumer.testing.loop import Agenda

# The keys as the contract has them, on purpose not read from the library's code.
SERVICE = "order"
EXCHANGE = "events"
RECORDS = b"/service/order/"
INCARNATION = b"/incarnation/order"
RECORDED = ("publishing", "done")
"""The states of a record that no other body can take over."""

PER_REQUEST: dict[str, Callable[[Random, float, float], Fate]] = {
    "request lost": lambda _, _arrives_s, fails_s: Fate(None, fails_s, TIMED_OUT),
    "reply lost": lambda _, arrives_s, fails_s: Fate(arrives_s, arrives_s + fails_s, TIMED_OUT),
    "applied late": lambda rng, _, fails_s: Fate(
        fails_s + rng.uniform(0.0, rng.choice([3.0, 30.0])), fails_s, TIMED_OUT
    ),
    "answered late": lambda rng, arrives_s, _: Fate(
        arrives_s, arrives_s + rng.uniform(0.0, CALL_TIMEOUT_S)
    ),
    "refused": lambda _, arrives_s, _fails_s: refused(
        "too many requests", StatusCode.RESOURCE_EXHAUSTED, 2 * arrives_s
    ),
    "refused login": lambda _, arrives_s, _fails_s: refused(
        "invalid auth token", StatusCode.UNAUTHENTICATED, 2 * arrives_s
    ),
}
"""Faults of a single request to etcd, with its fate: drawn, and given the delays after which a
request arrives and after which it fails."""

PER_MESSAGE = (
    "reordered",
    "confirm late",
    "publish refused",
    "dead-lettered twice",
    "publish not confirmed",
)
"""Faults of a single message."""

OF_PROCESSES = ("killed", "frozen")
"""Faults at a step of a process."""

OF_DATA = ("etcd wiped", "etcd restored")
"""Faults after which the service must stop settling. A run has at most one of them."""


def record_key(event_id: str) -> bytes:
    """Return the key of an event's record."""
    encoded = event_id.encode()
    if len(encoded) > 128 or encoded.startswith(b"sha256:"):
        encoded = b"sha256:" + hashlib.sha256(encoded).hexdigest().encode()
    return RECORDS + encoded


def records(changes: Iterable[Change]) -> Iterator[tuple[Change, dict[str, str]]]:
    """Yield each put of a record with its value."""
    for change in changes:
        if change.key.startswith(RECORDS) and change.value is not None:
            yield change, json.loads(change.value)


@dataclass
class Plan:
    """What a seed decides. ``rates`` has the probability of each fault, or its number of times.

    Fields with a default are for runs with a chosen fault; ``draw_plan`` leaves them. ``types`` are
    the events' types, which the workload draws if there are none. ``shares`` are the percentages of
    bodies that are new, duplicate, conflict, stranger and invalid. With ``restarted_at_once``
    processes are restarted before they notice a loss of etcd's data.
    """

    replicas: int
    settings: Settings
    cache_entries: int
    call_timeout_s: float
    call_s: float
    events: int
    faulty_s: float
    latency_s: float
    max_bytes: int
    rates: dict[str, float]
    types: tuple[str, ...] = ()
    shares: tuple[int, ...] = (50, 34, 6, 3, 7)
    longest_freeze_s: float = math.inf
    restarted_at_once: bool = False


class Run:
    """The clock, the randomness and the plan of a run, and its account.

    Faults happen while it is ``faulty``. ``fired`` counts them, and ``violations`` has what must
    never happen.
    """

    def __init__(self, seed: int, draw: Callable[[Random], Plan]) -> None:
        self.seed, self.rng, self.agenda = seed, Random(seed), Agenda()
        self.plan, self.faulty = draw(self.rng), True
        self.fired: Counter[str] = Counter()
        self.violations: list[str] = []
        self._lines: list[tuple[float, str, str, tuple[object, ...]]] = []

    # How a fault happens.

    def happens(self, fault: str, who: str, *about: object) -> bool:
        """Decide whether a fault hits one request or message, and count it if so."""
        rate = self.plan.rates.get(fault, 0.0)
        happens = self.faulty and rate > 0 and self.rng.random() < rate
        if happens:
            self.fault(fault, who, *about)
        return happens

    def lasts(
        self, fault: str, who: str, seconds: tuple[float, float], switch: Callable[[bool], None]
    ) -> None:
        """Switch a fault on, and off again after a time in this range."""
        lasts_s = self.rng.uniform(*seconds)
        self.fault(fault, who, round(lasts_s, 1))
        switch(True)
        self.agenda.later(lasts_s, partial(switch, False))

    def hits(self, fault: str, targets: Sequence[Any], hit: Callable[[Any], object]) -> None:
        """Let a fault hit one of the targets, if there are any."""
        if targets:
            target = self.rng.choice(targets)
            who = getattr(target, "loop", target)
            self.fault(fault, getattr(who, "name", str(who)))
            hit(target)

    def fault(self, kind: str, who: str, *about: object) -> None:
        self.fired[kind] += 1
        self.note(who, f"FAULT {kind}", *about)

    def has_fired(self, *kinds: str) -> bool:
        return any(self.fired[kind] for kind in kinds)

    def latency_s(self) -> float:
        # Bounded: a confirm after its time-out is a fault of its own, "confirm late".
        mean_s = self.plan.latency_s
        return min(self.rng.expovariate(1 / mean_s), 5 * mean_s)

    # The account.

    def note(self, who: str, what: str, *about: object) -> None:
        self._lines.append((self.agenda.now_s, who, what, about))

    def violation(self, kind: str, *about: object) -> None:
        text = " ".join([f"{kind}:", *map(_short, about)])
        self.violations.append(text)
        self.note("", f"VIOLATION {text}")

    def report(self) -> str:
        """Return the plan, the account and the violations as text."""
        head = f"seed {self.seed}: {self.plan}"
        lines = [
            f"{at_s:10.4f} {who:10} {what} {' '.join(map(_short, about))}".rstrip()
            for at_s, who, what, about in self._lines
        ]
        return "\n".join([head, *lines, head, *self.violations])


def _short(about: object) -> str:
    if isinstance(about, dict):
        return " ".join(f"{key}={value!r:.60}" for key, value in about.items())
    text = about if isinstance(about, str) else repr(about)
    return text if len(text) <= 160 else f"{text[:150]}...({len(text)})"
