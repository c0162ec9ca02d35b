"""``find`` and ``remove``: where an event is over all services, and how a service is given up."""

from __future__ import annotations

import pytest

from fakes.operator import Operator
from idempotent_consumer.cli import find
from idempotent_consumer.cli.broker import Depth
from idempotent_consumer.event import Outgoing

BODY = b'{"id":"1","type":"a"}'


@pytest.fixture
def operator() -> Operator:
    operator = Operator()
    for service in ("billing", "notify", "order"):
        operator.has_service(service)
    return operator


def lines(operator: Operator, *arguments: str) -> list[str]:
    return operator.run("find", "1", *arguments).out.splitlines()


def test_an_event_is_looked_for_in_every_place_of_every_service(operator: Operator) -> None:
    operator.has_record("order", "1")
    operator.has_letter(BODY, "notify.retry.10s", attempts=2, error="ConnectionError: no")
    operator.has_letter(b'{"id":"2","type":"a"}', "notify.retry.10s", attempts=1, error="x")
    operator.has_letter(BODY, "billing.dead-letter", reason="failed", error="KeyError: 'EUR'")
    operator.has_letter(BODY, "billing")
    ran = operator.run("find", "1")
    assert ran.code == 0
    assert ran.out.splitlines() == [
        "billing: waits in billing",
        "billing: a dead letter: failed: KeyError: 'EUR'",
        "notify: waits in notify.retry.10s for its next attempt, after 2: ConnectionError: no",
        "order: done, 1m 40s ago",
    ]
    found = operator.run("find", "1", "--json").json["services"]
    assert [message["queue"] for message in found["billing"]["messages"]] == [
        "billing",
        "billing.dead-letter",
    ]
    assert found["order"]["record"]["state"] == "done"
    assert not operator.removed
    assert not operator.resent


@pytest.mark.parametrize("state", ["claimed", "publishing"])
def test_what_is_in_flight_is_told_by_its_record(operator: Operator, state: str) -> None:
    events = (Outgoing(BODY),) if state == "publishing" else ()
    operator.has_record("order", "1", state=state, events=events)
    assert lines(operator, "order") == [f"order: {state}, 1m 40s ago (in flight)"]


def test_what_nobody_has_is_not_found(operator: Operator) -> None:
    operator.queue("order")["messages_unacknowledged"] = 3
    ran = operator.run("find", "1", "order", "notify")
    assert ran.code == 1
    assert ran.out.splitlines() == [
        "order: not found; its replicas have 3 in flight, which may include it",
        "notify: not found",
    ]
    assert Operator().run("find", "1").out == "no service has declared its queues yet\n"


def test_a_large_queue_is_looked_into_when_asked_to(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(find, "LOOKED_AT_MOST", 1)
    for _ in range(2):
        operator.has_letter(BODY, "order")
    assert lines(operator, "order") == [
        "order: not found",
        "order: not looked for among the 2 messages of order: --all does",
    ]
    assert operator.looked_at == 0
    assert lines(operator, "order", "--all") == ["order: waits in order"] * 2


# remove


def test_a_services_queues_are_removed_after_showing_what_is_in_them(operator: Operator) -> None:
    operator.depths["billing"] = Depth(2, 0)
    operator.has_letter(BODY, "billing.dead-letter")
    operator.types("y\n")
    ran = operator.run("remove", "billing")
    assert ran.code == 0
    assert "Delete for good billing with 2 messages, billing.retry.1s with 0 messages" in ran.err
    assert "billing.dead-letter deleted, with 1 message\n" in ran.out
    retries = [f"billing.retry.{delay}" for delay in ("1s", "10s", "60s")]
    assert sorted(operator.deleted) == sorted(["billing", "billing.dead-letter", *retries])


@pytest.mark.parametrize(
    ("service", "typed", "why"),
    [
        ("order", "y\n", "order is running: stop its replicas first"),
        ("nobody", "y\n", "nobody has no queues"),
        ("billing", "n\n", "nothing was done"),
    ],
)
def test_nothing_is_removed_of_a_service_that_runs_or_is_not_there(
    operator: Operator, service: str, typed: str, why: str
) -> None:
    operator.depths["billing"] = Depth(2, 0)
    operator.types(typed)
    ran = operator.run("remove", service)
    assert (ran.code, operator.deleted) == (1, [])
    assert why in ran.err


@pytest.mark.parametrize(
    ("depth", "problem"),
    [
        (None, "billing has no queue: it has not run yet, or this is another name"),
        (Depth(50_007, 0), "billing has no consumer, and its queue grows with each event"),
    ],
)
def test_status_of_a_service_that_does_not_run_is_a_problem(
    operator: Operator, depth: Depth | None, problem: str
) -> None:
    if depth is None:
        del operator.depths["billing"]
    else:
        operator.depths["billing"] = depth
    ran = operator.run("status", "billing")
    assert ran.code == 1
    assert problem in ran.out
    assert operator.run("status", "order").code == 0


# dead-letters groups, --error, and the count of replays


def test_dead_letters_are_grouped_by_what_they_have_in_common(operator: Operator) -> None:
    for number, (event_id, error) in enumerate(
        {
            "a1": "Refused: order a1 of customer 17",
            "b2": "Refused: order b2 of customer 99",
            "c3": "KeyError: 'EUR'",
        }.items()
    ):
        body = b'{"id":"%s","type":"a"}' % event_id.encode()
        parked_at = f"2027-01-15T07:5{number}:00+00:00"
        operator.has_letter(body, reason="failed", error=error, parked_at=parked_at)
    operator.has_letter(b"x", reason="invalid", error="not JSON: line 1 column 1 (char 0)")
    ran = operator.run("dead-letters", "groups", "order")
    assert ran.out.splitlines() == [
        "COUNT  REASON   TYPE  FIRST    LAST    ERROR",
        "2      failed   a     10m ago  9m ago  Refused: order # of customer #",
        "1      failed   a     8m ago   8m ago  KeyError: 'EUR'",
        "1      invalid  -     ?        ?       not JSON: line # column # (char #)",
        "4 dead letters of order in 3 groups",
    ]
    (first, *_) = operator.run("dead-letters", "groups", "order", "--json").json["groups"]
    assert first == {
        "reason": "failed",
        "type": "a",
        "error": "Refused: order # of customer #",
        "count": 2,
        "first": "2027-01-15T07:50:00+00:00",
        "last": "2027-01-15T07:51:00+00:00",
    }


@pytest.mark.parametrize("text", ["order a1", "order # of customer", "Refused"])
def test_dead_letters_are_selected_by_a_part_of_their_error(operator: Operator, text: str) -> None:
    operator.has_letter(BODY, error="Refused: order a1 of customer 17")
    operator.has_letter(BODY, error="KeyError")
    found = operator.run("dead-letters", "list", "order", "--error", text, "--json").json
    assert [letter["error"] for letter in found["letters"]] == ["Refused: order a1 of customer 17"]
    assert operator.run("dead-letters", "drop", "order", "--error", text, "--yes").code == 0
    assert len(operator.dead) == 1


@pytest.mark.parametrize(("before", "after"), [(None, 1), (1, 2), ("many", 1)])
def test_a_replay_is_counted_in_a_header(operator: Operator, before: object, after: int) -> None:
    operator.has_letter(BODY, reason="failed", error="no", replays=before)
    if before == 1:
        assert "replays           1\n" in operator.run("dead-letters", "show", "order").out
    operator.run("dead-letters", "replay", "order", "--all", "--force")
    ((_, properties, _),) = operator.resent
    assert properties.headers["x-replays"] == after
