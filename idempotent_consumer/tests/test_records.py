"""A record's value, and batches of asks."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from fakes.ledger import Replica
from idempotent_consumer.event import Event, Outgoing, Publish, Put, check_effects
from idempotent_consumer.records import (
    CLAIMED,
    DONE,
    PUBLISHING,
    RELEASED,
    Ask,
    Batch,
    Kind,
    Record,
    decode,
    digest_if_done,
    encode,
    why_never,
)
from idempotent_consumer.settings import Settings

DIGEST = "1:" + "0" * 32
EVENT = Event("1", "new_order", {})
EVENTS = (
    Outgoing(b'{"id":"1/order/0","type":"shipped","args":{"n":1}}'),
    Outgoing(b'{"id":"1/order/1","type":"billed","args":{}}'),
)


@pytest.fixture
def replica() -> Replica:
    return Replica().open()


@pytest.mark.parametrize(
    ("state", "events"), [(CLAIMED, ()), (RELEASED, ()), (DONE, ()), (PUBLISHING, EVENTS)]
)
def test_a_record_is_read_as_it_was_written(state: str, events: tuple[Outgoing, ...]) -> None:
    value = encode(state, DIGEST, "t", "now", events)
    assert decode(value) == Record(state, DIGEST, "t", "now", value, events)
    assert digest_if_done(value) == (DIGEST if state == DONE else "")
    members = {"state": state, "digest": DIGEST, "token": "t", "time": "now"}
    published = {"events": [orjson.loads(event.body) for event in events]} if events else {}
    assert orjson.loads(value) == members | published


@pytest.mark.parametrize("token", ['by "hand"', "C:\\hand", "hand\n", "hand é"])
def test_any_token_that_was_read_can_be_written(token: str) -> None:
    """Another writer's record keeps its token when its events have been published."""
    assert decode(encode(DONE, DIGEST, token, "now")).token == token


def test_headers_are_a_member_that_older_versions_ignore() -> None:
    events = (
        EVENTS[0]._replace(headers={"traceparent": "00-1", "n": 2**40, "new": True}),
        EVENTS[1],
    )
    value = encode(PUBLISHING, DIGEST, "t", "now", events)
    members = orjson.loads(value)
    assert [orjson.dumps(body) for body in members["events"]] == [event.body for event in EVENTS]
    assert members["headers"] == [events[0].headers, {}]
    assert decode(value).events == events


DONE_VALUE = encode(DONE, DIGEST, "t", "now")
PUBLISHING_VALUE = encode(PUBLISHING, DIGEST, "t", "now", EVENTS)
NO_EVENTS: list[Any] = [[], {}, {"a": 1}, None, "x"]
NO_HEADERS: list[Any] = [[{}], [1, {}], [{"a": []}, {}], [{"x-error": "a"}, {}], 7, "a"]


def changed(value: bytes, **members: Any) -> bytes:
    return orjson.dumps({**orjson.loads(value), **members})


@pytest.mark.parametrize(
    "value",
    [
        *(b"", b"x", b"[]", b'{"state":"done"}', b'{"state":"publishing"}'),
        DONE_VALUE.replace(b'"now"', b"NaN"),
        DONE_VALUE.replace(b'"now"', b"1e999"),
        *(
            changed(DONE_VALUE, **{member: value})
            for member in ("state", "digest", "token", "time")
            for value in (None, 7, ["done"], {"done": "done"})
        ),
        # Without valid events it could never become done.
        *(changed(PUBLISHING_VALUE, events=events) for events in NO_EVENTS),
        *(
            encode(PUBLISHING, DIGEST, "t", "now", [EVENTS[0], Outgoing(event)])
            for event in (b"1", b"null", b"{}", b'{"id":"1"}', b"NaN", b"[" * 2000 + b"]" * 2000)
        ),
        *(changed(PUBLISHING_VALUE, headers=headers) for headers in NO_HEADERS),
    ],
)
def test_a_value_in_another_format_is_done_and_belongs_to_no_event(value: bytes) -> None:
    assert decode(value) == Record(DONE, "unreadable", "", "", value)


@pytest.mark.parametrize("value", [b"", b"x", b"[]", b'{"state":"done"}'])
def test_the_digest_of_a_value_in_another_format_belongs_to_no_event(value: bytes) -> None:
    assert digest_if_done(value) == "unreadable"


# Batches.


def taken(batch_size: int, max_operations: int, asks: list[Ask]) -> int:
    """Return how many of some asks a batch takes."""
    batch = Batch(batch_size, max_operations)
    return next((n for n, ask in enumerate(asks) if not batch.take(ask)), len(asks))


def asks_with(
    replica: Replica, number: int, effects: int, bytes_each: int = 1, kind: Kind = Kind.RECORD
) -> list[Ask]:
    """Return asks with so many effects each."""
    value = b"x" * bytes_each
    return [
        replica.ask(
            f"{n}", kind, effects=tuple(Put(f"/orders/{n}/{e}", value) for e in range(effects))
        )
        for n in range(number)
    ]


