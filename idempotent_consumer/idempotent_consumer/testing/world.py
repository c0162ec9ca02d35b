"""A service in memory, a fake receiver for its calls, and checks for handlers of your own.

It is the library's own code, with no server and no thread.
"""

from __future__ import annotations

from asyncio import CancelledError
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from copy import copy
from dataclasses import replace
from functools import wraps
from itertools import pairwise
from random import Random
from typing import Any, NamedTuple
from weakref import finalize

import orjson
import pika

from .. import names
from ..bus import queue_arguments
from ..calls import Handler, ModelError
from ..event import Decoder
from ..records import decode
from ..service import Service
from ..settings import Settings
from .broker import FakeBroker, Queue, Sent
from .etcd import Call, FakeEtcd, Store
from .loop import Agenda, Killed
from .process import Process

_SETTLED_WITHIN_S = 3600
_MAX_GENERATIONS = 100_000
"""What a service publishes may come to this, where an event that comes of a published one counts 1,
one that comes of that 2, and so on: a loop gets there within some hundred rounds."""


Body = Mapping[str, Any] | bytes
Given = Body | tuple[Body, Mapping[str, Any]]
"""An event, as a dict or a message's body; in a pair, with properties of its message."""


class Parked(NamedTuple):
    """A message in the dead-letter queue."""

    body: bytes
    reason: str
    error: str


