"""A process and its RabbitMQ in memory, for tests of the bus and the publisher."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

from structlog.testing import LogCapture

from idempotent_consumer.health import Health
from idempotent_consumer.system import System
from idempotent_consumer.testing.broker import Connection, FakeBroker, Session
from idempotent_consumer.testing.loop import Loop, Threads
from idempotent_consumer.testing.process import captured


class Rabbit:
    """RabbitMQ and what a process needs to connect to it.

    ``attempts`` has the time and the node of each attempt to connect.
    """

    def __init__(self) -> None:
        self.loop, self.health, self.lines = Loop(), Health(), LogCapture()
        self.broker = FakeBroker(self.loop.agenda)
        self.attempts: list[tuple[float, str]] = []
        self.connections: list[Connection] = []
        self.system = System(self._connect, self._no_etcd, lambda: 0.0, Random(1), Threads)
        self.log = captured(self.lines)

    @property
    def connection(self) -> Connection:
        """The latest connection."""
        return self.connections[-1]

    @property
    def channel(self) -> Session:
        """The broker's side of the latest connection and its channel."""
        return self.broker.sessions[-1]

    def do(self, what: Callable[[], Any]) -> Any:
        """Do something in the process's loop, with everything that follows without time passing."""

        async def step() -> Any:
            return what()

        result = self.loop.run_until_complete(step())
        self.loop.run_until_idle()
        return result

    def start(self, work: Awaitable[object]) -> Any:
        """Run it as a task, as far as it gets without time passing."""
        task = self.loop.create_task(work)
        self.loop.run_until_idle()
        return task

    def lose(self) -> None:
        """Reset the latest connection."""
        self.broker.lose(self.connection)
        self.loop.run_until_idle()

    def lose_and_wait_s(self) -> float:
        """Reset the latest connection; return the time until the next attempt."""
        lost_s = self.loop.time()
        self.lose()
        return self.next_attempt_s() - lost_s

    def next_attempt_s(self) -> float:
        """Let time pass until the next attempt to connect; return when that was."""
        before = len(self.attempts)
        self.loop.agenda.run(enough=lambda: len(self.attempts) > before)
        self.loop.run_until_idle()
        return self.attempts[before][0]

    def fall_silent(self) -> None:
        """Stop answering on the latest connection, as a frozen broker does."""
        self.connection.to_broker.cut(0)

    def said(self, event: str) -> list[Any]:
        """Return the log lines of this event."""
        return [line for line in self.lines.entries if line["event"] == event]

    def _connect(self, parameters: Any, **callbacks: Any) -> Connection:
        self.attempts.append((self.loop.time(), parameters.host))
        self.connections.append(self.broker.connect(parameters, **callbacks))
        return self.connection

    def _no_etcd(self, *_: object) -> Any:
        raise NotImplementedError
