"""What the producer sends, what the handlers do with it, and the receiver that they call."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import orjson
import pika

from fakes.corpus import AWKWARD_IDS, NO_EVENTS
from fakes.headers import encoded, entry, nested, table
from idempotent_consumer import Reject
from idempotent_consumer.event import Event, Publish, Put, decode
from simulation.run import OF_DATA, SERVICE, Run, record_key

if TYPE_CHECKING:
    from simulation.servers import SimulatedBroker
    from simulation.world import Life

Result = list[Put | Publish] | Put | None

SHARED_KEY = "/latest"
STRANGER = "stranger"
ANNOUNCED = "announced"
"""The type of the service's own events, which its own queue receives too."""


@dataclass(frozen=True)
class EventType:
    """What the handler of a type does.

    It raises with the probability ``raises``. Otherwise it writes so many ``keys`` of its own, too
    many for a transaction if it is ``greedy``; the key that all events share; or it publishes.
    """

    claimed: bool = False
    raises: float = 0.0
    keys: int = 1
    shared: bool = False
    greedy: bool = False
    announces: bool = False

    @property
    def can_fail(self) -> bool:
        return self.raises > 0 or self.greedy

    @property
    def never_succeeds(self) -> bool:
        return self.raises == 1 or self.greedy


TYPES = {
    "order": EventType(),
    "parts": EventType(keys=3),
    "shared": EventType(keys=0, shared=True),
    "nothing": EventType(keys=0),
    "flaky": EventType(raises=0.4),
    "doomed": EventType(raises=1),
    "greedy": EventType(keys=128, greedy=True),
    "announce": EventType(announces=True),
    "call": EventType(claimed=True, keys=0),
    "flaky_call": EventType(claimed=True, raises=0.4),
    "doomed_call": EventType(claimed=True, raises=1),
    "call_announce": EventType(claimed=True, announces=True),
}

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
"""Some have headers that pika cannot read, or more bytes than may be in flight."""

_INVALID = sorted({body for body in NO_EVENTS if len(body) < 2000})
_KINDS = ("new", "duplicate", "conflict", "stranger", "invalid")
_MIXES = (
    tuple(TYPES),
    tuple(name for name, kind in TYPES.items() if not kind.claimed),
    tuple(name for name, kind in TYPES.items() if kind.claimed),
    ("order", "flaky_call"),
    ("flaky_call",),
    ("call",),
    ("order", "flaky"),
    ("shared", "parts", "order"),
    ("announce",),
    ("order", "call_announce"),
)
"""The types of a run. Most have few: claims are contested only if many events have them."""


@dataclass(frozen=True)
class Sent:
    """One body. Its ``digest`` is empty if it is no valid event."""

    body: bytes
    event_id: str = ""
    event_type: str = ""
    digest: str = ""

    @cached_property
    def key(self) -> bytes:
        return record_key(self.event_id)

    @property
    def handled(self) -> bool:
        """Whether its type has a handler."""
        return bool(self.digest) and self.event_type in TYPES

    @property
    def handler(self) -> EventType:
        return TYPES[self.event_type]

    @property
    def announcements(self) -> list[bytes]:
        """The bodies of the events that its handler publishes."""
        if not self.handled or not self.handler.announces:
            return []
        number = orjson.loads(self.body)["args"]["number"]
        return [
            orjson.dumps({"id": f"{self.event_id}/{SERVICE}/{n}", "type": ANNOUNCED, "args": args})
            for n, args in enumerate([{"number": number}, {}])
        ]


def effect_keys(event_type: str, event_id: str) -> list[str]:
    """Return the keys that a type's handler writes, without the shared one."""
    return [f"/{event_type}/{event_id}/{n}" for n in range(TYPES[event_type].keys)]


