"""Signs by which a fault is known to have happened, and a service to be at work or stuck."""

import re
import time
from pathlib import Path

from integration.judging import lines
from servers.services import Service

STUCK_AFTER_S = 25.0


def true(yes: object) -> None:
    """Raise AssertionError unless it is true, for `eventually`."""
    assert yes, "not yet"


def losses(service: Service, because: str = "", *, connection: str = "rabbitmq") -> int:
    """Return how often the service has lost, or failed to open, its connection for consuming."""
    return sum(
        line["connection"] == connection and because in line["error"]
        for line in lines(service, "no connection to RabbitMQ")
    )


def port_of(address: str) -> int:
    """Return the port of host:port, or of an URL that ends with it."""
    return int(address.rstrip("/").rpartition(":")[2])


class Pulse:
    """Whether a service's main thread, its loop, comes round, and its health endpoint answers."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._status = Path(f"/proc/{service.pid}/task/{service.pid}/status")
        self._turns, self._seen_s = self._read(), time.monotonic()

    def check(self) -> None:
        """Raise AssertionError if the loop has not woken up for too long."""
        turns, now_s = self._read(), time.monotonic()
        if turns != self._turns:
            self._turns, self._seen_s = turns, now_s
        assert now_s - self._seen_s < STUCK_AFTER_S, "the loop is stuck"
        assert self._service.health("/livez").status == 200

    def _read(self) -> int:
        found = re.search(
            r"^voluntary_ctxt_switches:\s+(\d+)$", self._status.read_text(), re.MULTILINE
        )
        assert found, "no such line in /proc"
        return int(found[1])
