"""What happens to an event, for each answer that etcd can give: the whole decision as a table."""

from __future__ import annotations

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
"""The token of the event's own delivery."""
OURS = PROCESS + "1/9"
"""Another delivery's, of this process: nobody is at it any more."""
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


def decided(
    kind: Kind, found: Record | None, *, published: bool = False, waits: int = 0, held: bool = False
) -> Action:
    return decide(Answer(ask(kind), False, found=found), MINE, PROCESS, published, waits, held)


@pytest.mark.parametrize(
    ("kind", "action"),
    [
        (Kind.RECORD, Done(MINE)),
        (Kind.PUBLISH, PublishEvents(PUT, EVENTS, MINE)),
        (Kind.CLAIM, Call(PUT, LEASE)),
        (Kind.RELEASE, Fail()),
    ],
)
def test_what_has_landed_goes_on_to_its_next_step(kind: Kind, action: Action) -> None:
    assert decide(Answer(ask(kind), True, LEASE), MINE, PROCESS, False, 0, False) == action


def test_a_record_is_done_by_whoever_has_begun_it() -> None:
    """Whoever ends a publishing record of another process leaves that one's token in it."""
    answer = Answer(ask(Kind.RECORD, THEIRS), True)
    assert decide(answer, MINE, PROCESS, True, 0, False) == Done(THEIRS)


def each(look: Action, release: Action, others: Action) -> dict[Kind, Action]:
    """Return the row of a record that stands in nobody's way."""
    return {**dict.fromkeys(Kind, others), Kind.LOOK: look, Kind.RELEASE: release}


TABLE: list[tuple[Record | None, dict[Kind, Action]]] = [
    (None, each(Fail(), Fail(), Again(None))),
    (record(RELEASED, THEIRS), each(Fail(), Fail(), Again(FOUND))),
    (record(CLAIMED, OURS), each(Wait(), Again(FOUND), Again(FOUND))),
    (record(CLAIMED, THEIRS), dict.fromkeys(Kind, Wait())),
    (record(CLAIMED, THEIRS, OTHER_DIGEST), dict.fromkeys(Kind, Wait())),
    (record(PUBLISHING, THEIRS), dict.fromkeys(Kind, Wait())),
    (record(PUBLISHING, OURS), dict.fromkeys(Kind, Wait())),
    (record(PUBLISHING, THEIRS, OTHER_DIGEST), dict.fromkeys(Kind, Conflict(OTHER_DIGEST))),
    (record(DONE, THEIRS), dict.fromkeys(Kind, Done(THEIRS, record(DONE, THEIRS)))),
    (record(DONE, MINE), dict.fromkeys(Kind, Done(MINE))),
    (record(DONE, THEIRS, OTHER_DIGEST), dict.fromkeys(Kind, Conflict(OTHER_DIGEST))),
    (record(DONE, MINE, OTHER_DIGEST), dict.fromkeys(Kind, Conflict(OTHER_DIGEST))),
]


@pytest.mark.parametrize(
    ("kind", "found", "action"),
    [(kind, found, action) for found, row in TABLE for kind, action in row.items()],
)
def test_what_stands_in_the_way_decides(kind: Kind, found: Record | None, action: Action) -> None:
    assert decided(kind, found) == action


@pytest.mark.parametrize("kind", list(Kind))
def test_events_that_nobody_publishes_are_published_after_enough_waits(kind: Kind) -> None:
    found = record(PUBLISHING, THEIRS)
    assert decided(kind, found, waits=WAITS_FOR_ITS_EVENTS - 1) == Wait()
    assert decided(kind, found, waits=WAITS_FOR_ITS_EVENTS) == PublishEvents(FOUND, EVENTS, THEIRS)


@pytest.mark.parametrize("waits", [0, WAITS_FOR_ITS_EVENTS, 1000])
def test_a_claim_of_another_process_is_waited_for_however_long_it_takes(waits: int) -> None:
    assert decided(Kind.CLAIM, record(CLAIMED, THEIRS), waits=waits) == Wait()


@pytest.mark.parametrize("found", [None, record(RELEASED, THEIRS), record(CLAIMED, OURS)])
def test_an_event_whose_record_has_gone_before_its_last_step_starts_over(
    found: Record | None,
) -> None:
    assert decided(Kind.RECORD, found, published=True) == StartOver()


@pytest.mark.parametrize("found", [None, record(RELEASED, THEIRS), record(RELEASED, MINE)])
def test_an_event_that_is_held_is_called_again_instead_of_retried(found: Record | None) -> None:
    assert decided(Kind.RELEASE, found) == Fail()
    assert decided(Kind.RELEASE, found, held=True) == StartOver()
    assert decide(Answer(ask(Kind.RELEASE), True), MINE, PROCESS, False, 0, True) == StartOver()


@pytest.mark.parametrize("kind", [Kind.CLAIM, Kind.RECORD])
@pytest.mark.parametrize("found", [None, *(found for found, _ in TABLE if found)])
def test_whether_it_is_held_decides_nothing_else(kind: Kind, found: Record | None) -> None:
    assert decided(kind, found, held=True) == decided(kind, found)


def test_a_look_that_lands_cannot_be() -> None:
    with pytest.raises(ValueError, match="look"):
        decide(Answer(ask(Kind.LOOK), True), MINE, PROCESS, False, 0, False)


@pytest.mark.parametrize("kind", sorted(set(Kind) - {Kind.LOOK}))
def test_an_ask_refused_by_the_record_that_it_expects_cannot_be(kind: Kind) -> None:
    """A record as expected stands in nobody's way: such an ask is sent again, not answered."""
    found = record(CLAIMED, THEIRS)._replace(value=EXPECTED)
    with pytest.raises(ValueError, match="refused"):
        decided(kind, found)
