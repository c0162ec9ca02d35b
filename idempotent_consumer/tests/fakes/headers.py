"""Header tables, written byte by byte: pika does not write all that others do."""

from __future__ import annotations

import struct
from typing import Any

_TABLE_AND_TYPE_AND_DELIVERY_MODE = 0x3020


def table(*entries: bytes) -> bytes:
    """Write a table of entries."""
    content = b"".join(entries)
    return struct.pack(">I", len(content)) + content


array = table
"""Write an array, of values that begin with their kind: its form is a table's."""


def entry(name: bytes, kind: bytes, value: bytes) -> bytes:
    """Write one entry of a table."""
    return bytes([len(name)]) + name + kind + value


def nested(levels: int) -> bytes:
    """Write a table that holds a table, that holds a table."""
    inner = table()
    for _ in range(levels):
        inner = table(entry(b"x", b"F", inner))
    return inner


def encoded(headers: bytes) -> bytes:
    """Write properties: this table of headers, not persistent, of type ``t``."""
    return struct.pack(">H", _TABLE_AND_TYPE_AND_DELIVERY_MODE) + headers + b"\x01" + b"\x01t"


def header_entries(properties: Any) -> bytes:
    """Return the headers of properties without text ahead of them, as they are written."""
    data = b"".join(properties.encode())
    (flags,) = struct.unpack_from(">H", data)
    if flags & 0xE000 != 0x2000:
        raise AssertionError("headers are to be the first of the properties")
    (length,) = struct.unpack_from(">I", data, 2)
    return data[6 : 6 + length]