class InMemory:
    """Runs a service as if there were RabbitMQ and etcd, and shows what came of its events.

    Time passes by itself where something waits for it (a retry, a dead process's lease), and
    costs nothing. ``dies_at`` ends the first process at one of its ``steps``; another takes its
    place. Handlers run on the caller's thread, and find your modules as a dead process has left
    them. With whatever ``settings``, records are in etcd.

    What the service publishes comes to its own queue too where its ``bindings`` say so, as by
    default, and to a queue beside it in any case: none of it is unroutable. A type that has no
    handler here is received and ignored, which ``counts`` shows.
    """

    def __init__(
        self, service: Service, settings: Settings | None = None, *, dies_at: int | None = None
    ) -> None:
        self._service, self._settings = service, replace(settings or Settings(), enable_etcd=True)
        self._agenda, self._random = Agenda(), Random(0)
        store = Store(self._agenda.time, self._settings.etcd_max_txn_ops)
        self._etcd, self._broker = FakeEtcd(self._agenda, store), FakeBroker(self._agenda)
        # A queue beside the service's own, which gets a copy of all that the service publishes.
        kept = f"{service.name}.published"
        self._events = self._broker.queues[kept] = Queue(kept, {})
        bindings = [(key, service.name) for key in service.bindings]
        self._broker.exchanges[service.exchange] = [("#", kept), *bindings]
        for name, arguments in queue_arguments(service.name, ()).items():
            self._broker.queues[name] = Queue(name, arguments)
        self._dead_letters = self._broker.queues[names.dead_letter_queue(service.name)]
        self._lives: list[_Life] = []
        self.raised: list[BaseException] = []
        """What handlers, models and ``decode`` raised; ``raise world.raised[0]`` shows its line."""
        self._start(dies_at)
        self.steps = self._life.steps
        """What the first process has done that the outside could notice, step by step."""
        self._agenda.run(self._agenda.now_s)

    def publish(self, *events: Given, **properties: Any) -> None:
        """Let events arrive together, in this order, and wait until each of them is settled.

        ``properties`` are their messages', by pika's names: ``headers``, ``content_type`` and
        others. A pair ``(event, {"headers": {...}})`` is an event with some of its own. Among them
        is the ``routing_key``; by default it is a dict's "type", as this library publishes it.

        Raises AssertionError if no binding takes an event's routing key, if an event is not settled
        within one simulated hour plus the time of all retries and calls, or if the service's own
        events never stop.
        """
        for event in events:
            body, own = event if isinstance(event, tuple) else (event, {})
            self._send(body, **{**properties, **own})
        self._life.generations = 0
        within_s = _SETTLED_WITHIN_S + self._longest_s()
        until_s = self._agenda.now_s + within_s
        while self._agenda.now_s < until_s:
            self._agenda.run(until_s, lambda: not self._life.alive or self._is_settled())
            if self._life.alive:
                self._agenda.run(self._agenda.now_s)
            if not self._life.alive:
                self._broker.gone(self._life)
                self._start()
            elif self._is_settled():
                return
        missing = self._life.running.health.missing
        raise AssertionError(
            f"not settled after {within_s:g} s. Missing: {missing}, records: {self.records}"
        ) from next(reversed(self.raised), None)

    def _send(self, event: Body, routing_key: str | None = None, **properties: Any) -> None:
        name, bindings = self._service.name, self._service.bindings
        if isinstance(event, Mapping):
            routing_key = routing_key or event.get("type")
            event = orjson.dumps(dict(event))
        if not isinstance(event, bytes):
            raise TypeError(f"an event is a dict, or a message's body as bytes: {event!r:.100}")
        if isinstance(routing_key, str):
            taken = self._broker.route(self._service.exchange, routing_key)
            if self._broker.queues[name] not in taken:
                raise AssertionError(
                    f"no binding of {name} takes {routing_key!r:.100}: {', '.join(bindings)}. If "
                    "its producer writes another routing key, publish it with routing_key="
                )
        self._broker.publish("", name, event, pika.BasicProperties(**properties))

    @property
    def effects(self) -> dict[str, bytes]:
        """What the handlers have written, by key."""
        store = self._etcd.store
        return {
            key: store.get(key).value
            for key in store.keys("")
            if not key.startswith(names.RESERVED_PREFIXES)
        }

    @property
    def records(self) -> dict[str, str]:
        """The state of each record, by the event's id (as it stands in the key)."""
        prefix, store = names.record_prefix(self._service.name), self._etcd.store
        return {
            key.removeprefix(prefix): decode(store.get(key).value).state
            for key in store.keys(prefix)
        }

    @property
    def published(self) -> list[dict[str, Any]]:
        """The events that the service has published, in order, with those published again."""
        return [orjson.loads(body) for body in self._events.bodies]

    @property
    def published_headers(self) -> list[dict[str, Any]]:
        """The headers of each message in ``published``."""
        return [dict(message.headers) for message in self._events.ready]

    @property
    def parked(self) -> list[Parked]:
        """The messages in the dead-letter queue."""
        headers = (names.REASON_HEADER, names.ERROR_HEADER)
        return [
            Parked(message.body, *(str(message.headers.get(name, "")) for name in headers))
            for message in self._dead_letters.ready
        ]

    @property
    def counts(self) -> Counter[str]:
        """The counters that are not zero, without the noun, of all processes together."""
        return sum((Counter(life.counts()) for life in self._lives), Counter[str]())

    def _start(self, dies_at: int | None = None) -> None:
        service, handlers = copy(self._service), self._service.handlers
        if service.decode is not None:
            service.decode = _kept(service.decode, self.raised)
        servers = (self._broker, self._etcd, self._settings)
        life = self._life = _Life(dies_at, service, *servers, random=self._random)
        self._lives.append(life)
        service.handlers = {kind: _watched(handlers[kind], life, self.raised) for kind in handlers}
        # By the garbage collector its coroutines would end outside of a loop, which they say aloud.
        finalize(self, life.kill)

    def _longest_s(self) -> float:
        """Return how long it may take where one event brings about the next, of each type."""
        longest_s = 0.0
        for handler in self._service.handlers.values():
            own, default = handler.retry_delays, self._settings.retry_delays
            delays_s = [seconds for _, seconds in (default if own is None else own)]
            # RetryAfter can ask for the longest delay each time. The first call, one for each
            # retry, and a dead process's claim, which lasts for three.
            longest_s += len(delays_s) * max(delays_s, default=0)
            longest_s += (len(delays_s) + 4) * (handler.timeout_s or 0.0)
        return longest_s

    def _is_settled(self) -> bool:
        return not any(self._broker.unsettled(self._dead_letters.name, self._events.name))


class _Life(Process):
    """One process's life, as a count of the steps that the outside could notice.

    It ends at step ``dies_at``, from 1; nothing that the process does after that has an effect.
    It ends the test too, where its service keeps itself busy with its own events.
    """

    def __init__(self, dies_at: int | None, *servers: Any, **options: Any) -> None:
        super().__init__(*servers, **options)
        self._dies_at, self.generations = dies_at, 0
        self.steps: list[str] = []

    def act(self, when: str, what: Any) -> None:
        super().act(when, what)
        # What is there when a request has been done, and what it is answered with.
        if isinstance(what, Call) and what.method == "Txn" and what.request.success:
            puts = [operation.request_put.key.decode() for operation in what.request.success]
            done, unread = f"etcd has {', '.join(filter(None, puts)) or 'a read'}", "answer"
        elif isinstance(what, Sent) and what.content:
            method, (_, body) = what
            shown, queue, unread = repr(body[:80]), method.routing_key, "confirm"
            done = f"{shown} is published" if method.exchange else f"{queue} has {shown}"
            if method.exchange and when == "before":
                self._count(orjson.loads(body))
        else:
            return
        self.note(f"before {done}" if when == "before" else f"{done}, its {unread} is unread")

    def _count(self, published: dict[str, Any]) -> None:
        # Each adds its service's name to the id of the event that it comes from.
        generation = published["id"].count(f"/{self.service.name}/")
        self.generations += max(0, generation - 1)
        if self.generations > _MAX_GENERATIONS:
            busy = (
                "the service receives what it publishes, and publishes again: "
                f"{published['type']!r:.100} is event {generation} in a row. "
                "In production this may go on for ever"
            )
            self.on_defect(AssertionError(busy))

    def note(self, step: str) -> None:
        """Note a step; raises Killed where the process dies at it, or is dead."""
        if not self.alive:
            raise Killed
        self.steps.append(step)
        if len(self.steps) == self._dies_at:
            self.kill()
            raise Killed


