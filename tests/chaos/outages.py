"""Faults of the servers as context managers, which heal them at the end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import methodcaller
from typing import Any
from urllib.error import HTTPError

from chaos.checks import true
from servers.servers import RabbitMQ, Server
from servers.wait import eventually

ALARMS = {
    "memory": (("set_vm_memory_high_watermark", "0"), ("set_vm_memory_high_watermark", "0.6")),
    "disk": (("set_disk_free_limit", "1000GB"), ("set_disk_free_limit", "50MB")),
}


@dataclass(frozen=True)
class Outage:
    """A fault of a server, or of a service, as a context manager."""

    name: str
    begin: Callable[[Any], object]
    end: Callable[[Any], object]

    @contextmanager
    def __call__(self, victim: Any) -> Iterator[None]:
        self.begin(victim)
        try:
            yield
        finally:
            self.end(victim)


def _start_application(rabbitmq: RabbitMQ) -> None:
    rabbitmq.ctl("start_app")
    rabbitmq.wait_ready()


stopped = Outage("stopped", methodcaller("stop"), methodcaller("start"))
killed = Outage("killed", methodcaller("kill"), methodcaller("start"))
frozen = Outage("frozen", methodcaller("pause"), methodcaller("resume"))
application_stopped = Outage(
    "application stopped", methodcaller("ctl", "stop_app"), _start_application
)
"""The broker stops within its Erlang VM, which goes on."""


@contextmanager
def alarm(rabbitmq: RabbitMQ, kind: str) -> Iterator[None]:
    """Make the broker raise an alarm for memory or disk; the block starts with the alarm."""
    raised, lowered = ALARMS[kind]
    try:
        rabbitmq.ctl(*raised)
        eventually(lambda: true(alarmed(rabbitmq)))
        yield
    finally:
        rabbitmq.ctl(*lowered)
        eventually(lambda: true(not alarmed(rabbitmq)))


def alarmed(rabbitmq: RabbitMQ) -> bool:
    """Return whether the broker has an alarm; raises OSError."""
    try:
        rabbitmq.management("GET", "/api/health/checks/alarms")
    except HTTPError as error:
        error.close()
        return True
    return False


def silent(server: Server) -> None:
    """Raise AssertionError if a frozen server answers."""
    try:
        server.probe()
    except OSError:
        return
    raise AssertionError(f"{server.name} answers")
