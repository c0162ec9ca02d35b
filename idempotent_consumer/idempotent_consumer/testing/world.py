"""A service in memory: its handlers on the library's own code, with no server and no thread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import wraps
from random import Random
from typing import Any, NamedTuple
from weakref import finalize

import orjson
import pika

from .. import names
from ..bus import queue_arguments
from ..calls import Handler
from ..records import decode
from ..service import Service
from ..settings import Settings
from .broker import FakeBroker, Queue, Sent
from .etcd import Call, FakeEtcd, Store
from .loop import Agenda, Killed, Loop
from .process import Process

_SETTLED_WITHIN_S = 3600.0


class Parked(NamedTuple):
    """A message in the dead-letter queue."""

    body: bytes
    reason: str
    error: str


class InMemory:
    """Runs a service as if there were RabbitMQ and etcd, and shows what came of its events.

    Time passes by itself where something waits for it (a retry, a dead process's lease), and
    costs nothing. ``dies_at`` ends the first process at one of its ``steps``; another takes its
    place. Handlers run one after the other, on the caller's thread.
    """

    def __init__(
        self, service: Service, settings: Settings | None = None, *, dies_at: int | None = None
    ) -> None:
        self._service, self._settings = service, settings or Settings(enable_etcd=True)
        self._agenda, self._random = Agenda(), Random(0)
        store = Store(self._agenda.time, self._settings.etcd_max_txn_ops)
        self._etcd, self._broker = FakeEtcd(self._agenda, store), FakeBroker(self._agenda)
        # What the service publishes is kept; it gets none of its own events.
        self._events = self._broker.sinks[service.exchange] = Queue(service.exchange, {})
        for name, arguments in queue_arguments(service.name, self._settings.retry_delays).items():
            self._broker.queues[name] = Queue(name, arguments)
        self._processes: list[Process] = []
        self._raised: list[BaseException] = []
        # By the garbage collector its coroutines would end outside of a loop, which they say aloud.
        finalize(self, _end, self._processes)
        self._life = self._start(dies_at)
        self._first = self._life
        self._agenda.run(self._agenda.now_s)

    def publish(self, *events: Mapping[str, Any] | bytes, **properties: Any) -> None:
        """Let events arrive together, in this order, and wait until each of them is settled.

        ``properties`` are their messages', by pika's names: ``headers``, ``content_type`` and
        others. Raises AssertionError where one is not settled within an hour of the service's time.
        """
        bodies = [event if isinstance(event, bytes) else orjson.dumps(event) for event in events]
        for body in bodies:
            message = pika.BasicProperties(**properties)
            self._broker.publish("", self._service.name, body, message)
        self._settle()

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
    def raised(self) -> list[BaseException]:
        """What the handlers have raised, in order; ``raise world.raised[0]`` shows its line."""
        return self._raised

    @property
    def parked(self) -> list[Parked]:
        """The messages in the dead-letter queue."""
        dead_letters = self._broker.queues[names.dead_letter_queue(self._service.name)]
        return [
            Parked(
                message.body,
                str(message.headers.get(names.REASON_HEADER, "")),
                str(message.headers.get(names.ERROR_HEADER, "")),
            )
            for message in dead_letters.ready
        ]

    @property
    def counts(self) -> Counter[str]:
        """The counters that are not zero, without the noun, of all processes together."""
        return sum((Counter(process.counts()) for process in self._processes), Counter[str]())

    @property
    def steps(self) -> list[str]:
        """What the first process has done that the outside could notice, step by step."""
        return self._first.steps

    def _start(self, dies_at: int | None = None) -> _Life:
        life = _Life(self._agenda, dies_at)
        service = copy(self._service)
        service.handlers = {
            kind: replace(handler, function=_watched(handler, life, self._raised))
            for kind, handler in self._service.handlers.items()
        }
        self._processes.append(
            Process(
                service, self._broker, self._etcd, self._settings, loop=life, random=self._random
            )
        )
        return life

    def _settle(self) -> None:
        until_s = self._agenda.now_s + _SETTLED_WITHIN_S
        while self._agenda.now_s < until_s:
            self._agenda.run(until_s, lambda: not self._life.alive or self._settled())
            if self._life.alive:
                self._agenda.run(self._agenda.now_s)
            if not self._life.alive:
                self._processes[-1].kill()
                self._life = self._start()
            elif self._settled():
                return
        raise AssertionError(f"not settled after {_SETTLED_WITHIN_S:g} s: {self.records}")

    def _settled(self) -> bool:
        dead_letters = names.dead_letter_queue(self._service.name)
        queues = self._broker.queues.values()
        ready = any(queue.ready for queue in queues if queue.name != dead_letters)
        return not (ready or self._broker.unacked)


def _end(processes: list[Process]) -> None:
    for process in processes:
        process.loop.kill()


class _Life(Loop):
    """One process's life, as a count of the steps that the outside could notice.

    It ends at step ``dies_at``, from 1; nothing that the process does after that has an effect.
    """

    def __init__(self, agenda: Agenda, dies_at: int | None) -> None:
        super().__init__(agenda)
        self._dies_at = dies_at
        self.steps: list[str] = []

    def act(self, when: str, what: Any) -> None:
        super().act(when, what)
        if described := _described(what):
            done, unread = described
            self.note(f"before {done}" if when == "before" else f"{done}, its {unread} is unread")

    def note(self, step: str) -> None:
        """Note a step; raises Killed where the process dies at it."""
        self.steps.append(step)
        if len(self.steps) == self._dies_at:
            self.kill()
            raise Killed


def _described(what: Any) -> tuple[str, str] | None:
    """Return what is there when a request has been done, and what it is answered with."""
    if isinstance(what, Call) and what.method == "Txn" and what.request.success:
        puts = [operation.request_put.key for operation in what.request.success]
        return f"etcd has {', '.join(key.decode() for key in puts if key) or 'a read'}", "answer"
    if isinstance(what, Sent) and what.content:
        method, (_, body) = what
        shown, queue = repr(body[:80]), method.routing_key
        return f"{shown} is published" if method.exchange else f"{queue} has {shown}", "confirm"
    return None


def _watched(handler: Handler, life: _Life, raised: list[BaseException]) -> Callable[..., Any]:
    """Return a handler's function with a step before and behind it."""
    function = handler.function

    @contextmanager
    def steps(event: Any) -> Iterator[None]:
        if not life.alive:
            raise Killed
        life.note(f"{event.type} {event.id}: before its handler")
        try:
            yield
        except Exception as error:
            raised.append(error)
            raise
        life.note(f"{event.type} {event.id}: behind its handler, before its record")

    if handler.is_coroutine:

        @wraps(function)
        async def wait(event: Any, *arguments: Any) -> Any:
            with steps(event):
                return await function(event, *arguments)

        return wait

    @wraps(function)
    def run(event: Any, *arguments: Any) -> Any:
        with steps(event):
            return function(event, *arguments)

    return run
