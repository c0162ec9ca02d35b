"""What a test waits for, and what it reads of a service."""

import json
import re
import time
from collections.abc import Callable
from typing import Any

from servers.services import Health, Service
from servers.wait import eventually


def true(yes: object) -> None:
    """Raise AssertionError unless it is true, for `eventually`."""
    assert yes, "not yet"


def becomes(read: Callable[[], object], expected: object, timeout_s: float = 30.0) -> None:
    """Wait until what is read equals what is expected; raises AssertionError with the last."""

    def equal() -> None:
        if (found := read()) != expected:
            raise AssertionError(f"{found!r} is not {expected!r}")

    eventually(equal, timeout_s)


def passes(read: Callable[[], int], limit: int, timeout_s: float = 30.0) -> None:
    """Wait until what is read is above a limit; raises AssertionError with the last."""

    def above() -> None:
        if (found := read()) <= limit:
            raise AssertionError(f"{found} is not above {limit}")

    eventually(above, timeout_s)


def throughout(duration_s: float, assertion: Callable[[], object]) -> None:
    """Let a fault last, and check all the while."""
    until = time.monotonic() + duration_s

    def over() -> None:
        try:
            assertion()
        except AssertionError as error:
            raise RuntimeError(f"meanwhile: {error}") from error
        if time.monotonic() < until:
            raise AssertionError("not over")

    eventually(over, duration_s + 60)


def not_ready(service: Service, *missing: str) -> dict[str, str]:
    """Return why a service is not ready; raises AssertionError unless these are among them."""
    health: Health = service.health()
    if health.status != 503 or not set(missing) <= set(health.body["missing"]):
        raise AssertionError(f"{health}, where {missing} should be missing")
    if not service.running:
        raise AssertionError("it has ended")
    reasons: dict[str, str] = health.body["missing"]
    return reasons


def holds(service: Service, why: str = "") -> None:
    """Raise AssertionError unless a service is alive and not ready, for a reason like `why`.

    The reason that it gives for etcd is searched for this regular expression.
    """
    assert service.health("/livez").status == 200
    reason = not_ready(service, "etcd")["etcd"]
    assert re.search(why, reason), reason


def lines(service: Service, text: str) -> list[dict[str, Any]]:
    """Return the log lines whose message contains a text."""
    return [
        line
        for raw in service.output().splitlines(keepends=True)
        if raw.startswith("{")
        and raw.endswith("}\n")
        and text in (line := json.loads(raw)).get("event", "")
    ]


def says(service: Service, text: str, times: int = 1) -> list[dict[str, Any]]:
    """Return the log lines with a text; raises AssertionError unless there are so many."""
    found = lines(service, text)
    if len(found) < times:
        raise AssertionError(f"{len(found)} times {text!r}")
    return found


def losses(service: Service, because: str = "") -> int:
    """Return how often the service has lost, or failed to open, its connection for consuming."""
    return sum(
        line["connection"] == "rabbitmq" and because in line["error"]
        for line in lines(service, "no connection to RabbitMQ")
    )
