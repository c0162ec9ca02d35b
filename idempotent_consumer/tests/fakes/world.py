"""Processes of the service "order" in memory, each with a broker of its own, on one etcd's data."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any, Self

from fakes.events import Claimed, Pure
from idempotent_consumer import Service, Settings, names
from idempotent_consumer.calls import Handler
from idempotent_consumer.event import Decoder
from idempotent_consumer.records import CLAIMED, Record
from idempotent_consumer.records import decode as decode_record
from idempotent_consumer.testing.broker import FakeBroker, Message, Queue
from idempotent_consumer.testing.etcd import FakeEtcd, Store
from idempotent_consumer.testing.loop import Agenda
from idempotent_consumer.testing.process import SETTINGS, Process

DEAD_LETTERS, FIRST_RETRY = "order.dead-letter", "order.retry.1s"
RECONNECTED_S = 1.0
"""Longer than a process waits before it connects again."""

Handlers = Pure | Claimed | Handler | Mapping[str, Handler]
"""A handler of ``new_order``, or handlers by their event type."""


class Order(Process):
    """A process of the service "order", in a world that it may share with others.

    ``pure`` or ``claimed`` is the handler that it was started with.
    """

    def __init__(
        self,
        world: World,
        handlers: Handlers,
        settings: Settings = SETTINGS,
        *,
        decode: Decoder | None = None,
        **options: Any,
    ) -> None:
        self.world, self.store = world, world.store
        self.pure = handlers if isinstance(handlers, Pure) else Pure()
        self.claimed = handlers if isinstance(handlers, Claimed) else Claimed()
        if isinstance(handlers, Pure | Claimed):
            handlers = handlers.handler
        # The events that it publishes go to another queue, and do not come back.
        service = Service("order", noun="orders", bindings=["none"], decode=decode)
        service.handlers = (
            {"new_order": handlers} if isinstance(handlers, Handler) else dict(handlers)
        )
        broker = FakeBroker(world.agenda)
        self.acks = broker.acks
        broker.queues["others"] = Queue("others", {})
        broker.exchanges[names.EXCHANGE] = [("#", "others")]
        super().__init__(
            service,
            broker,
            FakeEtcd(world.agenda, world.store),
            settings,
            random=Random(len(world.processes)),
            elapsed_s=world.elapsed_s,
            **options,
        )
        world.processes.append(self)
        self.run_until_idle()

    # What the test does.

    def confirm(self, number: int | None = None) -> None:
        """Confirm the message with this number on its channel, or all that are unconfirmed."""
        for session in self.broker.sessions:
            for each in list(session.unconfirmed):
                if number in (each, None):
                    session.confirm(each)
        self.run_until_idle()

    def lose_channel(self) -> None:
        """Reset the consuming connection: unacked deliveries are requeued."""
        (consuming,) = (each.connection for each in self.broker.sessions if each.consuming)
        self.broker.lose(consuming)
        self.run_until_idle()

    def reconnect(self) -> None:
        """Lose the channel, and wait until the requeued deliveries have come again."""
        self.lose_channel()
        self.advance(RECONNECTED_S)

    # What the test looks at.

    @property
    def acked(self) -> list[bytes]:
        return [message.body for message in self.broker.acked]

    @property
    def in_hand(self) -> int:
        """How many deliveries the process has not settled."""
        return self.running.intake.in_hand

    @property
    def forwarded(self) -> list[Message]:
        """The messages that it published to queues, in order: retries and dead letters."""
        return [message for message in self.broker.published if not message.exchange]

    @property
    def parked(self) -> list[Message]:
        return [message for message in self.forwarded if message.routing_key == DEAD_LETTERS]

    @property
    def published(self) -> list[bytes]:
        return [message.body for message in self.broker.published if message.exchange]

    def record(self, event_id: str = "1") -> Record:
        return decode_record(self.store.get(f"/service/order/{event_id}").value)

    def states(self) -> list[str]:
        """Return the state of each record that was put, in order."""
        puts = self.store.puts("/service/order/")
        return [decode_record(change.value or b"").state for change in puts]

    def claims(self) -> int:
        """Return how many records are claimed."""
        keys = self.store.keys("/service/order/")
        return sum(decode_record(self.store.get(key).value).state == CLAIMED for key in keys)

    def logged(self, part: str) -> list[Mapping[str, Any]]:
        """Return the log lines whose event contains this."""
        return [line for line in self.lines.entries if part in line["event"]]


class World:
    """An etcd's data, a clock, and processes, which share both.

    At its end, whatever the test has done, each delivery has to be counted once.
    """

    def __init__(self) -> None:
        self.agenda, self._suspended_s = Agenda(), 0.0
        self.store = Store(self.elapsed_s)
        self.processes: list[Order] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, handlers: Handlers | None = None, **options: Any) -> Order:
        """Start a process, by default with a pure handler, and let it connect."""
        return Order(self, Pure() if handlers is None else handlers, **options)

    def skip(self, seconds: float) -> None:
        """Let time pass in which no process runs. What was due meanwhile happens then."""
        for process in self.processes:
            process.freeze(seconds)
        self.agenda.run(self.agenda.now_s + seconds)

    def suspend(self, seconds: float) -> None:
        """Let time pass for etcd alone: the machine is suspended, and its loops' clocks stop."""
        self._suspended_s += seconds

    def elapsed_s(self) -> float:
        """Return seconds on a clock that goes on while the machine is suspended."""
        return self.agenda.time() + self._suspended_s

    def close(self) -> None:
        """End all processes. Raises AssertionError unless each delivery was counted once."""
        alive = [process for process in self.processes if process.alive]
        miscounted = [process.miscounted() for process in alive]
        for process in alive:
            process.kill()
        if any(miscounted):
            raise AssertionError(f"deliveries are not counted once each: {miscounted}")
