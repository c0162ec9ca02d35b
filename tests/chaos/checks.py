"""What tests wait for, and what they read from a service."""

import json
import re
import time
from collections.abc import Callable
from typing import Any

from servers.services import Service
from servers.wait import eventually


def true(yes: object) -> None:
    """Raise AssertionError unless a value is true, for `eventually`."""
    assert yes, "not yet"


def becomes(
    read: Callable[[], object],
    expected: object,
    timeout_s: float = 30.0,
    *,
    also: tuple[type[Exception], ...] = (),
) -> None:
    """Wait until `read` returns what is expected; raises AssertionError with the last value.

    `also` names errors that mean "not yet", as for `eventually`.
    """

    def equal() -> None:
        found = read()
        assert found == expected, f"{found!r} is not {expected!r}"

    eventually(equal, timeout_s, also=also)


def passes(read: Callable[[], int], limit: int, timeout_s: float = 30.0) -> None:
    """Wait until `read` returns more than a limit; raises AssertionError with the last value."""

    def above() -> None:
        found = read()
        assert found > limit, f"{found} is not above {limit}"

    eventually(above, timeout_s)


def throughout(duration_s: float, assertion: Callable[[], object]) -> None:
    """Let a fault last, and check an assertion all the time."""
    until_s = time.monotonic() + duration_s

    def over() -> None:
        try:
            assertion()
        except AssertionError as error:
            raise RuntimeError(f"meanwhile: {error}") from error
        assert time.monotonic() >= until_s, "not over"

    eventually(over, duration_s + 60)


def not_ready(service: Service, *missing: str) -> dict[str, str]:
    """Return why a service is not ready; raises AssertionError unless these are missing."""
    health = service.health()
    reasons: dict[str, str] = health.body["missing"]
    lacks = health.status == 503 and set(missing) <= set(reasons)
    assert lacks, f"{health}, where {missing} should be missing"
    assert service.running, "it has ended"
    return reasons


def holds(service: Service, why: str = "") -> None:
    """Raise AssertionError unless a service is alive, and not ready because of etcd.

    The regular expression `why` has to occur in the reason that it gives.
    """
    assert service.health("/livez").status == 200
    reason = not_ready(service, "etcd")["etcd"]
    assert re.search(why, reason), reason


def lines(service: Service, text: str) -> list[dict[str, Any]]:
    """Return the log lines with a text in their message."""
    return [
        line
        for raw in service.output().splitlines(keepends=True)
        if raw.startswith("{")
        and raw.endswith("}\n")
        and text in (line := json.loads(raw)).get("event", "")
    ]


def says(service: Service, text: str, times: int = 1) -> list[dict[str, Any]]:
    """Return the log lines with a text; raises AssertionError if there are fewer than `times`."""
    found = lines(service, text)
    assert len(found) >= times, f"{len(found)} times {text!r}"
    return found


def losses(service: Service, because: str = "", connection: str = "rabbitmq") -> int:
    """Return how often a service has lost a connection or failed to open one."""
    return sum(
        line["connection"] == connection and because in line["error"]
        for line in lines(service, "no connection to RabbitMQ")
    )
