"""The compose stack as `make up` starts it, in a project and on ports of its own."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from demo.broker import Broker
from demo.command import run
from harness.graphite import GraphiteCounters
from harness.ports import free_port
from harness.servers import REPOSITORY
from harness.services import CONTRACT_VARIABLES

_FILES = ("docker-compose.yaml", "docker-compose.services.yaml")
_PORTS = ("RABBITMQ", "RABBITMQ_UI", "ETCD", "GRAPHITE", "STATSD")
_UP_WITHIN_S = 240.0
_WITHIN_S = 60.0


class Stack:
    """The running stack. Made by `start_stack`."""

    def __init__(self, project: str, ports: Mapping[str, int]) -> None:
        files = [argument for name in _FILES for argument in ("-f", str(REPOSITORY / name))]
        self._command = ["docker", "compose", "-p", project, *files]
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in CONTRACT_VARIABLES and not name.startswith("COMPOSE_")
        }
        published = {f"PORT_{name}": str(number) for name, number in ports.items()}
        self._environment = {
            **inherited, **published, "PUBLISH_ADDRESS": "127.0.0.1", "ENABLE_ETCD": "true",
        }
        self.graphite = f"http://127.0.0.1:{ports['GRAPHITE']}"
        self.counters = GraphiteCounters(self.graphite, time.time())
        self._broker = Broker("127.0.0.1", ports["RABBITMQ"], ports["RABBITMQ_UI"])

    def compose(self, *arguments: str, timeout_s: float = _WITHIN_S) -> str:
        """Run a command of docker compose and return its output; raises CannotPlayError."""
        return run([*self._command, *arguments], self._environment, timeout_s=timeout_s)

    def publish(self, event_id: str) -> None:
        """Publish a new_order event; raises OSError."""
        self._broker.publish(event_id).run()


@contextmanager
def start_stack() -> Iterator[Stack]:
    """Build and start everything, yield when it is healthy, and leave nothing behind."""
    ports = {name: free_port() for name in _PORTS}
    stack = Stack(f"browser-{secrets.token_hex(3)}", ports)
    try:
        stack.compose("up", "--build", "--detach", "--wait", timeout_s=_UP_WITHIN_S)
        yield stack
    finally:
        stack.compose("down", "--volumes", "--rmi", "local", "--timeout", "1")
