"""``status``, ``gauges``, ``find`` and ``remove``: what the servers hold, and what is not known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
import pytest

from fakes.operator import ETCD_AWAY, NO_QUEUES, PAGE_AWAY, RABBITMQ_AWAY, Operator
from idempotent_consumer.cli import records, status
from idempotent_consumer.cli.broker import Depth
from idempotent_consumer.cli.web import WebError
from idempotent_consumer.event import Outgoing

BODY = b'{"id":"1","type":"a"}'


@pytest.fixture
def operator() -> Operator:
    """An operator whose service order holds something of each kind."""
    operator = Operator()
    operator.has_service("order", dead=2)
    operator.depths |= {"order": Depth(7, 3), "order.retry.10s": Depth(4, 0)}
    operator.queue("order")["messages_unacknowledged"] = 5
    operator.has_record("order", "1")
    operator.has_record("order", "2", state="claimed")
    operator.has_record("order-2", "1")
    return operator


def services(operator: Operator, *arguments: str) -> Any:
    return operator.run("status", *arguments, "--json").json["services"]


def test_a_service_is_shown_as_json_and_as_a_row_of_the_table(operator: Operator) -> None:
    found = operator.run("status", "--json").json
    assert found["services"] == {
        "order": {
            "ready": 7,
            "unacked": 5,
            "consumers": 3,
            "dead_letters": 2,
            "retries": {"1s": 0, "10s": 4, "60s": 0},
            "records": 2,
            "states": {"done": 1, "claimed": 1, "publishing": 0, "released": 0},
            "incarnation": "first",
        }
    }
    assert set(found["versions"]) == {"idempotent-consumer", "rabbitmq", "etcd"}
    names = "SERVICE READY UNACKED CONSUMERS RETRIES DEAD RECORDS CLAIMED PUBLISHING INCARNATION"
    ran = operator.run("status")
    assert (ran.code, ran.lines[1].split()) == (0, names.split())
    assert ran.lines[2].split() == ["order", "7", "5", "3", "10s:4", "2", "2", "1", "0", "first"]


def test_services_are_found_by_their_dead_letter_queues(operator: Operator) -> None:
    """And their retry queues by name, whatever RETRY_DELAYS says."""
    operator.has_service("notify")
    for name in ("lone.dead-letter", "somebody-elses", "order.retry.5m"):
        operator.queues.append({"name": name})
    operator.depths["order.retry.5m"] = Depth(1, 0)
    assert list(services(operator)) == ["notify", "order"]
    assert services(operator)["order"]["retries"]["5m"] == 1
    assert list(services(operator, "notify")) == ["notify"]


@pytest.mark.parametrize(
    ("depth", "problem"),
    [
        (None, "order has no queue: it has not run yet, or this is another name"),
        (Depth(50_007, 0), "order has no consumer, and its queue grows with each event"),
    ],
)
def test_a_service_that_does_not_run_is_a_problem(
    operator: Operator, depth: Depth | None, problem: str
) -> None:
    operator.depths = {"order": depth} if depth else {}
    operator.ends(1, problem, "status", "order")
    row = services(operator, "order")["order"]
    assert (row["ready"], row["dead_letters"]) == (depth and depth.ready, None)
    assert (row["retries"], row["records"]) == ({}, 2)


def test_without_the_management_api_services_have_to_be_named(operator: Operator) -> None:
    operator.pages |= NO_QUEUES
    operator.ends(1, "or name the services", "status")
    assert "; or name the services\n" in operator.run("gauges").out
    assert operator.sent == [{}]
    operator.ends(0, "what is unacked or waits for a retry is not known. ", "status", "order")
    row = services(operator, "order")["order"]
    assert (row["ready"], row["unacked"], row["retries"]) == (7, None, None)
    assert operator.run("status", "order").lines[2].split()[:5] == ["order", "7", "?", "3", "?"]


@pytest.mark.parametrize("answer", [b"null", b'{"error":"no"}', b"[1]", b"[{}]", b'"queues"'])
def test_an_api_that_lists_no_queues_counts_as_away(operator: Operator, answer: bytes) -> None:
    operator.pages["api/queues/%2F"] = answer
    operator.ends(1, "the answer is no list of queues (RABBITMQ_MANAGEMENT_URL says", "status")
    operator.ends(0, "what is unacked or waits for a retry is not known. ", "status", "order")


def test_what_can_be_seen_is_shown_while_a_server_is_away(operator: Operator) -> None:
    operator.etcd_error = ETCD_AWAY
    ran = operator.run("status")
    assert (ran.code, ran.lines[-1]) == (1, "etcd is away")
    assert ran.lines[2].split()[:2] == ["order", "7"]
    operator.etcd_error, operator.rabbitmq_error = None, RABBITMQ_AWAY
    ran = operator.run("status", "--json")
    assert ran.json["problems"] == ["RabbitMQ is away"]
    assert ran.json["services"]["order"]["records"] == 2
    assert operator.run("status").lines[2].split()[:7] == ["order", *"?????", "2"]


def test_states_of_many_records_are_counted_when_asked_for(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "READ_AT_MOST", 1)
    row = services(operator)["order"]
    assert (row["records"], row["states"]) == (2, None)
    assert operator.run("status").lines[2].split()[6:9] == ["2", "?", "?"]
    assert services(operator, "--states")["order"]["states"]["claimed"] == 1


READY = b'{"ready":true,"missing":{}}'
URL = "http://order:8080"


def test_the_ages_of_duplicates_are_shown(operator: Operator) -> None:
    ages = {"read": 5, "oldest_s": 93.0, "within": {"1s": 0, "10s": 3, "1m": 4, "10m": 5}}
    operator.pages |= {"readyz": READY, "duplicates": orjson.dumps(ages)}
    assert operator.run("status", "--ready", f"{URL}/readyz").lines[-1] == (
        f"{URL}/readyz: 5 duplicates looked at: 1m 33s at most after the record, "
        "3 within 10s, 4 within 1m"
    )
    ready = operator.run("status", "--ready", URL, "--json").json["ready"]
    assert ready[0]["duplicates"] == ages


@pytest.mark.parametrize(
    "page",
    [
        *(PAGE_AWAY, b"<html>", b"[]", b"{}"),
        b'{"read":0,"oldest_s":0,"within":{}}',
        b'{"read":"many","oldest_s":0,"within":{}}',
    ],
)
def test_duplicates_without_ages_are_not_shown(operator: Operator, page: bytes | WebError) -> None:
    operator.pages |= {"readyz": READY, "duplicates": page}
    ran = operator.run("status", "--ready", URL)
    assert (ran.code, ran.lines[-1]) == (0, f"{URL} is ready")


@pytest.mark.parametrize(
    ("answer", "code", "says"),
    [
        (READY, 0, "ready"),
        (
            WebError("503", 503, b'{"ready":false,"missing":{"etcd":"wiped"}}'),
            1,
            "not ready: etcd: wiped",
        ),
        (WebError("503", 503, b'{"missing":["db"]}'), 1, "not ready: answer: 503"),
        (PAGE_AWAY, 1, "not ready: answer: 127.0.0.1 does not answer"),
        (b"[]", 1, "not ready: answer: "),
        (b"{}", 1, "not ready: answer: "),
        (b"<html>", 1, "not ready: answer: the answer is not JSON"),
    ],
)
@pytest.mark.parametrize("url", [URL, f"{URL}/readyz"])
def test_a_service_is_ready_or_it_is_shown_why_not(
    operator: Operator, answer: bytes | WebError, code: int, says: str, url: str
) -> None:
    operator.pages["readyz"] = answer
    operator.ends(code, f"{url} is {says}", "status", "--ready", url)


# gauges

QUEUES, KEYS = {"order_ready": 7, "order_dead_letters": 2}, {"order_records": 2, "order_effects": 1}
UNACKED, RETRIES = {"order_unacked": 5}, {"order_retries": 4}
ALL = QUEUES | UNACKED | RETRIES | KEYS


def gauges(operator: Operator, *more: str) -> Any:
    operator.store.put("/orders/1", b"{}")
    operator.store.put("/ordersheet", b"{}")
    return operator.run("gauges", "--effects", "order=/orders/", *more)


def test_everything_that_is_held_is_sent_and_shown(operator: Operator) -> None:
    assert gauges(operator, "--json").json == {"gauges": ALL, "missing": {}}
    assert operator.sent == [ALL]
    assert "order_records 2\n" in gauges(operator).out


API_AWAY = (
    "RabbitMQ's management API: 127.0.0.1 does not answer "
    "(RABBITMQ_MANAGEMENT_URL says where it is)"
)


@pytest.mark.parametrize(
    ("fault", "missing", "left"),
    [
        (
            lambda operator: setattr(operator, "etcd_error", ETCD_AWAY),
            {"etcd": "etcd is away"},
            QUEUES | UNACKED | RETRIES,
        ),
        (
            lambda operator: setattr(operator, "rabbitmq_error", RABBITMQ_AWAY),
            {"rabbitmq": "RabbitMQ is away"},
            KEYS,
        ),
        # A sum of the known retry queues would be too small: handlers may have others.
        (
            lambda operator: operator.pages.update(NO_QUEUES),
            {"unacked": API_AWAY, "retries": API_AWAY},
            QUEUES | KEYS,
        ),
        (
            lambda operator: operator.queue("order").pop("messages_unacknowledged"),
            {"unacked": "RabbitMQ's management API does not tell"},
            QUEUES | RETRIES | KEYS,
        ),
    ],
    ids=["etcd away", "RabbitMQ away", "API away", "API without unacked"],
)
def test_what_cannot_be_counted_is_reported_and_the_rest_is_sent(
    operator: Operator,
    fault: Callable[[Operator], object],
    missing: dict[str, str],
    left: dict[str, int],
) -> None:
    fault(operator)
    ran = gauges(operator, "order")
    assert (ran.code, operator.sent) == (1, [left])
    said = [line for line in ran.lines if line.startswith("not counted")]
    assert said == [f"not counted: {what}: {why}" for what, why in missing.items()]
    assert gauges(operator, "order", "--json").json["missing"] == missing


def test_a_strangers_queues_are_no_service(operator: Operator) -> None:
    """Otherwise whoever may declare a queue could write any metric in statsd."""
    operator.has_service("order:1|c\norders_failed", dead=1)
    assert gauges(operator, "--json").json["gauges"] == ALL
    assert operator.sent == [ALL]


def test_round_after_round_faults_are_reported_when_they_begin_and_end(operator: Operator) -> None:
    """No old number is sent. Without the management API, the services found last are counted."""
    steps: list[Callable[[], object]] = [
        lambda: setattr(operator, "etcd_error", ETCD_AWAY),
        lambda: operator.has_record("order", "3"),
        lambda: setattr(operator, "etcd_error", None),
        lambda: operator.pages.update(NO_QUEUES),
    ]

    def wait() -> None:
        if not steps:
            raise KeyboardInterrupt
        steps.pop(0)()

    operator.waits = wait
    said = gauges(operator, "--every", "1s").err.splitlines()
    assert [line.split(": ")[1:3] for line in said] == [
        *(["not counted", "etcd"], ["counted again", "etcd"]),
        *(["not counted", "unacked"], ["not counted", "retries"], ["interrupted"]),
    ]
    three = {"order_records": 3}
    without = [QUEUES | UNACKED | RETRIES] * 2
    assert operator.sent == [ALL, *without, ALL | three, QUEUES | KEYS | three]


# find and remove


@pytest.fixture
def several() -> Operator:
    """An operator of several services."""
    operator = Operator()
    for service in ("billing", "notify", "order"):
        operator.has_service(service)
    return operator


def test_an_event_is_found_in_every_place_of_every_service(several: Operator) -> None:
    several.has_record("order", "1")
    several.has_letter(BODY, "notify.retry.10s", attempts=2, error="ConnectionError: no")
    several.has_letter(b'{"id":"2","type":"a"}', "notify.retry.10s", attempts=1, error="x")
    several.has_letter(BODY, "billing.dead-letter", reason="failed", error="KeyError: 'EUR'")
    several.has_letter(BODY, "billing")
    ran = several.run("find", "1")
    assert (ran.code, ran.lines) == (
        0,
        [
            "billing: waits in billing",
            "billing: a dead letter: failed: KeyError: 'EUR'",
            "notify: waits in notify.retry.10s for its next attempt, after 2: ConnectionError: no",
            "order: done, 1m 40s ago",
        ],
    )
    found = several.run("find", "1", "--json").json["services"]
    held = [message["queue"] for message in found["billing"]["messages"]]
    assert (held, found["order"]["record"]["state"]) == (["billing", "billing.dead-letter"], "done")
    assert (several.removed, several.resent) == ([], [])


@pytest.mark.parametrize("state", ["claimed", "publishing"])
def test_an_event_in_flight_is_found_by_its_record(several: Operator, state: str) -> None:
    events = (Outgoing(BODY),) if state == "publishing" else ()
    several.has_record("order", "1", state=state, events=events)
    assert several.run("find", "1", "order").out == f"order: {state}, 1m 40s ago (in flight)\n"


def test_an_event_that_no_service_has_is_not_found(several: Operator) -> None:
    several.queue("order")["messages_unacknowledged"] = 3
    ran = several.run("find", "1", "order", "notify")
    assert ran.code == 1
    assert ran.lines == [
        "order: not found; its replicas have 3 in flight, which may include it",
        "notify: not found",
    ]
    assert Operator().run("find", "1").out == "no service has declared its queues yet\n"


def test_without_the_management_api_it_is_shown_what_was_not_searched(several: Operator) -> None:
    several.has_letter(BODY, "order.retry.5m", attempts=1, error="x")
    several.pages |= NO_QUEUES
    ran = several.run("find", "1", "order")
    assert (ran.code, ran.lines[0], len(ran.lines)) == (1, "order: not found", 2)
    assert ran.lines[1].startswith(
        "not looked for in flight, nor in retry queues whose delay RETRY_DELAYS does not have. "
        "RabbitMQ's management API: 127.0.0.1 does not answer"
    )
    several.has_letter(BODY, "order.retry.10s", attempts=1, error="x")
    ran = several.run("find", "1", "order")
    waits = "order: waits in order.retry.10s for its next attempt, after 1: x"
    assert (ran.code, ran.lines[0]) == (0, waits)
    missing = several.run("find", "1", "order", "--json").json["missing"]
    assert list(missing) == ["unacked", "retries"]


def test_a_message_that_leaves_one_queue_does_not_end_the_search(several: Operator) -> None:
    several.left["order.retry.1s"] = 1
    several.has_letter(BODY, "order.retry.1s", attempts=1, error="x")
    several.has_letter(BODY, "order.dead-letter", reason="failed", error="x")
    several.has_record("order", "1")
    assert several.run("find", "1", "order").lines == [
        "order: done, 1m 40s ago",
        "order: waits in order.retry.1s for its next attempt, after 1: x",
        "order: a dead letter: failed: x",
    ]


def test_a_large_queue_is_searched_only_with_all(
    several: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "LOOKED_AT_MOST", 1)
    for _ in range(2):
        several.has_letter(BODY, "order")
    assert several.run("find", "1", "order").lines == [
        "order: not found",
        "order: not looked for among the 2 messages of order: --all does",
    ]
    assert several.looked_at == 0
    assert several.run("find", "1", "order", "--all").lines == ["order: waits in order"] * 2


def test_a_services_queues_are_removed_after_showing_what_is_in_them(several: Operator) -> None:
    several.depths["billing"] = Depth(2, 0)
    several.has_letter(BODY, "billing.dead-letter")
    several.types("y\n")
    ran = several.run("remove", "billing")
    assert ran.code == 0
    assert "Delete for good billing with 2 messages, billing.retry.1s with 0 messages" in ran.err
    assert "billing.dead-letter deleted, with 1 message\n" in ran.out
    retries = [f"billing.retry.{delay}" for delay in ("1s", "10s", "60s")]
    assert sorted(several.deleted) == sorted(["billing", "billing.dead-letter", *retries])


@pytest.mark.parametrize(
    ("service", "typed", "pages", "why"),
    [
        ("order", "y\n", {}, "order is running: stop its replicas first"),
        ("nobody", "y\n", {}, "nobody has no queues"),
        ("billing", "n\n", {}, "nothing was done"),
        # A retry queue of a handler's own delay would stay, with its messages.
        ("billing", "y\n", NO_QUEUES, f"{API_AWAY}; it alone tells which queues billing has: try"),
    ],
)
def test_nothing_is_removed_unless_the_service_is_known_to_be_stopped(
    several: Operator, service: str, typed: str, pages: dict[str, WebError], why: str
) -> None:
    several.depths["billing"] = Depth(2, 0)
    several.pages |= pages
    several.types(typed)
    several.ends(1, why, "remove", service)
    assert several.deleted == []


def test_nothing_is_removed_of_a_service_that_starts_meanwhile(several: Operator) -> None:
    several.depths["billing"] = Depth(2, 0)
    several.types("y\n", meanwhile=lambda: several.depths.update(billing=Depth(2, 1)))
    several.ends(1, "billing has been started meanwhile: nothing was deleted", "remove", "billing")
    assert several.deleted == []
