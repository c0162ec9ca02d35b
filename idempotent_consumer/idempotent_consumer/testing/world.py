"""A service in memory: its handlers on the library's own code, with no server and no thread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import orjson

from .. import names
from ..bus.delivery import Delivery
from ..handlers import Handler
from ..ledger.records import decode
from ..service import Service
from ..settings import Settings
from .bus import FakeBus, Forwarded
from .etcd import ANSWER_LOST, FINE, REQUEST_LOST, Fate
from .loop import ManualLoop
from .process import Process
from .store import Store

_SETTLED_WITHIN_S = 3600.0
_STEP_S = 0.5


class Parked(NamedTuple):
    """A message in the dead-letter queue."""

    body: bytes
    reason: str
    error: str


class Life:
    """One process's life, as a count of the steps that the outside could notice.

    It ends at step ``ends_at``, from 1; nothing that the process does after that has an effect.
    """

    def __init__(self, ends_at: int | None = None) -> None:
        self._ends_at = ends_at
        self.steps: list[str] = []
        self.dead = False

    def step(self, what: str) -> bool:
        """Note a step, and return whether the process lives on."""
        if not self.dead:
            self.steps.append(what)
            self.dead = len(self.steps) == self._ends_at
        return not self.dead


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
        self._loop = ManualLoop()
        self._store = Store(self._loop.now_s, self._settings.etcd_max_txn_ops)
        self._processes: list[_Process] = []
        self._published: list[bytes] = []
        self._coming_back = 0
        self.parked: list[Parked] = []
        self._start(Life(dies_at))

    def publish(self, *events: Mapping[str, Any] | bytes) -> None:
        """Let events arrive together, in this order, and wait until each of them is settled.

        Raises AssertionError where one is not within an hour of the service's time.
        """
        bodies = [event if isinstance(event, bytes) else orjson.dumps(event) for event in events]
        self._process.bus.deliver(*bodies)
        self._settle()

    @property
    def effects(self) -> dict[str, bytes]:
        """What the handlers have written, by key."""
        keys = self._store.keys()
        return {
            key: self._store.get(key).value
            for key in keys
            if not key.startswith(names.RESERVED_PREFIXES)
        }

    @property
    def records(self) -> dict[str, str]:
        """The state of each record, by the event's id (as it stands in the key)."""
        prefix = names.record_prefix(self._service.name)
        return {
            key.removeprefix(prefix): decode(self._store.get(key).value, 0).state
            for key in self._store.keys(prefix)
        }

    @property
    def published(self) -> list[dict[str, Any]]:
        """The events that the service has published, in order, with those published again."""
        return [orjson.loads(body) for body in self._published]

    @property
    def counts(self) -> Counter[str]:
        """The counters that are not zero, without the noun, of all processes together."""
        return sum((Counter(process.counts()) for process in self._processes), Counter[str]())

    @property
    def steps(self) -> list[str]:
        """What the first process has done that the outside could notice, step by step."""
        return self._processes[0].life.steps

    @property
    def _process(self) -> _Process:
        return self._processes[-1]

    def _start(self, life: Life) -> None:
        name = f"{len(self._processes):032x}"
        self._processes.append(
            _Process(
                life,
                self._loop,
                self._store,
                self._service,
                name,
                self._settings,
                self._sent,
                self._published.append,
            )
        )
        self._process.open()

    def _sent(self, message: Forwarded) -> None:
        """Take what a process has sent on: a dead letter stays, a retry comes back in time."""
        if message.queue == names.dead_letter_queue(self._service.name):
            reason, error = (
                str(message.headers.get(name, ""))
                for name in (names.REASON_HEADER, names.ERROR_HEADER)
            )
            self.parked.append(Parked(message.body, reason, error))
            return
        delays = {
            names.retry_queue(self._service.name, delay): seconds
            for delay, seconds in self._settings.retry_delays
        }
        self._coming_back += 1
        self._loop.call_later(delays[message.queue], partial(self._come_back, message))

    def _come_back(self, message: Forwarded) -> None:
        self._coming_back -= 1
        self._process.bus.come_back(message)

    def _settle(self) -> None:
        until_s = self._loop.now_s() + _SETTLED_WITHIN_S
        while self._loop.now_s() < until_s:
            self._loop.run_until_idle()
            self._process.work()
            if self._process.life.dead:
                self._replace()
            elif self._process.bus.in_hand or self._coming_back:
                self._loop.advance(_STEP_S)
            else:
                return
        raise AssertionError(f"not settled after {_SETTLED_WITHIN_S:g} s: {self.records}")

    def _replace(self) -> None:
        left = list(self._process.bus.channel.unacked.values())
        self._start(Life())
        for delivery in left:
            self._process.bus.deliver(delivery.body, properties=delivery.properties)


