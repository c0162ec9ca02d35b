"""A service in memory, a fake receiver for its calls, and checks for your own handlers.

The library's own code runs, without servers and threads.
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
"""A bound for what a service publishes: an event that follows from a published one counts 1, one
that follows from that 2, and so on. A loop reaches it within some hundred rounds."""


Body = Mapping[str, Any] | bytes
Given = Body | tuple[Body, Mapping[str, Any]]
"""An event, as a dict or a message's body, or a pair of it and properties of its message."""


class Parked(NamedTuple):
    """A message in the dead-letter queue."""

    body: bytes
    reason: str
    error: str


class InMemory:
    """Runs a service on a RabbitMQ and an etcd in memory, and shows what became of its events.

    Waiting (for a retry, a dead process's lease) takes no real time. ``dies_at`` kills the first
    process at one of its ``steps``; another takes its place. Handlers run on the caller's thread,
    and find your modules as a dead process has left them. Records are in etcd, whatever
    ``settings`` say.

    The service receives what it publishes where its ``bindings`` take it, as by default they do. A
    second queue gets all of it, so none is unroutable. Events of a type that has no handler here
    are received and ignored, which ``counts`` shows.
    """

    def __init__(
        self, service: Service, settings: Settings | None = None, *, dies_at: int | None = None
    ) -> None:
        self._service, self._settings = service, replace(settings or Settings(), enable_etcd=True)
        self._agenda, self._random = Agenda(), Random(0)
        store = Store(self._agenda.time, self._settings.etcd_max_txn_ops)
        self._etcd, self._broker = FakeEtcd(self._agenda, store), FakeBroker(self._agenda)
        # A second queue, which gets a copy of all that the service publishes.
        kept = f"{service.name}.published"
        self._events = self._broker.queues[kept] = Queue(kept, {})
        bindings = [(key, service.name) for key in service.bindings]
        self._broker.exchanges[service.exchange] = [("#", kept), *bindings]
        for name, arguments in queue_arguments(service.name, ()).items():
            self._broker.queues[name] = Queue(name, arguments)
        self._dead_letters = self._broker.queues[names.dead_letter_queue(service.name)]
        self._lives: list[_Life] = []
        self.raised: list[BaseException] = []
        """What handlers, models and ``decode`` raised. ``raise world.raised[0]`` shows where."""
        self._start(dies_at)
        self.steps = self._life.steps
        """Each step of the first process that the outside could notice."""
        self._agenda.run(self._agenda.now_s)

    def publish(self, *events: Given, **properties: Any) -> None:
        """Deliver events together, in this order, and wait until each of them is settled.

        ``properties`` are their messages', by pika's names: ``headers``, ``content_type`` and
        others. A pair ``(event, {"headers": {...}})`` gives an event its own. They may include the
        ``routing_key``, which by default is a dict's "type", as this library publishes it.

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
        """What handlers have written, by key."""
        store = self._etcd.store
        return {
            key: store.get(key).value
            for key in store.keys("")
            if not key.startswith(names.RESERVED_PREFIXES)
        }

    @property
    def records(self) -> dict[str, str]:
        """The state of each record, by the event's id as its key has it."""
        prefix, store = names.record_prefix(self._service.name), self._etcd.store
        return {
            key.removeprefix(prefix): decode(store.get(key).value).state
            for key in store.keys(prefix)
        }

    @property
    def published(self) -> list[dict[str, Any]]:
        """The events that the service has published, repeats included, in order."""
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
        """The counters that are not zero, without the noun, summed over all processes."""
        return sum((Counter(life.counts()) for life in self._lives), Counter[str]())

    def _start(self, dies_at: int | None = None) -> None:
        service, handlers = copy(self._service), self._service.handlers
        if service.decode is not None:
            service.decode = _kept(service.decode, self.raised)
        servers = (self._broker, self._etcd, self._settings)
        life = self._life = _Life(dies_at, service, *servers, random=self._random)
        self._lives.append(life)
        service.handlers = {kind: _watched(handlers[kind], life, self.raised) for kind in handlers}
        # The garbage collector would end its coroutines outside of a loop, with warnings.
        finalize(self, life.kill)

    def _longest_s(self) -> float:
        """Return how long a chain of events may take that has one of each type."""
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
    """One process, whose steps that the outside could notice are counted from 1.

    It dies at step ``dies_at``; nothing that it does after that has an effect. It fails the test if
    its service keeps itself busy with its own events.
    """

    def __init__(self, dies_at: int | None, *servers: Any, **options: Any) -> None:
        super().__init__(*servers, **options)
        self._dies_at, self.generations = dies_at, 0
        self.steps: list[str] = []

    def act(self, when: str, what: Any) -> None:
        super().act(when, what)
        # What the server then has, and what the process has not read.
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
        # A published event's id is its cause's id, followed by the service's name.
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
        """Note a step; raises Killed if the process dies at it, or is dead."""
        if not self.alive:
            raise Killed
        self.steps.append(step)
        if len(self.steps) == self._dies_at:
            self.kill()
            raise Killed


