"""Every name the outside sees: etcd keys, exchange and queues, message headers, counters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import sha256

EXCHANGE = "events"
BINDING_KEY = "#"
DEFAULT_EXCHANGE = ""

ATTEMPTS_HEADER = "x-attempts"
REASON_HEADER = "x-reason"
ERROR_HEADER = "x-error"
PARKED_AT_HEADER = "x-parked-at"
"""When an event was parked: ISO 8601 in UTC, by the clock of the replica that did it."""
REPLAYS_HEADER = "x-replays"
"""How often a dead letter was sent back to its service."""

OWN_HEADERS = frozenset(
    (ATTEMPTS_HEADER, REASON_HEADER, ERROR_HEADER, PARKED_AT_HEADER, REPLAYS_HEADER)
)
BROKER_HEADERS = frozenset({"CC", "BCC", "x-death", "x-delivery-count", "x-acquired-count"}) | {
    f"x-{which}-death-{what}"
    for which in ("first", "last")
    for what in ("exchange", "queue", "reason")
}
"""CC and BCC are addresses, to which RabbitMQ sends the message as well; it adds the others."""
RESERVED_HEADERS = OWN_HEADERS | BROKER_HEADERS

INVALID, CONFLICT, FAILED, REJECTED = "invalid", "conflict", "failed", "rejected"
"""The reasons for which an event is parked, as they stand in ``x-reason``."""

MAX_ID_BYTES = 128
_HASHED = "sha256:"


def is_service_name(name: str) -> bool:
    """Return whether a service can have this name: it becomes part of keys and of queue names."""
    return re.fullmatch(r"[a-z][a-z0-9-]{0,62}", name) is not None


def check_service_name(name: str) -> str:
    """Return the name, or raise ValueError."""
    if not is_service_name(name):
        raise ValueError(
            f"service name {name!r}: at most 63 lower-case letters, digits and '-', a letter first"
        )
    return name


def check_noun(noun: str) -> str:
    """Return the noun, or raise ValueError: it becomes part of metrics' names."""
    if not re.fullmatch(r"[A-Za-z0-9_]{1,63}", noun):
        raise ValueError(f"noun {noun!r}: at most 63 letters, digits and '_'")
    return noun


def check_exchange(name: str) -> str:
    """Return an exchange's name, or raise ValueError: AMQP has 255 bytes for it."""
    if not isinstance(name, str) or not 0 < len(name.encode()) <= 255 or name.startswith("amq."):
        raise ValueError(f"exchange {name!r:.100}: write 1 to 255 bytes, not beginning with amq.")
    return name


def check_bindings(keys: Iterable[str]) -> tuple[str, ...]:
    """Return a queue's binding keys, or raise ValueError: without one it gets no event."""
    found = () if isinstance(keys, str) else tuple(keys)
    if not found:
        raise ValueError(f'bindings {keys!r:.100}: write a list of keys, as in ["order.#"]')
    if not all(isinstance(key, str) and len(key.encode()) <= 255 for key in found):
        raise ValueError(f"bindings {found!r:.100}: a key has at most 255 bytes")
    return found


def encode_id(event_id: str) -> str:
    """Return an id as the last part of a key: the id itself if it is short, else its SHA-256.

    Injective: an id that could be taken for a hashed one is hashed too. No other id needs
    escaping, because etcd's keys are bytes and the id is the last part.
    """
    # At most four bytes a character: most ids are seen to be short without being encoded.
    is_short = 4 * len(event_id) <= MAX_ID_BYTES or len(event_id.encode()) <= MAX_ID_BYTES
    if is_short and not event_id.startswith(_HASHED):
        return event_id
    return _HASHED + sha256(event_id.encode()).hexdigest()


def record_prefix(service: str) -> str:
    """Return the key prefix under which a service's records lie, and nothing else."""
    return f"/service/{service}/"


def record_key(service: str, event_id: str) -> bytes:
    """Return the key of an event's record."""
    return (record_prefix(service) + encode_id(event_id)).encode()


def incarnation_key(service: str) -> str:
    """Return the key whose value is random for each life of an etcd's data."""
    return f"/incarnation/{service}"


RESERVED_PREFIXES = ("/service/", "/incarnation/")


def dead_letter_queue(service: str) -> str:
    """Return the queue for what can never succeed, with the reason in its headers."""
    return f"{service}.dead-letter"


def retry_queue(service: str, delay: str) -> str:
    """Return the queue in which failed events wait; one a delay, as ``order.retry.10s``."""
    return f"{service}.retry.{delay}"
