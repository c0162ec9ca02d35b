"""Faults of the servers as blocks: each begins with the block and is healed at its end."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from urllib.error import HTTPError

from chaos.checks import true
from servers.servers import RabbitMQ, Server
from servers.wait import eventually

Outage = Callable[[Any], AbstractContextManager[None]]

ALARMS = {
    "memory": (("set_vm_memory_high_watermark", "0"), ("set_vm_memory_high_watermark", "0.6")),
    "disk": (("set_disk_free_limit", "1000GB"), ("set_disk_free_limit", "50MB")),
}


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    """Stop a server in order."""
    server.stop()
    yield
    server.start()


@contextmanager
def killed(server: Server) -> Iterator[None]:
    """End a server with SIGKILL."""
    server.kill()
    yield
    server.start()


@contextmanager
def frozen(server: Server) -> Iterator[None]:
    """Freeze a server."""
    server.pause()
    yield
    server.resume()


@contextmanager
def application_stopped(rabbitmq: RabbitMQ) -> Iterator[None]:
    """Stop the broker within its Erlang VM, which stays."""
    rabbitmq.ctl("stop_app")
    try:
        yield
    finally:
        rabbitmq.ctl("start_app")
        rabbitmq.wait_ready()


@contextmanager
def alarm(rabbitmq: RabbitMQ, kind: str) -> Iterator[None]:
    """Let the broker find that it is short of memory or of disk; the block begins when it has."""
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
    """Raise AssertionError if a server that should be frozen answers."""
    try:
        server.probe()
    except OSError:
        return
    raise AssertionError(f"{server.name} answers")