@pytest.mark.parametrize(
    ("batch_size", "max_operations", "effects", "expected"),
    [
        (128, 128, 0, 127),  # The incarnation takes one comparison.
        (128, 1024, 0, 128),
        (16, 128, 0, 16),
        (128, 128, 1, 64),
        (128, 129, 1, 64),
        (128, 128, 3, 32),
        (128, 1024, 7, 128),
        (1, 4, 0, 1),
        (128, 4, 0, 3),
    ],
)
def test_a_batch_keeps_to_etcds_operations(
    replica: Replica, batch_size: int, max_operations: int, effects: int, expected: int
) -> None:
    """etcd counts comparisons, THEN and ELSE separately."""
    assert taken(batch_size, max_operations, asks_with(replica, 200, effects)) == expected


@pytest.mark.parametrize("kind", [Kind.RECORD, Kind.CLAIM, Kind.LOOK, Kind.RELEASE])
@pytest.mark.parametrize(("operations", "effects"), [(4, 0), (16, 0), (16, 1), (16, 14), (17, 2)])
def test_etcd_accepts_a_full_batch(kind: Kind, operations: int, effects: int) -> None:
    replica = Replica(settings=Settings(enable_etcd=True, etcd_max_txn_ops=operations)).open()
    asks = asks_with(replica, 20, effects if kind is Kind.RECORD else 0, kind=kind)
    number = taken(128, operations, asks)
    assert len(replica.commit(*asks[:number])) == number >= 1


def test_a_batch_keeps_to_a_mebibyte(replica: Replica) -> None:
    asks = asks_with(replica, 20, 1, bytes_each=100_000)
    number = taken(128, 1024, asks)
    assert number == 10
    assert len(replica.commit(*asks[:number])) == number
    assert replica.etcd.sent("Txn")[-1].ByteSize() <= 1024 * 1024


def test_a_batch_counts_what_its_asks_expect(replica: Replica) -> None:
    """When the events of a record are published, its whole value is compared."""
    asks = [replica.ask(str(n), expect=b"x" * 400_000) for n in range(3)]
    assert taken(128, 128, asks) == 2


def test_an_effect_with_the_same_key_goes_into_the_next_batch(replica: Replica) -> None:
    """etcd refuses a transaction that writes one key twice."""
    asks = [replica.ask(str(n), effects=(Put("/stock/7", b"%d" % n),)) for n in range(3)]
    assert taken(128, 128, asks) == 1
    for ask in asks:
        replica.commit(ask)
    assert all(answer.landed for answer in replica.answers)
    assert replica.store.get("/stock/7").version == 3


@pytest.mark.parametrize(("effects", "bytes_each"), [(126, 10), (1, 1_400_000)])
def test_an_event_alone_is_always_taken(replica: Replica, effects: int, bytes_each: int) -> None:
    """If it fits into no batch with others, it goes alone. If it never fits, it is refused."""
    (ask,) = asks_with(replica, 1, effects, bytes_each)
    assert replica.ledger.why_never(ask.effects) is None
    replica.commit(ask)
    assert [answer.landed for answer in replica.answers] == [True]
    assert replica.etcd.sent("Txn")[-1].ByteSize() < 1536 * 1024


@pytest.mark.parametrize(
    ("effects", "part"),
    [
        ([Put(f"/orders/{n}", b"x") for n in range(128)], "ETCD_MAX_TXN_OPS is 128"),
        ([Put("/orders/1", b"x" * 1_600_000)], "etcd takes 1572864"),
        ([Put(f"/orders/{n}", b"x" * 800_000) for n in range(2)], "bytes"),
        ([Publish("t", {"a": "x" * 900_000})] * 2, "bytes"),
        ([Publish("t", headers={"h": "x" * 32_000})] * 60, "bytes"),
    ],
)
def test_effects_that_fit_into_no_transaction_are_refused(
    effects: list[Put | Publish], part: str
) -> None:
    assert part in (why_never(check_effects(effects, "order", EVENT), 128) or "")


@pytest.mark.parametrize("effects", [0, 1, 5, 126])
@pytest.mark.parametrize("id_bytes", [1, 128])
def test_the_size_of_an_ask_is_not_underestimated(
    replica: Replica, effects: int, id_bytes: int
) -> None:
    ask = replica.ask(
        "i" * id_bytes, effects=tuple(Put(f"/ä€/{n}", b"x" * 1000) for n in range(effects))
    )
    replica.commit(replica.ask("1"))
    alone = replica.etcd.sent("Txn")[-1].ByteSize()
    replica.commit(replica.ask("2"), ask)
    assert replica.etcd.sent("Txn")[-1].ByteSize() - alone <= ask.size_bytes
