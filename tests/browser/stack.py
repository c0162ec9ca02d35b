"""The compose stack as `make up` starts it, on its own ports, and a run whose counts are known."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from demo.broker import Broker
from demo.compose import Compose, Ports
from servers.counters import GraphiteCounters
from servers.servers import REPOSITORY
from servers.wait import eventually

EVENTS, REPEATED = 70, 30
_AT_A_TIME = 5
_UP_WITHIN_S = 240.0
_WITHIN_S = 60.0


class Stack:
    """The running stack. Made by `start_stack`."""

    def __init__(self, project: str, ports: Ports) -> None:
        settings = {**ports.settings(), "PUBLISH_ADDRESS": "127.0.0.1", "ENABLE_ETCD": "true"}
        self._compose = Compose(REPOSITORY, project, settings)
        numbers = ports.numbers
        self.graphite = f"http://127.0.0.1:{numbers['PORT_GRAPHITE']}"
        self.counters = GraphiteCounters(self.graphite, time.time())
        self._broker = Broker("127.0.0.1", numbers["PORT_RABBITMQ"], numbers["PORT_RABBITMQ_UI"])

    def compose(self, *arguments: str, timeout_s: float = _WITHIN_S) -> str:
        """Run a command of docker compose and return its output; raises CannotPlayError."""
        return self._compose.run(*arguments, timeout_s=timeout_s)

    def publish(self, event_id: str) -> None:
        """Publish a new_order event; raises OSError."""
        self._broker.publish(event_id).run()


@contextmanager
def start_stack() -> Iterator[Stack]:
    """Build and start everything, yield when it is healthy, and leave nothing behind."""
    ports = Ports.read().elsewhere()
    stack = Stack(f"browser-{secrets.token_hex(3)}", ports)
    try:
        stack.compose("up", "--build", "--detach", "--wait", timeout_s=_UP_WITHIN_S)
        yield stack
    finally:
        stack.compose(
            "--profile", "example1", "down", "--volumes", "--rmi", "local", "--timeout", "1"
        )


@dataclass(frozen=True)
class KnownRun:
    """When it was, in Unix time and whole seconds."""

    began: int
    ended: int


class _Player:
    """Publishes a few events at a time, and goes on once Graphite shows them.

    So the lines rise in steps that can be seen, at the pace of the stack.
    """

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._expected: Counter[str] = Counter()

    def publish(self, ids: range, *counters: str) -> None:
        for first in range(ids.start, ids.stop, _AT_A_TIME):
            some = range(first, min(first + _AT_A_TIME, ids.stop))
            for number in some:
                self._stack.publish(f"order-{number}")
            self.expect(len(some), *counters)

    def expect(self, more: int, *counters: str) -> None:
        self._expected.update(dict.fromkeys(counters, more))
        eventually(self._counted, also=(OSError,))

    def holds(self, gauge: str, number: int) -> None:
        """Wait until Graphite shows that so many are held."""

        def held() -> None:
            assert self._stack.counters.gauge(gauge) == number

        eventually(held, also=(OSError,))

    def _counted(self) -> None:
        counted = {name: self._stack.counters.count(name) for name in self._expected}
        assert counted == self._expected


def play(stack: Stack) -> KnownRun:
    """Play it, and return when Graphite shows all of it; raises AssertionError if it does not.

    70 events, of which 30 come while notify is stopped. Then 30 of them are sent once more.
    """
    player, began = _Player(stack), int(time.time())
    both = ("orders_processed", "notifications_processed")
    player.publish(range(20), *both)
    stack.compose("stop", "notify")
    player.publish(range(20, 50), "orders_processed")
    player.holds("notify_ready", 30)
    stack.compose("start", "notify")
    player.expect(30, "notifications_processed")
    player.publish(range(50, EVENTS), *both)
    player.publish(range(REPEATED), "orders_processed_skipped", "notifications_processed_skipped")
    return KnownRun(began, int(time.time()))