def _watched(handler: Handler, life: _Life, raised: list[BaseException]) -> Handler:
    """Return a handler with a step before and behind its function; what it raises is kept."""
    function = handler.function

    @wraps(function)
    def run(event: Any, *_timeout_s: float) -> Any:
        with _Steps(event, life, raised):
            return _drawn(function(*handler.arguments(event)))

    @wraps(function)
    async def wait(event: Any, *_timeout_s: float) -> Any:
        with _Steps(event, life, raised):
            return _drawn(await function(*handler.arguments(event)))

    return replace(handler, function=wait if handler.is_coroutine else run, model=None)


def _kept(decode: Decoder, raised: list[BaseException]) -> Decoder:
    """Return a decoder that also keeps what it raises."""

    def call(*message: Any) -> Any:
        try:
            return decode(*message)
        except Exception as error:
            raised.append(error)
            raise

    return call


def _drawn(returned: Any) -> Any:
    """Return what a handler has returned; a generator's code runs here, and so within its step."""
    return list(returned) if isinstance(returned, Iterator) else returned


class _Steps:
    """A step before a handler and one behind it, through which its exception goes untouched.

    contextlib's own would set its traceback, which a frozen dataclass refuses.
    """

    def __init__(self, event: Any, life: _Life, raised: list[BaseException]) -> None:
        self._handler, self._life, self._raised = f"{event.type} {event.id}", life, raised

    def __enter__(self) -> None:
        _note.set(self._life.note)
        self._life.note(f"{self._handler}: before its handler")

    def __exit__(self, _: object, error: BaseException | None, _traceback: object) -> None:
        if error is None:
            self._life.note(f"{self._handler}: behind its handler, before its record")
        elif isinstance(error, Exception):
            refused = error.__cause__ if isinstance(error, ModelError) else None
            self._raised.append(refused or error)
        elif not isinstance(error, Killed | CancelledError | GeneratorExit | SystemExit):
            self._life.on_defect(error)  # Of who runs the test: Ctrl-C, pytest.fail, a time-out.


_note = ContextVar[Callable[[str], object]]("note", default=lambda _: None)
"""Notes a step of the process whose handler runs in this context."""


class Receiver:
    """Takes the calls of claimed handlers, and knows a repeat by its idempotency key.

    Have your code call ``take`` where it would call outside, or ``take_async`` from an
    ``async def``. The ``answers`` are for the first calls, in their order, and ``answer`` is for
    the others: an exception is raised, anything else is returned. What a call brings is stored,
    unless its answer is an exception or an HTTP status other than 2xx.

    A repeat of what is stored is answered as the first time, uses up no answer, and stores nothing.
    A call without a key is never a repeat. A process may die before each call and behind it.
    """

    def __init__(self, *answers: object, answer: object = 200) -> None:
        self._answers, self._answer = deque(answers), answer
        self._answered: dict[str, object] = {}
        self._stored: list[tuple[str | None, object]] = []
        self.calls: list[tuple[str | None, object]] = []
        """Each call's key and content, repeats and failures included."""

    def take(self, key: str | None, content: object = None) -> Any:
        """Take a call, and return its answer, or raise it where it is an exception."""
        note = _note.get()
        note(f"before a call with the key {key!r}")
        answer = self._answer_to(key, content)
        note(f"behind a call with the key {key!r}, its answer is unread")
        return answer

    def _answer_to(self, key: str | None, content: object) -> Any:
        self.calls.append((key, content))
        if key is not None and key in self._answered:
            return self._answered[key]
        answer = self._answers.popleft() if self._answers else self._answer
        if isinstance(answer, BaseException):
            raise answer
        if not isinstance(answer, int) or isinstance(answer, bool) or 200 <= answer < 300:
            self._stored.append((key, content))
            if key is not None:
                self._answered[key] = answer
        return answer

    async def take_async(self, key: str | None, content: object = None) -> Any:
        """Do the same for code that awaits it."""
        return self.take(key, content)

    def stored(self) -> list[tuple[str | None, object]]:
        """Return the key and content of what is stored, sorted: the order of calls does not count.

        It is what `check_duplicates` and `check_crashes` compare: hand it to them as the outside.
        """
        return sorted(self._stored, key=repr)


