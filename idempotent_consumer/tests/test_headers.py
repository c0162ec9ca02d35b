"""Header tables that pika cannot decode."""

from __future__ import annotations

import struct
from typing import Any

import pika
import pytest
from pika import data

from idempotent_consumer.amqp import tolerate_bad_headers

tolerate_bad_headers()


def table(*entries: bytes) -> bytes:
    """Write a table of entries that are encoded already."""
    content = b"".join(entries)
    return struct.pack(">I", len(content)) + content


def entry(name: bytes, kind: bytes, value: bytes) -> bytes:
    """Write one entry of a table."""
    return bytes([len(name)]) + name + kind + value


def nested(levels: int) -> bytes:
    """Write a table that holds a table, that holds a table."""
    inner = table()
    for _ in range(levels):
        inner = table(entry(b"x", b"F", inner))
    return inner


@pytest.mark.parametrize(
    "hostile",
    [
        pytest.param(nested(5000), id="nested too deep"),
        pytest.param(table(entry(b"t", b"T", struct.pack(">Q", 2**62))), id="year far away"),
        pytest.param(table(entry(b"k", b"?", b"")), id="unknown kind"),
        pytest.param(table(entry(b"a", b"A", struct.pack(">I", 10_000))), id="array without end"),
    ],
)
def test_a_table_that_cannot_be_decoded_takes_nothing_with_it(hostile: bytes) -> None:
    """What follows it in the frame is read from the right place."""
    decoded, end = data.decode_table(hostile + b"next", 0)
    assert isinstance(decoded, dict)
    assert end == len(hostile)


def test_a_table_that_can_be_decoded_is() -> None:
    headers: dict[str, Any] = {"x-attempts": 2, "nested": {"a": ["b", 1, None]}}
    properties = pika.BasicProperties(headers=headers, type="t")
    read = pika.BasicProperties().decode(b"".join(properties.encode()))
    assert (read.headers, read.type) == (headers, "t")
