"""The keys as the contract has them, written down apart from the library's code."""

from __future__ import annotations

import hashlib

SERVICE = "order"
EXCHANGE = "events"
RECORDS = b"/service/order/"
INCARNATION = b"/incarnation/order"


def record_key(event_id: str) -> bytes:
    """Return the key of an event's record."""
    encoded = event_id.encode()
    if len(encoded) > 128 or encoded.startswith(b"sha256:"):
        encoded = b"sha256:" + hashlib.sha256(encoded).hexdigest().encode()
    return RECORDS + encoded
