"""One run as all its parts see it: its clock, what its seed decides, and the account of it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from random import Random

from idempotent_consumer.testing.loop import Agenda
from simulation.plan import Plan

# The keys as the contract has them, written down apart from the library's code.
SERVICE = "order"
EXCHANGE = "events"
RECORDS = b"/service/order/"
INCARNATION = b"/incarnation/order"


def record_key(event_id: str) -> bytes:
    """Return the key of an event's record."""
    encoded = event_id.encode()
    if len(encoded) > 128 or encoded.startswith(b"sha256:"):
        encoded = b"sha256:" + hashlib.sha256(encoded).hexdigest().encode()
    return RECORDS + encoded


class Run:
    """The clock, the randomness and the plan of a run, and its account.

    ``faulty`` is whether anything fails now. ``fired`` counts the faults that have, and
    ``violations`` has what must never happen.
    """

    def __init__(self, seed: int, draw: Callable[[Random], Plan]) -> None:
        self.seed, self.rng, self.agenda = seed, Random(seed), Agenda()
        self.plan = draw(self.rng)
        self.faulty = True
        self.fired: Counter[str] = Counter()
        self.violations: list[str] = []
        self._lines: list[tuple[float, str, str, tuple[object, ...]]] = []

    def happens(self, fault: str) -> bool:
        """Return whether a fault hits one request or message."""
        rate = self.plan.rates.get(fault, 0.0)
        return self.faulty and rate > 0 and self.rng.random() < rate

    def latency_s(self) -> float:
        """Draw how long a frame is under way."""
        return self.rng.expovariate(1 / self.plan.latency_s)

    def note(self, who: str, what: str, *about: object) -> None:
        self._lines.append((self.agenda.now_s, who, what, about))

    def fault(self, kind: str, who: str, *about: object) -> None:
        """Count a fault that has fired, and add a line."""
        self.fired[kind] += 1
        self.note(who, f"FAULT {kind}", *about)

    def has_fired(self, *kinds: str) -> bool:
        """Return whether one of these faults has happened."""
        return any(self.fired[kind] for kind in kinds)

    def violation(self, kind: str, *about: object) -> None:
        """Add something that must never happen."""
        text = " ".join([f"{kind}:", *map(_short, about)])
        self.violations.append(text)
        self.note("", f"VIOLATION {text}")

    def report(self) -> str:
        """Write everything there is to know, for a reader."""
        head = f"seed {self.seed}: {self.plan.describe()}"
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
