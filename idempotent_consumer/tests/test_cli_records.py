"""A service's records: one is shown, or deleted unless it has changed; all are counted."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fakes.operator import TOKEN, FakeEtcd, Operator
from idempotent_consumer.etcd import EtcdError, Failure
from idempotent_consumer.event import Outgoing, decode

BODY = b'{"id":"1","type":"a","args":{"n":1}}'
DIGEST = decode(BODY).digest
PUBLISHES = b'{"id":"1/order/0","type":"placed","args":{}}'
PUBLISHING = {"state": "publishing", "events": (Outgoing(PUBLISHES),), "lease_s": 15}


@pytest.fixture
def operator() -> Operator:
    return Operator()


def test_inspect_shows_who_wrote_a_record_and_how_long_it_is_kept(operator: Operator) -> None:
    operator.has_record("order", "1", DIGEST)
    operator.time_s += 60
    ran = operator.run("inspect", "order", "1", "--json")
    assert ran.code == 0
    assert ran.json == {
        "service": "order",
        "id": "1",
        "key": "/service/order/1",
        "found": True,
        "state": "done",
        "time": "2027-01-15T07:58:20.000+00:00",
        "replica": "a" * 32,
        "token": TOKEN,
        "digest": DIGEST,
        "mod_revision": 2,
        "events": [],
        "remaining_s": 3540,
    }
    assert operator.run("inspect", "order", "1").lines == [
        "state     done",
        "time      2027-01-15T07:58:20.000+00:00 (2m 40s ago)",
        f"replica   {'a' * 32}",
        f"digest    {DIGEST}",
        "kept      for another 59m",
    ]


@pytest.mark.parametrize(
    ("record", "shown"),
    [
        ({"state": "claimed", "lease_s": 15}, "claim     for another 15s, unless its replica"),
        ({"state": "released", "lease_s": 15}, "kept      for another 15s\n"),
        (PUBLISHING, f"publishes {PUBLISHES.decode()}"),
        ({"lease_s": 0}, "kept      for good"),
    ],
)
def test_inspect_shows_a_records_state_its_lease_and_its_events(
    operator: Operator, record: dict[str, Any], shown: str
) -> None:
    operator.has_record("order", "1", **record)
    out = operator.run("inspect", "order", "1").out
    assert shown in out
    assert f"state     {record.get('state', 'done')}" in out
    events = operator.run("inspect", "order", "1", "--json").json["events"]
    assert [event["id"] for event in events] == ["1/order/0"] * ("events" in record)


def test_a_record_that_another_program_wrote_is_shown_as_such(operator: Operator) -> None:
    operator.store.put("/service/order/1", b"hands off")
    operator.ends(0, "it was not written by this library", "inspect", "order", "1")


@pytest.mark.parametrize(
    ("event_id", "shown", "key"),
    [("\x1b[2J", r"\x1b[2J", "\x1b[2J"), ("x" * 500, "x" * 199 + "…", "sha256:")],
)
def test_without_a_record_the_error_names_the_verb_that_searches_further(
    operator: Operator, event_id: str, shown: str, key: str
) -> None:
    """Control codes of the id are escaped."""
    ran = operator.run("inspect", "order", event_id, "--json")
    assert (ran.code, ran.json["found"], ran.json["error"] in ran.err) == (1, False, True)
    assert f"order has no record of '{shown}'. idempotent-consumer find tells" in ran.err
    assert ran.json["key"].startswith(f"/service/order/{key}")


@pytest.mark.parametrize(
    ("body", "same", "says"),
    [
        (BODY, True, "the same event"),
        (
            b'{"id":"1","type":"a","args":{"n":2}}',
            False,
            "in the default form: a conflict, which would be parked, unless order has a decoder",
        ),
        (b"{", None, "is no event in the default form"),
        (b'{"id":"2","type":"a"}', None, "has the id '2', not '1'"),
        (None, None, "body cannot be read: No such file"),
    ],
)
def test_a_body_is_the_same_event_or_a_conflict_or_of_another_event(
    operator: Operator, tmp_path: Path, body: bytes | None, same: bool | None, says: str
) -> None:
    operator.has_record("order", "1", DIGEST)
    file = tmp_path / "body"
    if body is not None:
        file.write_bytes(body)
    inspect = ("inspect", "order", "1", "--body", str(file))
    ran = operator.run(*inspect)
    assert ran.code == (1 if same is None else 0)
    assert says in ran.out + ran.err
    assert operator.run(*inspect, "--json").json.get("same_event") is same


# forget

FORGET = ("forget", "order", "1", "--yes")


@pytest.mark.parametrize("state", ["done", "released"])
def test_a_record_is_deleted_and_the_report_says_how_replicas_learn_it(
    operator: Operator, state: str
) -> None:
    operator.has_record("order", "1", state=state)
    operator.has_record("order", "2")
    operator.ends(0, "their watch", *FORGET)
    assert operator.store.keys("/service/order/") == ["/service/order/2"]
    operator.ends(1, "it is new to it already", *FORGET)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"state": "claimed", "lease_s": 15}, "has claimed it for another 15s"),
        (PUBLISHING, "is publishing its events"),
    ],
)
def test_a_record_that_a_replica_is_working_on_is_deleted_only_with_force(
    operator: Operator, record: dict[str, Any], says: str
) -> None:
    operator.has_record("order", "1", **record)
    operator.ends(1, says, *FORGET)
    assert operator.store.keys("/service/order/") == ["/service/order/1"]
    assert operator.run(*FORGET, "--force").code == 0
    assert operator.store.keys("/service/order/") == []


def test_a_record_that_has_changed_meanwhile_is_kept(operator: Operator) -> None:
    """It was released when it was read; a replica claims it before it is deleted."""
    operator.has_record("order", "1", state="released")

    def claim() -> None:
        operator.meanwhile = lambda: None
        operator.has_record("order", "1", state="claimed")

    operator.meanwhile = claim
    operator.ends(1, "has changed meanwhile", *FORGET)
    assert operator.store.keys("/service/order/") == ["/service/order/1"]


def test_a_record_that_has_expired_meanwhile_is_forgotten(operator: Operator) -> None:
    """So is one that was deleted by a first attempt whose reply was lost."""
    operator.has_record("order", "1")
    operator.meanwhile = lambda: operator.store.delete("/service/order/1")
    assert operator.run(*FORGET).code == 0


class SmallReplies(FakeEtcd):
    """An etcd whose client takes at most 30 records at a time, as if they were large."""

    def ask(self, method: str, request: Any) -> Any:
        reply = super().ask(method, request)
        if len(reply.kvs) > 30:
            raise EtcdError(Failure.TOO_LARGE, "Received message larger than max (2 vs. 1)")
        return reply


@pytest.mark.parametrize("number", [0, 7, 100])
def test_each_record_of_a_service_is_counted_once(number: int) -> None:
    """Whatever its id, in pages as large as the client takes, and none of another service."""
    rng, operator = random.Random(number), Operator()
    expected = Counter(rng.choices(["done", "claimed", "released"], k=number))
    for index, state in enumerate(expected.elements()):
        prefix = rng.choice(["é", "0/", "zz", "order-"])
        operator.has_record("order", f"{prefix}{index}", state=state)
    operator.has_record("orders", "1")
    operator.has_record("order0", "1")
    etcd = SmallReplies(operator)
    assert (etcd.states("order"), etcd.count("/service/order/")) == (expected, number)
