"""Properties with any headers: how they are read, and that they are written as they came."""

from __future__ import annotations

import struct
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pika import frame, spec

from fakes.headers import (
    DOUBLE,
    FLOAT,
    HOSTILE,
    NAN,
    array,
    encoded,
    entry,
    header_entries,
    table,
)
from idempotent_consumer.amqp import Properties, forwarded_properties, keep_header_bytes

OURS: dict[str, object] = {"x-attempts": 1, "x-error": "none"}


@pytest.mark.parametrize("theirs", HOSTILE.values(), ids=HOSTILE)
def test_headers_are_sent_on_as_the_bytes_they_came_in_ours_behind_them(theirs: bytes) -> None:
    sent = forwarded_properties(Properties().decode(encoded(table(theirs))), OURS)
    assert header_entries(sent)[: len(theirs)] == theirs
    ours = pika.BasicProperties(headers=OURS)
    assert header_entries(sent)[len(theirs) :] == header_entries(ours)


@pytest.mark.parametrize("theirs", HOSTILE.values(), ids=HOSTILE)
def test_ours_are_read_whatever_is_beside_them(theirs: bytes) -> None:
    """An event whose attempts nobody can read would be retried for ever."""
    read = Properties().decode(encoded(table(theirs, entry(b"x-attempts", b"I", b"\0\0\0\2"))))
    assert read.headers["x-attempts"] == 2
    assert (read.type, read.delivery_mode) == ("t", 1)


@pytest.mark.parametrize("theirs", HOSTILE.values(), ids=HOSTILE)
def test_sent_on_again_they_are_the_same_with_ours_replaced(theirs: bytes) -> None:
    once = forwarded_properties(Properties().decode(encoded(table(theirs))), OURS)
    arrived = Properties().decode(b"".join(once.encode()))
    twice = forwarded_properties(arrived, {**OURS, "x-attempts": 2})
    back = forwarded_properties(twice, {}, without=OURS)
    assert header_entries(twice)[: len(theirs)] == header_entries(back) == theirs
    assert twice.headers["x-attempts"] == 2


def test_ours_that_a_producer_has_written_and_the_brokers_give_way_wherever_they_stand() -> None:
    kept = [entry(b"first", b"f", FLOAT), entry(b"last", b"F", table(entry(b"CC", b"V", b"")))]
    death = array(b"F" + table(entry(b"count", b"l", b"\0" * 8)))
    gone = [
        entry(b"x-attempts", b"f", NAN),
        entry(b"x-reason", b"V", b""),
        entry(b"x-attempts", b"I", b"\0\0\0\7"),
        entry(b"CC", b"A", array()),
        entry(b"BCC", b"f", FLOAT),
        entry(b"x-death", b"A", death),
        entry(b"x-first-death-queue", b"S", b"\0\0\0\1q"),
        entry(b"x-delivery-count", b"l", b"\0" * 8),
        entry(b"x-acquired-count", b"l", b"\0" * 8),
    ]
    ours: dict[str, object] = {**OURS, "x-reason": "failed"}
    arrived = Properties().decode(encoded(table(*gone[:4], kept[0], *gone[4:], kept[1])))
    sent = forwarded_properties(arrived, ours)
    expected = b"".join(kept) + header_entries(pika.BasicProperties(headers=ours))
    assert header_entries(sent) == expected


def test_all_properties_that_can_be_sent_on_are_the_same_bytes() -> None:
    everything = pika.BasicProperties(
        content_type="a",
        content_encoding="b",
        headers={"h": 1},
        delivery_mode=1,
        priority=2,
        correlation_id="c",
        reply_to="d",
        expiration="60000",
        message_id="e",
        timestamp=2**63,
        type="f",
        user_id="guest",
        app_id="g",
        cluster_id="h",
    )
    sent = forwarded_properties(everything, {})
    assert sent.headers == {"h": 1}
    everything.delivery_mode = 2
    everything.expiration = everything.user_id = everything.cluster_id = None
    assert sent.encode() == [b"".join(everything.encode())]


