"""Which bodies are events, and which have the same digest."""

import json
import re
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fakes.bodies import ARGS, JSON_VALUES, Json, events, written
from fakes.corpus import NO_EVENTS, shown
from idempotent_consumer.event import MAX_BODY_BYTES, InvalidEvent, decode


@pytest.mark.parametrize("body", dict.fromkeys(NO_EVENTS), ids=shown)
def test_an_invalid_event_is_refused_with_a_reason(body: bytes) -> None:
    """For every kind of input that the contract says is parked."""
    with pytest.raises(InvalidEvent) as raised:
        decode(body)
    assert str(raised.value)
    assert len(str(raised.value)) < 300


def test_an_event_is_decoded_with_all_its_members() -> None:
    """Other members are allowed and kept. Without args they are an empty object."""
    event = decode(b'{"id":"1","type":"t","args":{"n":[1]},"trace":"abc"}')
    assert (event.id, event.type, event.args) == ("1", "t", {"n": [1]})
    assert event.members["trace"] == "abc"
    left_out, empty = decode(b'{"id":"1","type":"t"}'), decode(b'{"id":"1","type":"t","args":{}}')
    assert (left_out.args, left_out.digest) == (empty.args, empty.digest) == ({}, empty.digest)


def test_a_body_of_the_largest_size_is_decoded_and_a_larger_one_is_not_parsed() -> None:
    head, tail = b'{"id":"1","type":"t","x":"', b'"}'
    largest = head + b"a" * (MAX_BODY_BYTES - len(head) - len(tail)) + tail
    assert decode(largest).id == "1"
    for body in (largest + b" ", b"[" * (MAX_BODY_BYTES + 1)):
        with pytest.raises(InvalidEvent, match=f"{MAX_BODY_BYTES + 1} bytes; at most"):
            decode(body)


def test_the_digest_is_a_stored_format_that_never_changes() -> None:
    """Records keep it for as long as the window. With another value they would be conflicts."""
    body = '{"id":"ä","type":"new_order","args":{"b":[1.5,null],"a":true}}'.encode()
    assert decode(body).digest == "1:83f0ec09ad0b2c35c346949e3f37eab0"


@pytest.mark.parametrize("names", ["2 t", "1 u", "t 1"])
def test_another_id_or_type_is_another_digest(names: str) -> None:
    def named(names: str) -> bytes:
        return b'{"id":"%b","type":"%b"}' % tuple(names.encode().split())

    assert decode(named(names)).digest != decode(named("1 t")).digest


@st.composite
def nearly_events(draw: st.DrawFn) -> bytes:
    """Draw an event in which some bytes are replaced, missing or added."""
    body = bytearray(draw(events().flatmap(written)))
    others = [b"", b"\xff", b"\xc3", b"\0", *rb'{ } [ ] " \ : , 0 - e9 \u null /**/'.split()]
    for _ in range(draw(st.integers(1, 3))):
        at, end = sorted(draw(st.tuples(*[st.integers(0, len(body))] * 2)))
        body[at : min(end, at + 3)] = draw(st.sampled_from(others))
    return bytes(body)


@settings(deadline=None)
@given(nearly_events() | JSON_VALUES.map(orjson.dumps) | st.binary(max_size=200))
def test_any_body_is_an_event_or_is_refused(body: bytes) -> None:
    """An event's id and digest can be stored, and the text of a refusal fits in a header."""
    refused = None
    try:
        event = decode(body)
    except InvalidEvent as error:
        refused = str(error)
    if refused is not None:
        assert 0 < len(refused.encode()) < 300
        return
    assert event.id.encode()
    assert event.type.encode()
    assert isinstance(event.args, dict)
    assert re.fullmatch("1:[0-9a-f]{32}", event.digest)


@settings(deadline=None)
@given(events(), st.data())
def test_the_digest_does_not_depend_on_the_serialisation(event: Json, data: st.DataObject) -> None:
    """Nor on other members: a producer's retry may be serialised differently."""
    ours = decode(orjson.dumps(event))
    other = {"id": event["id"], "type": event["type"], "args": event.get("args", {}), "by": "other"}
    assert decode(data.draw(written(other))).digest == ours.digest


def event_with(args: Json) -> bytes:
    return orjson.dumps({"id": "1", "type": "t", "args": args})


def nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each object or list in a value with each of its names or positions."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for name, each in inside:
        yield value, name
        if isinstance(each, (dict, list)):
            yield from nodes(each)


@settings(deadline=None)
@given(ARGS.filter(bool), JSON_VALUES, st.data())
def test_any_change_of_args_changes_the_digest(args: Json, value: Any, data: st.DataObject) -> None:
    """By the standard library's JSON, 1 and 1.0 are different values, and so are 0 and -0."""
    before = json.dumps(args, sort_keys=True), decode(event_with(args)).digest
    holder, name = data.draw(st.sampled_from(list(nodes(args))))
    if data.draw(st.booleans()):
        holder[name] = value
    else:
        del holder[name]
    assume(json.dumps(args, sort_keys=True) != before[0])
    assert decode(event_with(args)).digest != before[1]


def test_of_members_with_the_same_name_the_last_counts() -> None:
    """As in nearly every parser, so that producers and consumers agree."""
    body = b'{"id":"1","type":"t","args":{"a":1,"a":2},"id":"2"}'
    event = decode(body)
    assert (event.id, event.args) == ("2", {"a": 2})
    with pytest.raises(InvalidEvent):
        decode(body[:-1] + b',"id":null}')