class _Process(Process):
    """A process that can die between any two of its steps."""

    def __init__(
        self,
        life: Life,
        loop: ManualLoop,
        store: Store,
        service: Service,
        name: str,
        settings: Settings,
        sent: Callable[[Forwarded], None],
        published: Callable[[bytes], None],
    ) -> None:
        self.life = life
        handlers = {
            kind: replace(handler, function=self._watched(handler))
            for kind, handler in service.handlers.items()
        }
        super().__init__(
            loop,
            store,
            handlers,
            name,
            settings,
            service=service.name,
            noun=service.noun,
            bus=_Bus(loop, life, sent, published),
            own_loop=_Loop(loop, life),
        )
        self.etcd.fate = self._fate

    def _watched(self, handler: Handler) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            event = arguments[0]
            if not self.life.step(f"{event.type} {event.id}: before its handler"):
                raise RuntimeError("the process has died")
            result = handler.function(*arguments)
            self.life.step(f"{event.type} {event.id}: behind its handler, before its record")
            return result

        return run

    def _fate(self, method: str, request: Any) -> Fate:
        if method != "Txn" or not request.success:
            return FINE
        what = (
            ", ".join(
                operation.request_put.key.decode()
                for operation in request.success
                if operation.request_put.key
            )
            or "a read"
        )
        if not self.life.step(f"before etcd has {what}"):
            return REQUEST_LOST
        return FINE if self.life.step(f"etcd has {what}, its answer is unread") else ANSWER_LOST


class _Bus(FakeBus):
    """The broker's side of a process, which hears nothing of a dead one."""

    def __init__(
        self,
        loop: ManualLoop,
        life: Life,
        sent: Callable[[Forwarded], None],
        published: Callable[[bytes], None],
    ) -> None:
        super().__init__(loop)
        self._life, self._sent, self._published = life, sent, published

    def flush(self) -> None:
        """Ack what is settled up to the first delivery in hand."""
        if not self._life.dead:
            super().flush()

    def flush_past_gap(self) -> None:
        """Ack all that is settled."""
        if not self._life.dead:
            super().flush_past_gap()

    def forward(
        self,
        delivery: Delivery,
        queue: str,
        headers: dict[str, object],
        confirmed: Callable[[], None],
    ) -> None:
        """Send a message on: to a retry queue, or to the dead letters."""
        if delivery.alive and self._life.step(f"before {queue} has {delivery.body[:80]!r}"):
            self._sent(Forwarded(delivery, queue, headers, confirmed))
            if self._life.step(f"{queue} has {delivery.body[:80]!r}, its confirm is unread"):
                self._loop.call_soon(confirmed)

    def publish(self, body: bytes, confirmed: Callable[[], None]) -> None:
        """Publish an event."""
        if self._life.step(f"before {body[:80]!r} is published"):
            self._published(body)
            if self._life.step(f"{body[:80]!r} is published, its confirm is unread"):
                self._loop.call_soon(confirmed)


class _Loop:
    """A process's loop: what it was to call is not called once it is dead."""

    def __init__(self, loop: ManualLoop, life: Life) -> None:
        self._loop, self._life = loop, life
        self.now_s = loop.now_s

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call as soon as the loop is free."""
        self._loop.call_soon(partial(self._call, callback))

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call after a delay."""
        self._loop.call_later(delay_s, partial(self._call, callback))

    def _call(self, callback: Callable[[], None]) -> None:
        if not self._life.dead:
            callback()
