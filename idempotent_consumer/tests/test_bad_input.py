"""Whatever arrives, the consumer parks what is no event, records what is one, and goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.bodies import ARGS, AWKWARD_IDS, IDS, INVALID, Json, events, written
from fakes.events import Claimed, Pure, body
from fakes.world import DEAD_LETTERS, OrderProcess, World
from idempotent_consumer.calls import Handler
from idempotent_consumer.event import MAX_BODY_BYTES
from idempotent_consumer.names import encode_id
from idempotent_consumer.records import DONE, decode

PURE, CLAIMED = "pure", "claimed"


@contextmanager
def running(kind: str = PURE) -> Iterator[OrderProcess]:
    """Give a process whose handler is of a kind; each delivery is counted once in the end."""
    world = World()
    yield world.start(Handler(Pure()) if kind == PURE else Claimed().handler)
    world.close()


def record_keys(process: OrderProcess) -> list[str]:
    """Return the keys of the records that are done; there are no others."""
    keys = process.store.keys("/service/")
    assert {decode(process.store.get(key).value).state for key in keys} <= {DONE}
    return keys


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Json], list[bytes], list[bytes]]:
    """Draw events of different ids, bodies that are none, and all of them in one order."""
    valid = draw(st.lists(events(), max_size=8, unique_by=lambda event: event["id"]))
    invalid = draw(st.lists(INVALID, max_size=8))
    bodies = [draw(written(event)) for event in valid] + invalid
    return valid, invalid, draw(st.permutations(bodies))


@pytest.mark.parametrize("kind", [PURE, CLAIMED])
@settings(max_examples=60, deadline=None)
@given(batch=batches())
def test_in_one_batch_every_event_is_recorded_and_all_else_is_parked(
    kind: str, batch: tuple[list[Json], list[bytes], list[bytes]]
) -> None:
    """Untouched, with a reason for people, and acked; what comes after it is handled."""
    valid, invalid, bodies = batch
    with running(kind) as process:
        check(process, valid, invalid, bodies)


def check(
    process: OrderProcess, valid: list[Json], invalid: list[bytes], bodies: list[bytes]
) -> None:
    process.deliver(*bodies)
    parked = process.sent_to(DEAD_LETTERS)
    assert Counter(message.body for message in parked) == Counter(invalid)
    for message in parked:
        assert message.headers["x-reason"] == "invalid"
        error = message.headers["x-error"]
        assert isinstance(error, str)
        assert 0 < len(error.encode()) < 1000
        assert "x-attempts" not in message.headers
    assert record_keys(process) == sorted(
        ("/service/order/" + encode_id(event["id"]) for event in valid), key=str.encode
    )
    assert process.count("processed") == len(valid)
    assert process.count("invalid") == len(invalid) == len(process.forwarded)
    assert len(process.acked) == len(bodies)
    assert process.miscounted() == ""
    process.deliver(body("the next", after="all this"))
    assert process.count("processed") + process.count("conflicted") == len(valid) + 1


@settings(max_examples=60, deadline=None)
@given(IDS, ARGS, st.data())
def test_an_event_written_in_any_way_is_the_same_event(
    event_id: str, args: Json, data: st.DataObject
) -> None:
    """A producer that serialises its retry differently is skipped, not parked as a conflict."""
    event = {"id": event_id, "type": "new_order", "args": args}
    with running() as process:
        process.deliver(*[data.draw(written({**event, "sent": number})) for number in range(3)])
        process.deliver(data.draw(written(event)))
        assert process.counts() == {"received": 4, "processed": 1, "processed_skipped": 3}
        assert record_keys(process) == ["/service/order/" + encode_id(event_id)]


def test_no_two_awkward_ids_share_a_record() -> None:
    with running() as process:
        process.deliver(*[body(event_id) for event_id in AWKWARD_IDS])
        assert process.counts() == {"received": len(AWKWARD_IDS), "processed": len(AWKWARD_IDS)}
        assert len(record_keys(process)) == len(AWKWARD_IDS)


LARGE: dict[str, bytes] = {
    "an event of one byte too many": body("1") + b" " * (MAX_BODY_BYTES + 1 - len(body("1"))),
    "16 MiB": b" " * (16 * MAX_BODY_BYTES),
    "16 MiB of brackets": b"[" * (16 * MAX_BODY_BYTES),
    "a million brackets": b"[" * 1_000_000,
    "a million objects": b'{"id":' * 174_000,
    "a million brackets in args": body("1").replace(b"{}", b'{"a":' + b"[" * 1_000_000),
    "a million digits": body("1").replace(b"{}", b'{"a":' + b"9" * 1_000_000 + b"}"),
}


@pytest.mark.parametrize("bad", LARGE.values(), ids=LARGE.keys())
def test_what_is_large_is_parked_and_its_batch_mates_go_on(bad: bytes) -> None:
    with running() as process:
        process.deliver(body("1"), bad, body("2"))
        assert process.counts() == {"received": 3, "processed": 2, "invalid": 1}
        (parked,) = process.sent_to(DEAD_LETTERS)
        assert parked.body == bad


SAME_BODY: dict[str, Any] = {
    "the same rubbish": b"rubbish",
    "nothing": b"",
    "the same large body": b" " * (MAX_BODY_BYTES + 1),
}


@pytest.mark.parametrize("bad", SAME_BODY.values(), ids=SAME_BODY.keys())
def test_equal_bodies_that_are_no_event_are_parked_one_by_one(bad: bytes) -> None:
    """Without an id nothing says that they are one: each is kept for a person to look at."""
    with running() as process:
        process.deliver(bad, body("1"), bad)
        process.deliver(bad)
        assert [message.body for message in process.sent_to(DEAD_LETTERS)] == [bad] * 3
        assert process.counts() == {"received": 4, "processed": 1, "invalid": 3}