@pytest.mark.parametrize(
    ("kind", "value", "read"),
    [
        (b"f", FLOAT, 0.5),
        (b"d", DOUBLE, 1.25),
        (b"D", struct.pack(">Bi", 2, 314), Decimal("3.14")),
        (b"T", struct.pack(">Q", 0), datetime(1970, 1, 1, tzinfo=UTC)),
        (b"T", struct.pack(">Q", 2**62), 2**62),
        (b"S", b"\0\0\0\1a", "a"),
        (b"S", b"\0\0\0\1\xff", b"\xff"),
        (b"x", b"\0\0\0\1a", b"a"),
        (b"A", array(b"V", b"t\0", b"A" + array()), [None, False, []]),
        (b"F", table(entry(b"a", b"b", b"\xff")), {"a": -1}),
        (b"F", table(b"\x05ab"), b"\x05ab"),
        (b"A", array(b"?"), b"?"),
    ],
)
def test_a_header_is_read_as_what_it_is_or_as_its_bytes(
    kind: bytes, value: bytes, read: object
) -> None:
    assert Properties().decode(encoded(table(entry(b"h", kind, value)))).headers == {"h": read}


@pytest.mark.parametrize(
    ("kind", "size"),
    [(b"b", 1), (b"B", 1), (b"s", 2), (b"U", 2), (b"u", 2), (b"I", 4), (b"i", 4), (b"l", 8)],
)
def test_a_whole_number_of_any_size_is_an_int(kind: bytes, size: int) -> None:
    """Attempts are counted by nothing else: pika has a class of its own for long ones."""
    written = entry(b"x-attempts", kind, (2).to_bytes(size))
    read = Properties().decode(encoded(table(written))).headers["x-attempts"]
    assert (type(read), read) == (int, 2)


@pytest.mark.parametrize(
    "hostile",
    [
        pytest.param(table(entry(b"k", b"?", b"")), id="unknown kind"),
        pytest.param(table(entry(b"a", b"A", struct.pack(">I", 10_000))), id="array without end"),
        pytest.param(table(b"\x09name"), id="name without end"),
        pytest.param(table(entry(b"a", b"d", b"\0")), id="double without end"),
        pytest.param(table(b"\x01a"), id="name without value"),
    ],
)
def test_a_table_that_makes_no_sense_is_an_empty_one(hostile: bytes) -> None:
    read = Properties().decode(encoded(hostile))
    assert (read.headers, read.type) == ({}, "t")
    assert forwarded_properties(read, OURS).headers == OURS


@given(st.binary(max_size=60))
def test_whatever_bytes_arrive_are_read_and_sent_on(data: bytes) -> None:
    read = Properties().decode(data)
    assert set(read.encode()) <= {data, b"\0\0"}
    assert forwarded_properties(read, OURS).headers["x-attempts"] == 1


@given(st.dictionaries(st.text(max_size=9), st.integers(-(2**63), 2**63 - 1) | st.text()))
def test_what_pika_writes_is_read_as_pika_reads_it(headers: dict[str, Any]) -> None:
    properties = pika.BasicProperties(headers=headers, type="t", timestamp=5, priority=1)
    data = b"".join(properties.encode())
    assert Properties().decode(data) == pika.BasicProperties().decode(data) == properties


def test_pika_reads_messages_with_the_bytes_of_their_headers() -> None:
    """A body above 64 KiB is left to pika, and so is all that the command reads."""
    keep_header_bytes()
    data = encoded(table(entry(b"h", b"f", NAN)))
    header = struct.pack(">HxxQ", spec.Basic.INDEX, 5) + data
    start = struct.pack(">BHI", spec.FRAME_HEADER, 1, len(header))
    _, arrived = frame.decode_frame(start + header + bytes([spec.FRAME_END]))
    assert arrived.body_size == 5
    assert arrived.properties.encode() == [data]
    assert arrived.marshal() == start + header + bytes([spec.FRAME_END])
