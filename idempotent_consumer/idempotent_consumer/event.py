"""An event: decoding what arrived, and the digest that tells two bodies apart."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from types import MappingProxyType
from typing import Any, NamedTuple

import orjson

MAX_BODY_BYTES = 1024 * 1024
"""A larger body is parked unread: etcd takes 1.5 MiB in one request, and parsing costs memory."""


class InvalidEvent(ValueError):
    """The body is not a valid event; the message tells its sender what is wrong with it."""


class Event(NamedTuple):
    """One event as its producer sent it.

    ``id`` and ``type`` are non-empty strings, ``args`` is an object (empty if it was left out).
    ``members`` is the whole JSON object, including members that this library does not use.
    ``digest`` is equal for two bodies with equal id, type and args, however they were serialised.
    """

    id: str
    type: str
    args: dict[str, Any]
    members: Mapping[str, Any] = MappingProxyType({})
    digest: str = ""

    @property
    def about(self) -> dict[str, str]:
        """Return what a log line says of it, cut short: an id or a type can be a megabyte long."""
        return {"event_id": self.id[:200], "type": self.type[:200]}


def decode(body: bytes) -> Event:
    """Read an event from a message body.

    Raises InvalidEvent for whatever is not a JSON object in UTF-8 with a non-empty string id and
    type and, where present, an object as args. NaN, unpaired surrogates and nesting deeper than
    orjson writes (254 levels) are refused too: none of them can be given a digest. An integer
    past 64 bits is read as a float, as orjson does: send such a number as a string.
    """
    if len(body) > MAX_BODY_BYTES:
        raise InvalidEvent(f"{len(body)} bytes; at most {MAX_BODY_BYTES} are read")
    try:
        members = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidEvent(f"not JSON: {error}") from None
    if not isinstance(members, dict):
        raise InvalidEvent("not a JSON object")
    event_id, event_type = members.get("id"), members.get("type")
    if not isinstance(event_id, str) or not event_id:
        raise InvalidEvent("id is not a non-empty string")
    if not isinstance(event_type, str) or not event_type:
        raise InvalidEvent("type is not a non-empty string")
    args = members.get("args", {})
    if not isinstance(args, dict):
        raise InvalidEvent("args is not an object")
    return Event(event_id, event_type, args, members, digest(event_id, event_type, args))


def digest(event_id: str, event_type: str, args: dict[str, Any]) -> str:
    """Return the stored form of an event's content: ``1:`` and 16 bytes of SHA-256 in hex.

    Canonical form is orjson with sorted keys over the array [id, type, args]. The prefix is the
    version of this format, which is kept in etcd for as long as the window.
    """
    try:
        canonical = orjson.dumps([event_id, event_type, args], option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError as error:
        raise InvalidEvent(f"no canonical form: {error}") from None
    return "1:" + sha256(canonical).hexdigest()[:32]
