"""``status``: what is where, and what is not known."""

from __future__ import annotations

import orjson
import pytest

from fakes.operator import Operator
from idempotent_consumer.cli import status
from idempotent_consumer.cli.broker import BrokerError, Depth
from idempotent_consumer.cli.web import WebError
from idempotent_consumer.etcd import EtcdError, Failure

AWAY = WebError("127.0.0.1 does not answer")


@pytest.fixture
def operator() -> Operator:
    operator = Operator()
    operator.has_service("order", dead=2)
    operator.depths |= {"order": Depth(7, 3), "order.retry.10s": Depth(4, 0)}
    operator.queue("order")["messages_unacknowledged"] = 5
    operator.has_record("order", "1")
    operator.has_record("order", "2", state="claimed")
    operator.has_record("order-2", "1")
    return operator


def test_a_service_in_numbers(operator: Operator) -> None:
    ran = operator.run("status", "--json")
    assert ran.code == 0
    assert ran.json["services"] == {
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
    assert set(ran.json["versions"]) == {"idempotent-consumer", "rabbitmq", "etcd"}


def test_a_service_in_a_line(operator: Operator) -> None:
    names = "SERVICE READY UNACKED CONSUMERS RETRIES DEAD RECORDS CLAIMED PUBLISHING INCARNATION"
    lines = operator.run("status").out.splitlines()
    assert lines[1].split() == names.split()
    assert lines[2].split() == ["order", "7", "5", "3", "10s:4", "2", "2", "1", "0", "first"]


def test_services_are_found_by_their_dead_letter_queues_with_retries_of_other_settings(
    operator: Operator,
) -> None:
    operator.has_service("notify")
    for name in ("lone.dead-letter", "somebody-elses", "order.retry.5m"):
        operator.queues.append({"name": name})
    operator.depths["order.retry.5m"] = Depth(1, 0)
    services = operator.run("status", "--json").json["services"]
    assert list(services) == ["notify", "order"]
    assert services["order"]["retries"]["5m"] == 1
    assert list(operator.run("status", "notify", "--json").json["services"]) == ["notify"]


def test_a_service_that_has_never_run_is_shown_as_unknown() -> None:
    row = Operator().run("status", "billing", "--json").json["services"]["billing"]
    assert (row["ready"], row["dead_letters"], row["retries"], row["incarnation"]) == (
        None,
        None,
        {},
        None,
    )
    assert row["records"] == 0
    assert "billing has no queue" in Operator().run("status", "billing").out


def test_without_the_management_api_services_have_to_be_named(operator: Operator) -> None:
    operator.pages["api/queues/%2F"] = AWAY
    ran = operator.run("status")
    assert ran.code == 1
    assert "or name the services" in ran.err
    ran = operator.run("status", "order", "--json")
    assert ran.code == 0
    assert ran.json["services"]["order"]["ready"] == 7
    assert ran.json["services"]["order"]["unacked"] is None
    assert ran.json["services"]["order"]["retries"] == {"1s": 0, "10s": 4, "60s": 0}


def test_what_can_be_seen_is_shown_while_a_server_is_away(operator: Operator) -> None:
    operator.etcd_error = EtcdError(Failure.UNKNOWN, "etcd is away")
    ran = operator.run("status")
    assert ran.code == 1
    assert "etcd is away" in ran.out
    assert ran.out.splitlines()[2].split()[:2] == ["order", "7"]
    operator.etcd_error, operator.rabbitmq_error = None, BrokerError("RabbitMQ is away")
    ran = operator.run("status", "--json")
    assert ran.json["problems"] == ["RabbitMQ is away"]
    assert ran.json["services"]["order"]["records"] == 2


def test_states_of_many_records_are_counted_when_asked_for(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "READ_AT_MOST", 1)
    row = operator.run("status", "--json").json["services"]["order"]
    assert (row["records"], row["states"]) == (2, None)
    assert operator.run("status").out.splitlines()[2].split()[6:9] == ["2", "?", "?"]
    row = operator.run("status", "--states", "--json").json["services"]["order"]
    assert row["states"]["claimed"] == 1


READY = b'{"ready":true,"missing":{}}'


def test_services_that_are_ready(operator: Operator) -> None:
    operator.pages["readyz"] = READY
    ran = operator.run("status", "--ready", "http://order:8080", "--ready", "http://other/readyz")
    assert ran.code == 0
    assert "http://order:8080 is ready\nhttp://other/readyz is ready" in ran.out


def test_how_late_duplicates_came(operator: Operator) -> None:
    ages = {"read": 5, "oldest_s": 93.0, "within": {"1s": 0, "10s": 3, "1m": 4, "10m": 5}}
    operator.pages |= {"readyz": READY, "duplicates": orjson.dumps(ages)}
    ran = operator.run("status", "--ready", "http://order:8080/readyz")
    assert ran.out.splitlines()[-1] == (
        "http://order:8080/readyz: 5 duplicates looked at: 1m 33s at most after the record, "
        "3 within 10s, 4 within 1m"
    )
    ready = operator.run("status", "--ready", "http://order:8080", "--json").json["ready"]
    assert ready[0]["duplicates"] == ages


@pytest.mark.parametrize(
    "page",
    [
        AWAY,
        b"<html>",
        b"[]",
        b"{}",
        b'{"read":0,"oldest_s":0,"within":{}}',
        b'{"read":"many","oldest_s":0,"within":{}}',
    ],
)
def test_without_ages_nothing_is_said_of_duplicates(
    operator: Operator, page: bytes | WebError
) -> None:
    operator.pages |= {"readyz": READY, "duplicates": page}
    ran = operator.run("status", "--ready", "http://order:8080")
    assert ran.code == 0
    assert ran.out.splitlines()[-1] == "http://order:8080 is ready"


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (WebError("503", 503, b'{"ready":false,"missing":{"etcd":"wiped"}}'), "etcd: wiped"),
        (AWAY, "answer: 127.0.0.1 does not answer"),
        (b"[]", "answer: "),
        (b"{}", "answer: "),
        (b"<html>", "answer: the answer is not JSON"),
    ],
)
def test_one_that_is_not_ready_says_why(
    operator: Operator, answer: bytes | WebError, says: str
) -> None:
    operator.pages["readyz"] = answer
    ran = operator.run("status", "--ready", "http://order:8080")
    assert ran.code == 1
    assert f"http://order:8080 is not ready: {says}" in ran.out
