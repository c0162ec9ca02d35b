"""What producers send: new events, duplicates, other bodies under a known id, and rubbish."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import orjson
import pika

from fakes.headers import encoded, entry, nested, table
from idempotent_consumer.event import decode
from simulation.plan import OF_DATA
from simulation.run import SERVICE, Run

if TYPE_CHECKING:
    from simulation.broker import SimulatedBroker

PURE = ("order", "parts", "shared", "nothing", "flaky", "doomed", "greedy", "announce")
CLAIMED = ("call", "flaky_call", "doomed_call", "call_announce")
STRANGER = "stranger"
ANNOUNCED = "announced"
"""The type of what the service publishes itself; it comes to its own queue too."""

CAN_FAIL = ("flaky", "doomed", "greedy", "flaky_call", "doomed_call")
NEVER_SUCCEEDS = ("doomed", "greedy", "doomed_call")

_PROPERTIES = (
    pika.BasicProperties(type="event"),
    pika.BasicProperties(headers={}, type="event"),
    pika.BasicProperties(headers={"trace": "1", "x-attempts": "many"}, type="event"),
    encoded(table(entry(b"nan", b"f", b"\x7f\xc0\0\0"), entry(b"x-attempts", b"V", b""))),
    encoded(
        table(
            entry(b"year", b"T", b"\x40" + b"\0" * 7),
            entry(b"deep", b"F", nested(3)),
            entry(b"long", b"S", table(b"x" * 2069)),
        )
    ),
)
"""Some of them have headers that pika cannot read, or more bytes than may be in flight."""

_LONG = "x" * 150
_IDS = (
    "a/b",
    "a/b/",
    "a",
    "A",
    "nul\0",
    "nul",
    "\u00e9",
    "e\u0301",
    "sha256:" + "0" * 64,
    _LONG + "1",
    _LONG + "2",
    _LONG,
    "\U0001f600" * 40,
    " ",
    "x" * 128,
    "x" * 129,
)
"""Ids that a careless key would bring together, or could not write."""


@dataclass(frozen=True)
class Sent:
    """One body. ``digest`` is empty where it is no valid event."""

    body: bytes
    event_id: str = ""
    event_type: str = ""
    digest: str = ""

    @property
    def handled(self) -> bool:
        """Whether a handler is there for it."""
        return bool(self.digest) and self.event_type not in (STRANGER, ANNOUNCED)


class Workload:
    """Draws bodies. Nearly all of them differ, so that a body tells which message it is."""

    def __init__(self, rng: Random, types: tuple[str, ...] = ()) -> None:
        self._rng = rng
        self._drawn: list[tuple[str, str, int]] = []
        self._numbers = 0
        # Few types in most runs: claims need company of their own kind to be contested.
        pool = (*PURE, *CLAIMED)
        self._types = types or rng.choice(
            [
                pool,
                PURE,
                CLAIMED,
                ("order", "flaky_call"),
                ("flaky_call",),
                ("call",),
                ("order", "flaky"),
                ("shared", "parts", "order"),
                ("announce",),
                ("order", "call_announce"),
            ]
        )

    def draw(self, kind: str) -> Sent:
        """Return the next body of a kind: new, duplicate, conflict, stranger or invalid."""
        self._numbers += 1
        if kind == "invalid":
            return Sent(self._invalid())
        if kind == "stranger":
            return self._event(f"s{self._numbers}", STRANGER, 0)
        if kind == "new" or not self._drawn:
            return self._new()
        event_id, event_type, number = self._rng.choice(self._drawn[-8:])
        if kind == "conflict":
            if self._rng.random() < 0.3:
                event_type = self._rng.choice(self._types)
            number = self._numbers
            self._drawn.append((event_id, event_type, number))
        return self._event(event_id, event_type, number)

    def _new(self) -> Sent:
        used = {event_id for event_id, _, _ in self._drawn}
        free = [event_id for event_id in _IDS if event_id not in used]
        special = free and self._rng.random() < 0.25
        event_id = self._rng.choice(free) if special else f"e{self._numbers}"
        event_type = self._rng.choice(self._types)
        self._drawn.append((event_id, event_type, self._numbers))
        return self._event(event_id, event_type, self._numbers)

    def _event(self, event_id: str, event_type: str, number: int) -> Sent:
        """Write an event; what is not in its digest differs each time."""
        members = [
            ("id", event_id),
            ("type", event_type),
            ("args", {"number": number, "b": [1]}),
            ("copy", self._numbers),
        ]
        self._rng.shuffle(members)
        body = orjson.dumps(dict(members))
        return Sent(body, event_id, event_type, decode(body).digest)

    def _invalid(self) -> bytes:
        n = self._numbers
        return self._rng.choice(
            [
                b"",
                b"no json %d" % n,
                b"[%d]" % n,
                b'{"id":%d,"type":"order"}' % n,
                b'{"id":"","type":"order","n":%d}' % n,
                b'{"id":"i%d","type":null}' % n,
                b'{"id":"i%d","type":"order","args":null}' % n,
                b'{"id":"i%d"}' % n,
                b'{"id":"i%d","type":"order","args":{"a":NaN}}' % n,
                b"\xff\xfe%d" % n,
                b'{"id":"\\ud800%d","type":"order"}' % n,
                b'{"id":"i%d","type":"order","args":{"a":' % n + b"[" * 600 + b"]" * 600 + b"}}",
            ]
        )


_KINDS = ("new", "duplicate", "conflict", "stranger", "invalid")


class Producer:
    """Publishes a run's bodies at random times, in bursts, and again where no confirm came."""

    def __init__(self, run: Run, broker: SimulatedBroker) -> None:
        rng, plan = run.rng, run.plan
        self._run, self._broker = run, broker
        self.confirmed: set[bytes] = set()
        self.unsent = plan.events
        workload = Workload(rng, plan.types)
        ends_s, at_s = plan.faulty_s * rng.choice([0.2, 0.8]), 0.0
        if any(kind in plan.rates for kind in OF_DATA):
            ends_s = plan.faulty_s + 30.0  # Something must come to those that must not settle.
        for kind in rng.choices(_KINDS, plan.shares, k=plan.events):
            if rng.random() < 0.3:
                at_s = rng.uniform(0.0, ends_s)
            self._later(at_s, workload.draw(kind))

    def _later(self, delay_s: float, sent: Sent) -> None:
        self._run.agenda.later(delay_s, lambda: self._publish(sent))

    def _publish(self, sent: Sent) -> None:
        broker, rng = self._broker, self._run.rng
        if broker.away:
            self._later(broker.away_until_s - broker.agenda.now_s + 0.1, sent)
            return
        self.unsent -= 1
        broker.sent[sent.body] = sent
        confirmed = not self._run.happens("publish not confirmed")
        if confirmed or rng.random() < 0.5:
            broker.publish("", SERVICE, sent.body, rng.choice(_PROPERTIES))
        if confirmed:
            self.confirmed.add(sent.body)
            return
        self._run.fault("publish not confirmed", "producer")
        if rng.random() < 0.7:
            self.unsent += 1
            self._later(rng.uniform(0.05, 5.0), sent)
