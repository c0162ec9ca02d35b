"""An event as it is published to the exchange that every service's queue is bound to."""

from __future__ import annotations

from collections.abc import Callable

import pika

from .. import names
from ..event import decode
from .publisher import Message

_PROPERTIES = pika.BasicProperties(content_type="application/json", delivery_mode=2)
_MAX_ROUTING_KEY_BYTES = 255


def event_message(
    body: bytes, wanted: Callable[[], bool], confirmed: Callable[[], None]
) -> Message:
    """Return the message for an event; raises InvalidEvent where every service would park it."""
    key = _routing_key(decode(body).type)
    return Message(names.EXCHANGE, key, body, _PROPERTIES, _PROPERTIES, wanted, confirmed)


def _routing_key(event_type: str) -> str:
    """Return the event's type, as far as AMQP's short strings can hold it."""
    if len(event_type) <= _MAX_ROUTING_KEY_BYTES // 4:
        return event_type
    return event_type.encode()[:_MAX_ROUTING_KEY_BYTES].decode(errors="ignore")