Make = Callable[[], tuple[Service, Callable[[], object]]]
"""Returns a fresh service, and a function that returns what the outside has seen of it: what a
`Receiver` has stored, a list of files."""

_SEEDS = 20
_TIMES = 3


def check_duplicates(
    make: Make, events: Sequence[Given], settings: Settings | None = None, **properties: Any
) -> None:
    """Deliver each event several times, in many orders and batches.

    ``settings`` and ``properties`` are as for `InMemory` and its ``publish``. Raises AssertionError
    if the result differs from an undisturbed run, with the deliveries in their order, or if that
    run proves nothing.
    """
    runs = _Runs(make, events, settings, properties)
    for seed in range(_SEEDS):
        random, deliveries = Random(seed), list(events)
        # The first copies keep their order: it may mean something.
        for event in events:
            first = next(at for at, other in enumerate(deliveries) if other is event)
            for _ in range(_TIMES - 1):
                deliveries.insert(random.randint(first + 1, len(deliveries)), event)
        cuts = sorted(random.sample(range(len(deliveries) + 1), min(3, len(deliveries) + 1)))
        edges = pairwise([0, *cuts, len(deliveries)])
        shown = [str(e.get("id")) if isinstance(e, Mapping) else f"{e!r:.80}" for e in deliveries]
        batches = [deliveries[start:end] for start, end in edges]
        runs.compare(f"with deliveries in the order {', '.join(shown)}", batches)


def check_crashes(
    make: Make, events: Sequence[Given], settings: Settings | None = None, **properties: Any
) -> None:
    """Kill the process at each of its steps in turn, and let another one go on.

    ``settings`` and ``properties`` are as for `InMemory` and its ``publish``. Raises AssertionError
    if the result differs from an undisturbed run, with the step, or if that run proves nothing.
    A handler with an effect outside is called again after some steps: the receiver has to know a
    repeat by the event's id. The steps within a handler are the calls that a `Receiver` takes.
    """
    runs = _Runs(make, events, settings, properties)
    for number, step in enumerate(runs.steps, start=1):
        runs.compare(f"killed at step {number}, {step}", [events], number)


class _Runs:
    """Runs of a fresh service in memory, which are compared with an undisturbed one.

    What is compared are the keys that were written, the events that were published (each once: a
    repeat has the same id), and what was parked. Raises AssertionError where all runs would come to
    the same, whatever the service does. ``steps`` are the undisturbed run's.
    """

    def __init__(
        self,
        make: Make,
        events: Sequence[Given],
        settings: Settings | None,
        properties: Mapping[str, Any],
    ) -> None:
        self._make, self._settings, self._properties = make, settings, properties
        world, self._expected = self._run([events])
        failed = [letter.error for letter in world.parked if letter.reason == names.FAILED]
        if failed:
            raise AssertionError(f"undisturbed, an event fails too: {failed[0]}") from next(
                reversed(world.raised), None
            )
        if world.counts["ignored"] == world.counts["received"]:
            raise AssertionError("the service has no handler for any of these events")
        self.steps = world.steps

    def compare(
        self, how: str, batches: Sequence[Sequence[Given]], dies_at: int | None = None
    ) -> None:
        world, seen = self._run(batches, dies_at)
        for what, expected in self._expected.items():
            if seen[what] != expected:
                raise AssertionError(
                    f"{what} differs {how}:\n  {seen[what]!r}\nundisturbed it is\n  {expected!r}"
                ) from next(reversed(world.raised), None)

    def _run(
        self, batches: Sequence[Sequence[Given]], dies_at: int | None = None
    ) -> tuple[InMemory, dict[str, object]]:
        service, outside = self._make()
        world = InMemory(service, self._settings, dies_at=dies_at)
        for batch in batches:
            world.publish(*batch, **self._properties)
        return world, {
            "effects": world.effects,
            "published": sorted({str(event) for event in world.published}),
            "parked": sorted({(letter.body, letter.reason) for letter in world.parked}),
            "outside": outside(),
        }
