"""What is an event and what is not, and when two bodies are one event."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from idempotent_consumer.event import MAX_BODY_BYTES, Event, InvalidEvent, decode

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)

INVALID = {
    "nothing": b"",
    "not JSON": b"{id:1}",
    "cut off": b'{"id":"1","type":"t"',
    "two documents": b'{"id":"1","type":"t"}{}',
    "an array": b'[{"id":"1","type":"t"}]',
    "a string": b'"id"',
    "null": b"null",
    "no id": b'{"type":"t"}',
    "empty id": b'{"id":"","type":"t"}',
    "id a number": b'{"id":1,"type":"t"}',
    "id null": b'{"id":null,"type":"t"}',
    "id a list": b'{"id":["1"],"type":"t"}',
    "no type": b'{"id":"1"}',
    "empty type": b'{"id":"1","type":""}',
    "type a number": b'{"id":"1","type":2}',
    "type true": b'{"id":"1","type":true}',
    "args null": b'{"id":"1","type":"t","args":null}',
    "args a list": b'{"id":"1","type":"t","args":[]}',
    "args a string": b'{"id":"1","type":"t","args":"{}"}',
    "not UTF-8": b'{"id":"\xff","type":"t"}',
    "not UTF-8 in a member that nobody reads": b'{"id":"1","type":"t","x":"\xc3"}',
    "UTF-16": '{"id":"1","type":"t"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"id":"1","type":"t"}',
    "an unpaired surrogate, escaped": b'{"id":"\\ud800","type":"t"}',
    "an unpaired surrogate in args": b'{"id":"1","type":"t","args":{"a":"\\udc00"}}',
    "an unpaired surrogate, encoded": b'{"id":"\xed\xa0\x80","type":"t"}',
    "NaN": b'{"id":"1","type":"t","args":{"n":NaN}}',
    "Infinity": b'{"id":"1","type":"t","args":{"n":-Infinity}}',
    "a number past every float": b'{"id":"1","type":"t","args":{"n":1e999}}',
    "args nested deeper than is written":
        b'{"id":"1","type":"t","args":{"a":' + b"[" * 300 + b"]" * 300 + b"}}",
    "nested deeper than is read": b'{"id":"1","type":"t","x":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "a million brackets": b"[" * 1_000_000,
}


@pytest.mark.parametrize("body", INVALID.values(), ids=INVALID.keys())
def test_what_is_no_event_is_refused_with_a_reason(body: bytes) -> None:
    """Each row of the contract's table of inputs that are parked."""
    with pytest.raises(InvalidEvent) as raised:
        decode(body)
    assert str(raised.value)
    assert len(str(raised.value)) < 300


def test_an_event_is_read_with_all_its_members() -> None:
    """Other members are allowed and kept."""
    event = decode(b'{"id":"1","type":"t","args":{"n":[1]},"trace":"abc"}')
    assert (event.id, event.type, event.args) == ("1", "t", {"n": [1]})
    assert event.members["trace"] == "abc"


def test_args_left_out_are_an_empty_object() -> None:
    assert decode(b'{"id":"1","type":"t"}').args == {}


def test_a_body_of_the_largest_size_is_read_and_one_byte_more_is_not() -> None:
    head, tail = b'{"id":"1","type":"t","x":"', b'"}'
    largest = head + b"a" * (MAX_BODY_BYTES - len(head) - len(tail)) + tail
    assert decode(largest).id == "1"
    with pytest.raises(InvalidEvent, match=f"{MAX_BODY_BYTES + 1} bytes"):
        decode(largest + b" ")


def test_size_is_checked_before_parsing() -> None:
    """What is too large is refused for its size even where it is not JSON: it was not read."""
    with pytest.raises(InvalidEvent, match="bytes; at most"):
        decode(b"[" * (MAX_BODY_BYTES + 1))


def test_the_digest_is_a_stored_format_that_never_changes() -> None:
    """Records hold it for as long as the window; another value would make conflicts of them."""
    body = '{"id":"ä","type":"new_order","args":{"b":[1.5,null],"a":true}}'.encode()
    assert decode(body).digest == "1:83f0ec09ad0b2c35c346949e3f37eab0"


SAME = {
    "the order of members": '{"type":"t","args":{"b":2,"a":{"d":1,"c":"ä"}},"id":"1"}',
    "white space": '\n{ "id" : "1", "type":"t", "args" : {"a":{"c":"ä","d":1}, "b":2 } }\t',
    "extra members": '{"id":"1","type":"t","args":{"a":{"c":"ä","d":1},"b":2},"sent":"10:15"}',
    "escapes": '{"id":"\\u0031","type":"t","args":{"a":{"c":"\\u00e4","d":1},"b":2}}',
}


@pytest.mark.parametrize("body", SAME.values(), ids=SAME.keys())
def test_another_way_of_writing_is_the_same_event(body: str) -> None:
    """A producer that serialises its retry differently is no conflict."""
    first = decode('{"id":"1","type":"t","args":{"a":{"c":"ä","d":1},"b":2}}'.encode())
    assert decode(body.encode()).digest == first.digest


def test_no_args_and_empty_args_are_the_same_event() -> None:
    assert decode(b'{"id":"1","type":"t"}').digest == decode(
        b'{"id":"1","type":"t","args":{}}').digest


OTHER = {
    "id": b'{"id":"2","type":"t","args":{"a":1}}',
    "type": b'{"id":"1","type":"u","args":{"a":1}}',
    "a value in args": b'{"id":"1","type":"t","args":{"a":2}}',
    "a type of a value in args": b'{"id":"1","type":"t","args":{"a":"1"}}',
    "a name in args": b'{"id":"1","type":"t","args":{"b":1}}',
    "id and type swapped": b'{"id":"t","type":"1","args":{"a":1}}',
}


@pytest.mark.parametrize("body", OTHER.values(), ids=OTHER.keys())
def test_another_content_is_another_digest(body: bytes) -> None:
    assert decode(body).digest != decode(b'{"id":"1","type":"t","args":{"a":1}}').digest


def test_the_order_of_a_list_is_content() -> None:
    one, other = ({"id": "1", "type": "t", "args": {"a": a}} for a in ([1, 2], [2, 1]))
    assert decode(orjson.dumps(one)).digest != decode(orjson.dumps(other)).digest


@given(st.binary(max_size=200))
def test_whatever_bytes_arrive_only_invalid_event_escapes(body: bytes) -> None:
    try:
        event = decode(body)
    except InvalidEvent:
        return
    assert event.id
    assert event.type


@given(JSON_VALUES)
def test_whatever_json_arrives_only_invalid_event_escapes(value: Any) -> None:
    try:
        event = decode(orjson.dumps(value))
    except InvalidEvent:
        return
    assert isinstance(event, Event)


@given(st.text(min_size=1), st.text(min_size=1), st.dictionaries(st.text(), JSON_VALUES))
def test_two_serialisers_agree_on_the_digest(
    event_id: str, event_type: str, args: dict[str, Any]
) -> None:
    """The standard library's JSON, reversed and escaped, is the same event as orjson's."""
    event = {"id": event_id, "type": event_type, "args": args}
    turned = dict(reversed(event.items()))
    ours = decode(orjson.dumps(event))
    assert decode(json.dumps(turned, indent=1).encode()).digest == ours.digest
    assert len(ours.digest) == 34


@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=2, max_size=2,
                unique=True))
def test_two_events_never_have_one_digest(pairs: list[tuple[str, str]]) -> None:
    digests = {decode(orjson.dumps({"id": i, "type": t})).digest for i, t in pairs}
    assert len(digests) == 2
