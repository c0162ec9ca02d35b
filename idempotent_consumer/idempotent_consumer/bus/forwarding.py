"""What a message carries when it is sent on to another queue."""

from __future__ import annotations

from typing import Any

import pika

_MAX_HEADER_BYTES = 64 * 1024

_KEPT = (
    "content_type",
    "content_encoding",
    "priority",
    "correlation_id",
    "reply_to",
    "message_id",
    "timestamp",
    "type",
    "app_id",
)
"""Not: expiration (it would end the wait, or the dead letter, early), user_id (the broker checks
it against the sender, who is another now), delivery_mode (always persistent)."""

_DROPPED_HEADERS = {
    "CC",
    "BCC",
    "x-death",
    "x-delivery-count",
    "x-acquired-count",
    *(
        f"x-{which}-death-{what}"
        for which in ("first", "last")
        for what in ("exchange", "queue", "reason")
    ),
}
"""CC and BCC are addresses: the message would go there as well. The others are the broker's."""


def forwarded(properties: Any, headers: dict[str, object]) -> Any:
    """Return the properties for sending a message on: its own where they can be, and ours."""
    kept = {name: getattr(properties, name) for name in _KEPT}
    theirs = {
        name: value
        for name, value in (properties.headers or {}).items()
        if name not in _DROPPED_HEADERS
    }
    whole = pika.BasicProperties(**kept, delivery_mode=2, headers={**theirs, **headers})
    return whole if _fits(whole) else bare(headers)


def bare(headers: dict[str, object]) -> Any:
    """Return properties with these headers alone."""
    return pika.BasicProperties(delivery_mode=2, headers=headers)


def _fits(properties: Any) -> bool:
    """Return whether pika can write them into one frame; a header can be of any size and type."""
    try:
        return sum(map(len, properties.encode())) <= _MAX_HEADER_BYTES
    except Exception:  # noqa: BLE001 - pika raises what the failing conversion happens to raise.
        return False
