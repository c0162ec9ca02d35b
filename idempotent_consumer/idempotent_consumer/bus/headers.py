"""Header tables that pika cannot decode: read as empty, for they would cost the connection."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from pika import data

Decode = Callable[[bytes, int], tuple[dict[str, Any], int]]


def _tolerant(decode: Decode) -> Decode:
    """Decode what can be decoded; skip, by its length, a table that cannot.

    pika decodes headers while it reads frames. A table nested some hundred levels deep, or a
    timestamp past the year 9999, raises there, and pika gives up the connection: every delivery
    goes back and the same message comes first again, until the broker's delivery limit has taken
    all of them.
    """

    def decode_table(encoded: bytes, offset: int) -> tuple[dict[str, Any], int]:
        try:
            return decode(encoded, offset)
        except Exception:  # noqa: BLE001 - whatever the conversion of a hostile value raises
            (length,) = struct.unpack_from(">I", encoded, offset)
            return {}, offset + 4 + int(length)

    return decode_table


def tolerate_bad_headers() -> None:
    """Make pika, in this process, read a table that it cannot decode as an empty one."""
    if data.decode_table.__module__ != __name__:
        data.decode_table = _tolerant(data.decode_table)