def _watched(handler: Handler, life: _Life, raised: list[BaseException]) -> Handler:
    """Return a handler with a step before and after its function; what it raises is kept."""
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
    """Return what a handler returned. A generator's code runs here, within the handler's steps."""
    return list(returned) if isinstance(returned, Iterator) else returned


class _Steps:
    """A step before a handler and one after it. What it raises passes through unchanged.

    ``contextlib.contextmanager`` sets its traceback, which a frozen dataclass refuses.
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
            self._life.on_defect(error)  # It ends the test: Ctrl-C, pytest.fail, a time-out.


_note = ContextVar[Callable[[str], object]]("note", default=lambda _: None)
"""Notes a step of the process whose handler runs."""


class Receiver:
    """A fake receiver of claimed handlers' calls, which knows repeats by their idempotency key.

    Have your code call ``take`` instead of the real receiver, or ``take_async`` from an
    ``async def``. The ``answers`` are for the first calls, in their order, and ``answer`` is for
    all later ones: an exception is raised, anything else is returned. A call is stored unless its
    answer is an exception or an HTTP status other than 2xx.

    A repeat of a stored call gets the same answer, uses up none, and is not stored again. A call
    without a key is never a repeat. A process may die before and after each call.
    """

    def __init__(self, *answers: object, answer: object = 200) -> None:
        self._answers, self._answer = deque(answers), answer
        self._answered: dict[str, object] = {}
        self._stored: list[tuple[str | None, object]] = []
        self.calls: list[tuple[str | None, object]] = []
        """The key and content of each call, repeats and failures included."""

    def take(self, key: str | None, content: object = None) -> Any:
        """Take a call, and return its answer, or raise it if it is an exception."""
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
        """Take a call, as ``take`` does, in code that awaits it."""
        return self.take(key, content)

    def stored(self) -> list[tuple[str | None, object]]:
        """Return the key and content of each stored call, sorted: their order does not matter.

        `check_duplicates` and `check_crashes` compare it, if your ``make`` returns this method.
        """
        return sorted(self._stored, key=repr)


Make = Callable[[], tuple[Service, Callable[[], object]]]
"""Returns a new service, and a function that returns what the outside has seen of it, such as what
a `Receiver` has stored or a list of files."""

_SEEDS = 20
_TIMES = 3


def check_duplicates(
    make: Make, events: Sequence[Given], settings: Settings | None = None, **properties: Any
) -> None:
    """Deliver each event several times, in many orders and batches.

    ``settings`` and ``properties`` are as for `InMemory` and its ``publish``. Raises AssertionError
    if the result differs from that of an undisturbed run, naming the order of deliveries, or if the
    undisturbed run proves nothing.
    """
    runs = _Runs(make, events, settings, properties)
    for seed in range(_SEEDS):
        random, deliveries = Random(seed), list(events)
        # The first copies keep their order, which may matter.
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
    """Kill the process at each of its steps in turn, and let another one take over.

    ``settings`` and ``properties`` are as for `InMemory` and its ``publish``. Raises AssertionError
    if the result differs from that of an undisturbed run, naming the step, or if the undisturbed
    run proves nothing. After some steps a handler with an effect outside is called again: the
    receiver has to know repeats by the event's id. The steps within a handler are the calls that a
    `Receiver` takes.
    """
    runs = _Runs(make, events, settings, properties)
    for number, step in enumerate(runs.steps, start=1):
        runs.compare(f"killed at step {number}, {step}", [events], number)


class _Runs:
    """Runs of a new service in memory, compared with an undisturbed one, whose ``steps`` these are.

    They are compared by the keys written, the events published (each once: a repeat has the same
    id), what was parked, and the outside. Raises AssertionError if the runs could not differ,
    whatever the service does.
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
