"""The compose stack as `make up` starts it, in a project and on ports of its own."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager

from demo.broker import Broker
from demo.compose import Compose
from demo.ports import Ports
from servers.graphite import GraphiteCounters
from servers.servers import REPOSITORY

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
    ports = Ports.read(REPOSITORY / ".env").elsewhere()
    stack = Stack(f"browser-{secrets.token_hex(3)}", ports)
    try:
        stack.compose("up", "--build", "--detach", "--wait", timeout_s=_UP_WITHIN_S)
        yield stack
    finally:
        stack.compose(
            "--profile", "example1", "down", "--volumes", "--rmi", "local", "--timeout", "1"
        )