class Producer:
    """Publishes a run's bodies at random times, in bursts, and again if they are not confirmed.

    Nearly all bodies differ, so a body identifies its message.
    """

    def __init__(self, run: Run, broker: SimulatedBroker) -> None:
        rng, plan = run.rng, run.plan
        self._run, self._rng, self._broker = run, rng, broker
        self.confirmed: set[bytes] = set()
        self.unsent = plan.events
        self._drawn: list[tuple[str, str, int]] = []
        self._types = plan.types or rng.choice(_MIXES)
        # Neighbours in the list are alike.
        first = rng.randrange(len(AWKWARD_IDS))
        self._ids = [*AWKWARD_IDS[first : first + 10]]
        rng.shuffle(self._ids)
        self._invalid = rng.sample(_INVALID, len(_INVALID))
        ends_s, at_s = plan.faulty_s * rng.choice([0.2, 0.8]), 0.0
        if any(kind in plan.rates for kind in OF_DATA):
            ends_s = plan.faulty_s + 30.0  # Deliveries must come when none may be settled.
        for number, kind in enumerate(rng.choices(_KINDS, plan.shares, k=plan.events), start=1):
            if rng.random() < 0.3:
                at_s = rng.uniform(0.0, ends_s)
            run.agenda.later(at_s, partial(self._publish, self._draw(kind, number)))

    def _draw(self, kind: str, number: int) -> Sent:
        """Return the next body of a kind. Members that the digest does not cover always differ."""
        rng = self._rng
        if kind == "invalid":
            return Sent(self._invalid.pop())
        if kind == "stranger":
            drawn = (f"s{number}", STRANGER, 0)
        elif kind == "duplicate" and self._drawn:
            drawn = rng.choice(self._drawn[-8:])
        else:
            if kind == "conflict" and self._drawn:
                event_id, event_type, _ = rng.choice(self._drawn[-8:])
                if rng.random() < 0.3:
                    event_type = rng.choice(self._types)
            else:
                is_awkward = self._ids and rng.random() < 0.25
                event_id = self._ids.pop() if is_awkward else f"e{number}"
                event_type = rng.choice(self._types)
            drawn = (event_id, event_type, number)
            self._drawn.append(drawn)
        event_id, event_type, content = drawn
        args = {"number": content, "b": [1]}
        members = [("id", event_id), ("type", event_type), ("args", args), ("copy", number)]
        rng.shuffle(members)
        body = orjson.dumps(dict(members))
        return Sent(body, event_id, event_type, decode(body).digest)

    def _publish(self, sent: Sent) -> None:
        broker, rng, later = self._broker, self._rng, self._run.agenda.later
        if broker.away:
            later(1.0, partial(self._publish, sent))
            return
        self.unsent -= 1
        broker.sent[sent.body] = sent
        unconfirmed = self._run.happens("publish not confirmed", "producer")
        if not unconfirmed or rng.random() < 0.5:
            broker.publish("", SERVICE, sent.body, rng.choice(_PROPERTIES))
        if not unconfirmed:
            self.confirmed.add(sent.body)
        elif rng.random() < 0.7:
            self.unsent += 1
            later(rng.uniform(0.05, 5.0), partial(self._publish, sent))


@dataclass
class Call:
    """One call as the receiver sees it, from its start to its end on the world's clock.

    ``end_s`` is infinite if no answer comes. ``reached`` is false if the process died before the
    request left it. ``cut_s`` is when the process cancelled the call. ``decided_s`` is when it had
    checked its claim: long before the start if it froze in between.
    """

    event: Event
    life: Life
    decided_s: float
    start_s: float
    end_s: float
    raised: bool
    rejected: bool = False
    reached: bool = True
    cut_s: float | None = None

    @property
    def returned(self) -> bool:
        ended_s = self.life.ended_s
        return self.cut_s is None and (ended_s is None or ended_s >= self.end_s)


