"""The names that other programs see: etcd's keys, exchanges and queues, message headers."""

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
"""When an event was parked: ISO 8601 in UTC, by the clock of the replica that parked it."""
REPLAYS_HEADER = "x-replays"
"""How often a dead letter has been sent back to its service."""

OWN_HEADERS = frozenset(
    (ATTEMPTS_HEADER, REASON_HEADER, ERROR_HEADER, PARKED_AT_HEADER, REPLAYS_HEADER)
)
BROKER_HEADERS = frozenset({"CC", "BCC", "x-death", "x-delivery-count", "x-acquired-count"}) | {
    f"x-{which}-death-{what}"
    for which in ("first", "last")
    for what in ("exchange", "queue", "reason")
}
"""RabbitMQ also sends a message to the queues that CC and BCC name; it adds the other headers."""
RESERVED_HEADERS = OWN_HEADERS | BROKER_HEADERS

INVALID, CONFLICT, FAILED, REJECTED = "invalid", "conflict", "failed", "rejected"
"""The values of ``x-reason``: why an event was parked."""

MAX_ID_BYTES = 128
_HASHED = "sha256:"


def is_service_name(name: str) -> bool:
    """Return whether this can be a service's name, which is part of keys and queue names."""
    return re.fullmatch(r"[a-z][a-z0-9-]{0,62}", name) is not None


def check_service_name(name: str) -> str:
    """Return the name, or raise ValueError."""
    if not is_service_name(name):
        raise ValueError(
            f"service name {name!r}: at most 63 lower-case letters, digits and '-', a letter first"
        )
    return name


def check_noun(noun: str) -> str:
    """Return the noun, or raise ValueError. It is part of metrics' names."""
    if not re.fullmatch(r"[A-Za-z0-9_]{1,63}", noun):
        raise ValueError(f"noun {noun!r}: at most 63 letters, digits and '_'")
    return noun


def check_exchange(name: str) -> str:
    """Return the exchange's name, or raise ValueError. AMQP allows 255 bytes."""
    if not isinstance(name, str) or not 0 < len(name.encode()) <= 255 or name.startswith("amq."):
        raise ValueError(f"exchange {name!r:.100}: write 1 to 255 bytes, not beginning with amq.")
    return name


def check_bindings(keys: Iterable[str]) -> tuple[str, ...]:
    """Return a queue's binding keys, or raise ValueError. It needs at least one."""
    found = () if isinstance(keys, str) else tuple(keys)
    if not found:
        raise ValueError(f'bindings {keys!r:.100}: write a list of keys, as in ["order.#"]')
    if not all(isinstance(key, str) and len(key.encode()) <= 255 for key in found):
        raise ValueError(f"bindings {found!r:.100}: a key has at most 255 bytes")
    return found


def encode_id(event_id: str) -> str:
    """Return an id as the last part of a key: the id itself if it is short, else its SHA-256.

    No two ids give the same key: an id that looks like a hashed one is hashed too. Nothing needs
    escaping, because etcd's keys are bytes and the id comes last.
    """
    # A character has at most four bytes, so most ids need not be encoded to be measured.
    is_short = 4 * len(event_id) <= MAX_ID_BYTES or len(event_id.encode()) <= MAX_ID_BYTES
    if is_short and not event_id.startswith(_HASHED):
        return event_id
    return _HASHED + sha256(event_id.encode()).hexdigest()


def record_prefix(service: str) -> str:
    """Return the prefix of the keys of a service's records. No other key has it."""
    return f"/service/{service}/"


def record_key(service: str, event_id: str) -> bytes:
    """Return the key of an event's record."""
    return (record_prefix(service) + encode_id(event_id)).encode()


def incarnation_key(service: str) -> str:
    """Return the key of the incarnation, a random value by which a wiped etcd is recognised."""
    return f"/incarnation/{service}"


RESERVED_PREFIXES = ("/service/", "/incarnation/")


def dead_letter_queue(service: str) -> str:
    """Return the name of the queue of parked events."""
    return f"{service}.dead-letter"


def retry_queue(service: str, delay: str) -> str:
    """Return the name of the queue in which failed events wait, such as ``order.retry.10s``."""
    return f"{service}.retry.{delay}"
