"""What a handler gets and returns: an event, and effects that are committed with its record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from types import MappingProxyType
from typing import Any, NamedTuple

import orjson

from .names import RESERVED_PREFIXES

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
    try:
        canonical = orjson.dumps([event_id, event_type, args], option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError as error:
        raise InvalidEvent(f"no canonical form: {error}") from None
    # A stored format, kept in etcd for as long as the window, with its version in front.
    digest = "1:" + sha256(canonical).hexdigest()[:32]
    return Event(event_id, event_type, args, members, digest)


# Effects.


class Put(NamedTuple):
    """An effect: one key to be written in the transaction that records the event."""

    key: str
    value: bytes


class Publish(NamedTuple):
    """An effect: an event to be published once this one is recorded.

    Its id is derived from the id of the event it comes from, the service, and its place among
    the events returned: ``<id>/<service>/<n>``. It is published at least once, and consumers that
    use this library skip a repeat.
    """

    type: str
    args: Mapping[str, Any] = MappingProxyType({})


Effect = Put | Publish
Effects = Effect | Iterable[Effect] | None


class Checked(NamedTuple):
    """A handler's effects, as they are committed: keys, and the bodies of events.

    ``size_bytes`` is how large these make a request, from above: four bytes a character at most.
    """

    puts: Sequence[Put] = ()
    events: Sequence[bytes] = ()
    size_bytes: int = 0


NO_EFFECTS = Checked()


def check_effects(effects: Effects, service: str, event_id: str) -> Checked:
    """Return effects as etcd and the broker will take them.

    Raises TypeError or ValueError, which count as the handler's own failure.
    """
    if effects is None:
        return NO_EFFECTS
    puts: list[Put] = []
    events: list[bytes] = []
    size_bytes = 0
    for effect in (effects,) if isinstance(effects, (Put, Publish)) else effects:
        if isinstance(effect, Publish):
            derived = f"{event_id}/{service}/{len(events)}"
            body = orjson.dumps({"id": derived, "type": effect.type, "args": dict(effect.args)})
            decode(body)
            events.append(body)
            size_bytes += len(body) + 1
        elif not isinstance(effect, Put) or not isinstance(effect.value, bytes):
            got = f"{effect!r:.100}"
            raise TypeError(f"an effect is a Put of str and bytes, or a Publish, not {got}")
        elif not effect.key.encode() or effect.key.startswith(RESERVED_PREFIXES):
            where = " or ".join(RESERVED_PREFIXES)
            got = f"{effect.key!r:.100}"
            raise ValueError(f"an effect's key is not empty, and not under {where}: {got}")
        else:
            puts.append(effect)
            size_bytes += 4 * len(effect.key) + len(effect.value) + 32
    if len(puts) > 1 and len({put.key for put in puts}) < len(puts):
        raise ValueError("two effects of one event have the same key")
    return Checked(tuple(puts), tuple(events), size_bytes)
