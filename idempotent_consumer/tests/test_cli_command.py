"""How the command is called, and how it ends."""

from __future__ import annotations

import tomllib
from pathlib import Path
from pkgutil import resolve_name

import pytest

from fakes.operator import Operator
from idempotent_consumer.cli import command
from idempotent_consumer.cli.broker import BrokerError
from idempotent_consumer.etcd import EtcdError, Failure

PROJECT = Path(__file__).parents[1] / "pyproject.toml"

VERBS: list[tuple[str, ...]] = [
    ("publish", '{"id":"1","type":"a"}'),
    ("status", "order"),
    ("inspect", "order", "1"),
    ("dead-letters", "list", "order"),
    ("dead-letters", "show", "order"),
    ("dead-letters", "replay", "order", "--all"),
    ("dead-letters", "drop", "order", "--all", "--yes"),
    ("forget", "order", "1", "--yes"),
    ("doctor", "order"),
]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_prints_one_json_document(verb: tuple[str, ...]) -> None:
    operator = Operator()
    operator.has_service("order")
    operator.has_record("order", "1")
    operator.has_letter(b"{", reason="invalid")
    ran = operator.run(*verb, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert isinstance(ran.json, dict)


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_says_in_one_line_that_a_server_is_away(verb: tuple[str, ...]) -> None:
    operator = Operator()
    operator.etcd_error = EtcdError(Failure.UNKNOWN, "etcd is away")
    operator.rabbitmq_error = BrokerError("RabbitMQ is away")
    operator.has_letter(b'{"id":"1","type":"a"}', reason="failed")
    ran = operator.run(*verb, "--json")
    assert ran.code == 1
    assert "is away" in ran.out
    assert ran.err.count("\n") <= 1
    assert "Traceback" not in ran.err
    assert ran.json


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_a_wrong_setting_ends_every_verb_with_2(verb: tuple[str, ...]) -> None:
    ran = Operator().run(*verb, DEDUP_WINDOW="soon")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("idempotent-consumer: DEDUP_WINDOW is 'soon'")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nonsense",),
        ("inspect", "order"),
        ("inspect", "Order", "1"),
        ("dead-letters",),
        ("dead-letters", "list", "order", "--limit", "0"),
        ("publish", "--args", "[]"),
        ("publish", "--timeout", "soon"),
        ("status", "--ready", "localhost"),
    ],
)
def test_a_wrong_call_ends_with_2(arguments: tuple[str, ...]) -> None:
    ran = Operator().run(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert "error: " in ran.err


def test_an_error_stands_in_the_document_too() -> None:
    ran = Operator().run("inspect", "order", "77", "--json")
    assert ran.code == 1
    assert ran.json["found"] is False
    assert ran.json["error"] in ran.err


def test_a_no_to_a_question_does_nothing() -> None:
    operator = Operator()
    operator.has_record("order", "1")
    operator.types("n\n")
    ran = operator.run("forget", "order", "1")
    assert ran.code == 1
    assert "nothing was done" in ran.err
    assert operator.store.keys("/service/order/") == ["/service/order/1"]


def test_a_yes_on_the_terminal_is_enough() -> None:
    operator = Operator()
    operator.has_record("order", "1")
    operator.types("y\n")
    assert operator.run("forget", "order", "1").code == 0
    assert operator.store.keys("/service/order/") == []


def test_the_project_installs_it_under_its_name() -> None:
    scripts = tomllib.loads(PROJECT.read_text())["project"]["scripts"]
    assert resolve_name(scripts[command.NAME]) is command.main
