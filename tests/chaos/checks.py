"""What a test waits for and what it judges by."""

import json
import re
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from chaos.load import ids
from servers.broker import Broker, Event
from servers.checker import Verdict, doubles, judge
from servers.etcd import Store, record_prefix
from servers.servers import RabbitMQ
from servers.services import Health, Service
from servers.wait import eventually

T = TypeVar("T")

StartService = Callable[..., Service]

_EFFECTS = {"order": "/orders/", "shipment": "/parcels/"}
"""Where services write beside their records, a key for each event."""

_IN_STEPS = ("notify", "shipment")
"""Services whose records are claimed, or publishing, before they are done."""


def true(yes: object) -> None:
    """Raise AssertionError unless it is true, for `eventually`."""
    assert yes, "not yet"


def becomes(read: Callable[[], T], expected: T, timeout_s: float = 30.0) -> None:
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
        for raw in service.logs().splitlines(keepends=True)
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


def losses(service: Service, because: str = "", *, connection: str = "rabbitmq") -> int:
    """Return how often the service has lost, or failed to open, its connection for consuming."""
    return sum(
        line["connection"] == connection and because in line["error"]
        for line in lines(service, "no connection to RabbitMQ")
    )


def wait_drained(broker: Broker, *queues: str, timeout_s: float = 60.0) -> None:
    """Wait until the queues hold nothing, neither ready nor unacked."""
    eventually(lambda: broker.assert_drained(*queues), timeout_s, also=(OSError,))


def judge_service(
    service: str,
    store: Store,
    *,
    sent: Iterable[Event],
    confirmed: Iterable[Event],
    parked: Iterable[str] = (),
    first_revision: int | None = None,
) -> Verdict:
    """Judge a run of a service by etcd's whole history, of its records and of their effects.

    Call it when the queues are drained.
    """
    records, effects = record_prefix(service), _EFFECTS.get(service)
    history = store.history(records, *([effects] if effects else []), first=first_revision)
    return judge(
        attempted=ids(list(sent)),
        confirmed=ids(list(confirmed)),
        recorded=store.done(service),
        effected=store.effects(effects) if effects else None,
        parked=parked,
        double=doubles(history, claimed=(records,) if service in _IN_STEPS else ()),
    )


def assert_handled_once(
    service: str,
    store: Store,
    *,
    sent: Iterable[Event],
    confirmed: Iterable[Event],
    at_least: int,
    parked: Iterable[str] = (),
) -> None:
    """Raise AssertionError unless nothing is lost, twice, torn or made up. Drain before."""
    verdict = judge_service(service, store, sent=sent, confirmed=confirmed, parked=parked)
    verdict.require(confirmed_at_least=at_least)
    if service == "order":
        assert {found.version for found in store.orders().values()} == {1}


def times_returned(rabbitmq: RabbitMQ, queue: str) -> list[int]:
    """Return how often each waiting message that ever went back did so, and leave them there."""
    found: Any = rabbitmq.management(
        "POST",
        f"/api/queues/%2f/{queue}/get",
        {"count": 1000, "ackmode": "ack_requeue_true", "encoding": "auto"},
    )
    headers = (message["properties"].get("headers", {}) for message in found)
    return [each["x-delivery-count"] for each in headers if "x-delivery-count" in each]
