"""What happens to an event, for each answer that etcd can give: ``decide`` as a table."""

from __future__ import annotations

from typing import Any

import pytest

from idempotent_consumer.event import Checked, Outgoing
from idempotent_consumer.flow import (
    WAITS_FOR_ITS_EVENTS,
    Action,
    Again,
    Call,
    Conflict,
    Done,
    Fail,
    PublishEvents,
    StartOver,
    Wait,
    decide,
)
from idempotent_consumer.records import (
    CLAIMED,
    DONE,
    PUBLISHING,
    RELEASED,
    Answer,
    Ask,
    Kind,
    Record,
)

PROCESS = "a" * 32 + "/"
MINE = PROCESS + "1/1"
"""The event's own token."""
OURS = PROCESS + "1/9"
"""The token of an event of this process that has ended."""
THEIRS = "b" * 32 + "/1/1"
DIGEST, OTHER_DIGEST = "1:" + "d" * 32, "1:" + "e" * 32
EXPECTED, PUT, FOUND, LEASE = b"expected", b"put", b"found", 77
EVENTS = (Outgoing(b'{"id":"1/order/0","type":"placed"}'),)


def ask(kind: Kind, token: str = MINE) -> Ask:
    effects = Checked((), EVENTS) if kind is Kind.PUBLISH else Checked()
    return Ask(kind, b"/service/order/1", DIGEST, token, None, EXPECTED, effects, PUT)


def record(state: str, token: str, digest: str = DIGEST) -> Record:
    events = EVENTS if state == PUBLISHING else ()
    return Record(state, digest, token, "2026-01-01T00:00:00+00:00", FOUND, events)


def each(look: Action, release: Action, others: Action) -> dict[Kind, Action]:
    return {**dict.fromkeys(Kind, others), Kind.LOOK: look, Kind.RELEASE: release}


def every(action: Action) -> dict[Kind, Action]:
    return dict.fromkeys(Kind, action)


ENOUGH = WAITS_FOR_ITS_EVENTS
TABLE: list[tuple[Record | None, dict[str, Any], dict[Kind, Action]]] = [
    (None, {}, each(Fail(), Fail(), Again(None))),
    (record(RELEASED, THEIRS), {}, each(Fail(), Fail(), Again(FOUND))),
    (record(RELEASED, MINE), {}, each(Fail(), Fail(), Again(FOUND))),
    (record(CLAIMED, OURS), {}, each(Wait(), Again(FOUND), Again(FOUND))),
    (record(CLAIMED, THEIRS), {}, every(Wait())),
    (record(CLAIMED, THEIRS, OTHER_DIGEST), {}, every(Wait())),
    (record(PUBLISHING, THEIRS), {}, every(Wait())),
    (record(PUBLISHING, OURS), {}, every(Wait())),
    (record(PUBLISHING, THEIRS, OTHER_DIGEST), {}, every(Conflict(OTHER_DIGEST))),
    (record(DONE, THEIRS), {}, every(Done(THEIRS, record(DONE, THEIRS)))),
    (record(DONE, MINE), {}, every(Done(MINE))),
    (record(DONE, THEIRS, OTHER_DIGEST), {}, every(Conflict(OTHER_DIGEST))),
    (record(DONE, MINE, OTHER_DIGEST), {}, every(Conflict(OTHER_DIGEST))),
    # Another process's claim is waited for without end, its events only for some time.
    (record(CLAIMED, THEIRS), {"waits": 1000}, every(Wait())),
    (record(PUBLISHING, THEIRS), {"waits": ENOUGH - 1}, every(Wait())),
    (record(PUBLISHING, THEIRS), {"waits": ENOUGH}, every(PublishEvents(FOUND, EVENTS, THEIRS))),
    # An event starts over if its record vanishes while its events are published.
    (None, {"published": True}, {Kind.RECORD: StartOver()}),
    (record(RELEASED, THEIRS), {"published": True}, {Kind.RECORD: StartOver()}),
    (record(CLAIMED, OURS), {"published": True}, {Kind.RECORD: StartOver()}),
    # A held event is called again instead of retried.
    (None, {"held": True}, {Kind.RELEASE: StartOver()}),
    (record(RELEASED, THEIRS), {"held": True}, {Kind.RELEASE: StartOver()}),
    (record(RELEASED, MINE), {"held": True}, {Kind.RELEASE: StartOver()}),
]
"""The record that was found, other arguments of ``decide``, and the action for each kind of ask."""


def decided(answer: Answer, published: bool = False, waits: int = 0, held: bool = False) -> Action:
    return decide(answer, MINE, PROCESS, published, waits, held)


@pytest.mark.parametrize(
    ("kind", "found", "so_far", "action"),
    [(kind, found, so_far, row[kind]) for found, so_far, row in TABLE for kind in row],
)
def test_a_record_that_was_found_decides(
    kind: Kind, found: Record | None, so_far: dict[str, Any], action: Action
) -> None:
    answer = Answer(ask(kind), False, found=found)
    assert decided(answer, **so_far) == action
    if kind in (Kind.CLAIM, Kind.RECORD):
        assert decided(answer, **so_far, held=True) == action, "it matters for failures alone"


@pytest.mark.parametrize(
    ("landed", "held", "action"),
    [
        (ask(Kind.RECORD), False, Done(MINE)),
        # A record that another process put as publishing keeps that process's token.
        (ask(Kind.RECORD, THEIRS), False, Done(THEIRS)),
        (ask(Kind.PUBLISH), False, PublishEvents(PUT, EVENTS, MINE)),
        (ask(Kind.CLAIM), False, Call(PUT, LEASE)),
        (ask(Kind.RELEASE), False, Fail()),
        (ask(Kind.RELEASE), True, StartOver()),
    ],
)
def test_what_has_landed_goes_on_to_its_next_step(landed: Ask, held: bool, action: Action) -> None:
    assert decided(Answer(landed, True, LEASE), held=held) == action


def test_a_look_cannot_land() -> None:
    with pytest.raises(ValueError, match="look"):
        decided(Answer(ask(Kind.LOOK), True))


@pytest.mark.parametrize("kind", sorted(set(Kind) - {Kind.LOOK}))
def test_an_ask_is_not_refused_while_its_record_is_as_it_expects(kind: Kind) -> None:
    """The ledger would send it again."""
    as_expected = record(CLAIMED, THEIRS)._replace(value=EXPECTED)
    with pytest.raises(ValueError, match="refused"):
        decided(Answer(ask(kind), False, found=as_expected))