class Outside:
    """Receives and keeps the calls. ``runs`` has the event of each run of a pure handler."""

    def __init__(self, run: Run) -> None:
        self._rng, self._plan, self._run = run.rng, run.plan, run
        self._states: set[str] = set()
        self.calls: list[Call] = []
        self.runs: list[Event] = []

    def be(self, state: str, so: bool) -> None:
        """Start or stop being down, slow or rejecting. Meanwhile no call succeeds."""
        (self._states.add if so else self._states.discard)(state)

    def call(self, event: Event, life: Life) -> Call:
        """Begin a call."""
        decided_s = life.agenda.now_s
        if "frozen" in self._plan.rates and self._rng.random() < 0.03:
            # No lease can protect a process that is frozen just before it sends.
            life.freeze(min(self._rng.uniform(1.0, 40.0), self._plan.longest_freeze_s))
        start_s = max(decided_s, life.frozen_until_s)
        lasts_s = self._rng.uniform(0.0, self._plan.call_s)
        end_s = math.inf if "slow" in self._states else start_s + lasts_s
        raises = self._rng.random() < TYPES[event.type].raises or bool(self._states)
        call = Call(event, life, decided_s, start_s, end_s, raises, "rejecting" in self._states)
        self.calls.append(call)
        self._run.note(life.name, "calls", event.id, f"until {call.end_s:.3f}")
        return call

    def process_ended(self, life: Life) -> None:
        """Decide which of the calls under way have reached the receiver."""
        now_s = life.agenda.now_s
        for call in self.calls:
            if call.life is life and call.cut_s is None and now_s < call.end_s:
                call.reached = self._rng.random() < 0.5 and call.start_s <= now_s
                call.end_s = now_s if math.isinf(call.end_s) else call.end_s
                which = "reached" if call.reached else "did not reach"
                self._run.fault(f"killed in a call that {which} the outside", life.name)


class Handlers:
    """The handlers of a process. The seed decides which claimed ones are coroutine functions."""

    def __init__(self, life: Life, outside: Outside) -> None:
        self._life, self._outside, self._rng = life, outside, life.run.rng
        for name, kind in TYPES.items():
            if kind.claimed:
                claimed: Any = self._on_loop if self._rng.random() < 0.5 else self._on_thread
                life.service.claimed_handler(name, self._life.run.plan.call_timeout_s)(claimed)
            else:
                life.service.handler(name)(self._pure)

    def _pure(self, event: Event) -> Result:
        self._outside.runs.append(event)
        return _result(event, self._rng.random() < TYPES[event.type].raises)

    def _on_thread(self, event: Event, timeout_s: float) -> Result:
        call = self._outside.call(event, self._life)
        call.end_s = min(call.end_s, call.start_s + timeout_s)  # A plain function bounds its call.
        spent_s = call.end_s - self._life.agenda.now_s
        self._life.spend(spent_s)
        call.end_s = self._life.agenda.now_s + spent_s  # Equal, to the last bit, to its thread's.
        return self._called(event, call)

    async def _on_loop(self, event: Event, _timeout_s: float) -> Result:
        call = self._outside.call(event, self._life)
        if call.raised and self._rng.random() < 0.3 and not self._is_rejected(event):
            call.end_s = math.inf  # It fails by its time-out.
        try:
            await asyncio.sleep(call.end_s - self._life.agenda.now_s)
        except asyncio.CancelledError:
            call.cut_s = self._life.agenda.now_s
            call.end_s = min(call.end_s, call.cut_s)
            self._life.run.fault("call cut off", self._life.name)
            raise
        # It has ended, even if by rounding the clock is just before its end.
        call.end_s = min(call.end_s, self._life.agenda.now_s)
        return self._called(event, call)

    def _called(self, event: Event, call: Call) -> Result:
        if call.rejected or self._is_rejected(event):
            raise Reject("never")
        return _result(event, call.raised)

    def _is_rejected(self, event: Event) -> bool:
        # Otherwise it would be held for ever behind a circuit breaker that nothing closes.
        breaks = self._life.run.plan.settings.breaker_failures > 0
        return breaks and TYPES[event.type].never_succeeds


def _result(event: Event, raises: bool) -> Result:
    """Return a handler's effects, or raise: its puts, if it announces between two events."""
    if raises:
        raise ConnectionError("refused")
    kind, value = TYPES[event.type], event.digest.encode()
    keys = [*effect_keys(event.type, event.id), *([SHARED_KEY] if kind.shared else [])]
    puts = [Put(key, value) for key in keys]
    if kind.announces:
        number = Publish(ANNOUNCED, {"number": event.args["number"]})
        return [number, *puts, Publish(ANNOUNCED)]
    return [*puts] if len(puts) > 1 else next(iter(puts), None)
