"""``gauges``: what is sent, and what is said to be missing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fakes.operator import Operator, of_order
from idempotent_consumer.cli.broker import BrokerError
from idempotent_consumer.cli.web import WebError
from idempotent_consumer.etcd import EtcdError, Failure

NO_ETCD = EtcdError(Failure.UNKNOWN, "it is away")
NO_API = {"api/queues/%2F": WebError("it is away")}
QUEUES = {"order_ready": 7, "order_retries": 4, "order_dead_letters": 2}
UNACKED = {"order_unacked": 5}
KEYS = {"order_records": 2, "order_effects": 1}
ALL = QUEUES | UNACKED | KEYS
EFFECTS = ("--effects", "order=/orders/")


@pytest.fixture
def operator() -> Operator:
    operator = of_order()
    operator.store.put("/orders/1", b"{}")
    operator.store.put("/ordersheet", b"{}")
    return operator


def test_all_that_is_held_is_sent_and_shown(operator: Operator) -> None:
    ran = operator.run("gauges", *EFFECTS, "--json")
    assert ran.json == {"gauges": ALL, "missing": {}}
    assert operator.sent == [ALL]
    assert "order_records 2\n" in operator.run("gauges", *EFFECTS).out


@pytest.mark.parametrize(
    ("fault", "what", "left"),
    [
        ({"etcd_error": NO_ETCD}, "etcd", QUEUES | UNACKED),
        ({"rabbitmq_error": BrokerError("it is away")}, "rabbitmq", KEYS),
        ({"pages": NO_API}, "unacked", QUEUES | KEYS),
    ],
)
def test_what_cannot_be_counted_is_told_in_one_line_and_the_rest_is_sent(
    operator: Operator, fault: dict[str, object], what: str, left: dict[str, int]
) -> None:
    vars(operator).update(fault)
    ran = operator.run("gauges", "order", *EFFECTS)
    assert (ran.code, operator.sent) == (1, [left])
    (line,) = [line for line in ran.out.splitlines() if "not counted" in line]
    assert line.startswith(f"not counted: {what}: ")
    assert "it is away" in line


def test_an_api_that_no_longer_counts_what_is_unacked(operator: Operator) -> None:
    del operator.queue("order")["messages_unacknowledged"]
    ran = operator.run("gauges", "--json")
    assert ran.json["missing"] == {"unacked": "RabbitMQ's management API does not tell"}
    assert "order_unacked" not in operator.sent[0]


def test_without_the_api_services_have_to_be_named(operator: Operator) -> None:
    operator.pages |= NO_API
    assert "; or name the services\n" in operator.run("gauges").out
    assert operator.sent == [{}]


def test_faults_are_said_when_they_begin_and_end_and_no_old_number_is_sent(
    operator: Operator,
) -> None:
    """Round after round. Without the management API, the services seen before are counted."""
    steps: list[Callable[[], object]] = [
        lambda: setattr(operator, "etcd_error", NO_ETCD),
        lambda: operator.has_record("order", "3"),
        lambda: setattr(operator, "etcd_error", None),
        lambda: operator.pages.update(NO_API),
    ]

    def wait() -> None:
        if not steps:
            raise KeyboardInterrupt
        steps.pop(0)()

    operator.waits = wait
    said = operator.run("gauges", "--every", "1s", *EFFECTS).err.splitlines()
    assert [line.split(": ")[1:3] for line in said] == [
        ["not counted", "etcd"],
        ["counted again", "etcd"],
        ["not counted", "unacked"],
        ["interrupted"],
    ]
    three = {"order_records": 3}
    without = [QUEUES | UNACKED] * 2
    assert operator.sent == [ALL, *without, ALL | three, QUEUES | KEYS | three]
