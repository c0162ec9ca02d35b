"""Header tables, encoded byte by byte: other clients send values that pika cannot encode."""

import math
import struct
from typing import Any

_TABLE_AND_TYPE_AND_DELIVERY_MODE = 0x3020


def table(*entries: bytes) -> bytes:
    """Encode a table of entries."""
    content = b"".join(entries)
    return struct.pack(">I", len(content)) + content


array = table
"""Encode an array of values, each with its kind in front. It has the form of a table."""


def entry(name: bytes, kind: bytes, value: bytes) -> bytes:
    """Encode one entry of a table."""
    return bytes([len(name)]) + name + kind + value


def nested(levels: int) -> bytes:
    """Encode a table in a table, and so on."""
    inner = table()
    for _ in range(levels):
        inner = table(entry(b"x", b"F", inner))
    return inner


def encoded(headers: bytes) -> bytes:
    """Encode properties with these headers, not persistent, of type ``t``."""
    return struct.pack(">H", _TABLE_AND_TYPE_AND_DELIVERY_MODE) + headers + b"\x01" + b"\x01t"


def header_entries(properties: Any) -> bytes:
    """Return the encoded headers of properties that have no other property in front of them."""
    data = b"".join(properties.encode())
    (flags,) = struct.unpack_from(">H", data)
    if flags & 0xE000 != 0x2000:
        raise AssertionError("headers are to be the first of the properties")
    (length,) = struct.unpack_from(">I", data, 2)
    return data[6 : 6 + length]


NAN, FLOAT, DOUBLE = struct.pack(">f", math.nan), struct.pack(">f", 0.5), struct.pack(">d", 1.25)

HOSTILE = {
    "a float": entry(b"h", b"f", FLOAT),
    "a double": entry(b"h", b"d", DOUBLE),
    "NaN": entry(b"h", b"f", NAN),
    "a double NaN with a payload": entry(b"h", b"d", b"\x7f\xf8\0\0\0\0\x12\x34"),
    "infinity": entry(b"h", b"d", struct.pack(">d", -math.inf)),
    "a decimal": entry(b"h", b"D", struct.pack(">Bi", 255, -(2**31))),
    "a year past 9999": entry(b"h", b"T", struct.pack(">Q", 2**62)),
    "a timestamp": entry(b"h", b"T", struct.pack(">Q", 1_700_000_000)),
    "a table in a table": entry(b"h", b"F", table(entry(b"n", b"f", NAN))),
    "tables nested deep": entry(b"h", b"F", nested(5000)),
    "arrays nested deep": entry(b"h", b"A", array(b"A" + array(b"f" + NAN), b"V")),
    "a table that ends too soon": entry(b"h", b"F", table(b"\x05ab")),
    "an unknown kind in an array": entry(b"h", b"A", array(b"?1")),
    "text that is not UTF-8": entry(b"h", b"S", b"\0\0\0\x02\xff\xfe"),
    "a name that is not UTF-8": entry(b"\xff\0", b"V", b""),
    "a name without letters": entry(b"", b"t", b"\x07"),
    "a name twice": entry(b"h", b"I", b"\0\0\0\1") + entry(b"h", b"f", FLOAT),
    "bytes": entry(b"h", b"x", b"\0\0\0\1\0"),
    "64 kB": entry(b"h", b"S", struct.pack(">I", 64_000) + b"a" * 64_000),
    "each kind of number": b"".join(
        entry(kind, kind, b"\x81" * size)
        for kind, size in zip(
            (b"t", b"b", b"B", b"s", b"U", b"u", b"I", b"i", b"l", b"L"),
            (1, 1, 1, 2, 2, 2, 4, 4, 8, 8),
            strict=True,
        )
    ),
}
"""Entries of tables. RabbitMQ itself closes the connection of a client that publishes NaN."""
