"""What a handler gets and what it returns: an event, and the effects committed with its record."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from types import MappingProxyType
from typing import Any, NamedTuple

import orjson

from .names import RESERVED_HEADERS, RESERVED_PREFIXES

NOTHING: Mapping[str, Any] = MappingProxyType({})
"""No headers, no args."""

MAX_BODY_BYTES = 1024 * 1024
"""A larger body is parked unparsed: etcd takes 1.5 MiB in one request, and parsing costs memory."""


class InvalidEvent(ValueError):
    """The body is not a valid event; the message tells the sender what is wrong."""


class Event(NamedTuple):
    """One event as its producer sent it.

    ``id`` and ``type`` are non-empty strings, ``args`` is an object (empty if it was left out).
    ``members`` is the whole JSON object, including members that this library does not use.
    ``digest`` is the same for all bodies with equal id, type and args, however they are serialised.
    But an integer never equals a float: 1 and 1.0 have different digests.
    ``headers`` are the message's own, without those that this library or the broker adds.
    """

    id: str
    type: str
    args: dict[str, Any]
    members: Mapping[str, Any] = NOTHING
    digest: str = ""
    headers: Mapping[str, Any] = NOTHING

    @property
    def about(self) -> dict[str, str]:
        """What log lines say about it. An id or a type can be a megabyte long, so they are cut."""
        about = {"event_id": self.id[:200], "type": self.type[:200]}
        parent = self.headers.get("traceparent")
        if isinstance(parent, str) and (matched := _TRACEPARENT.match(parent)):
            about["trace_id"] = matched[1]
        return about


class Properties(NamedTuple):
    """What a decoder gets of a message besides its body; None is for what the message lacks."""

    headers: Mapping[str, Any] = NOTHING
    message_id: str | None = None
    type: str | None = None
    content_type: str | None = None


Decoder = Callable[[bytes, Properties], Event]
"""Makes an event, with id, type and args, from a message. Raises InvalidEvent if the sender is at
fault. Any other exception counts as a failure of the service."""


def decode_by(decoder: Decoder, body: bytes, properties: Properties) -> Event:
    """Return the event that a service's own decoder makes, with its digest.

    Raises InvalidEvent if the sender is at fault, which includes text that cannot be encoded as
    UTF-8. Any other exception is the decoder's.
    """
    _check_size(body)
    event: object = decoder(body, properties)
    if not isinstance(event, Event):
        raise TypeError(f"a decoder returns an Event, not {event!r:.100}")
    texts = all(isinstance(text, str) and text for text in (event.id, event.type))
    if not texts or not isinstance(event.args, dict):
        raise TypeError(f"its id and type are non-empty strs, its args a dict: {event!r:.200}")
    try:
        return event._replace(digest=_digest(event.id, event.type, event.args))
    except InvalidEvent as error:
        # Not the sender's fault: JSON has no such types.
        if "serializable" in str(error) or "key must be str" in str(error):
            raise TypeError(str(error)) from None
        raise


def decode(body: bytes) -> Event:
    """Decode a message body.

    Raises InvalidEvent unless it is a JSON object in UTF-8 whose id and type are non-empty strings
    and whose args, if present, are an object. NaN, unpaired surrogates and more nesting than orjson
    can write (254 levels) are refused too, since they have no digest. orjson reads integers of more
    than 64 bits as floats: send such a number as a string.
    """
    _check_size(body)
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
    return Event(event_id, event_type, args, members, _digest(event_id, event_type, args))


def _check_size(body: bytes) -> None:
    if len(body) > MAX_BODY_BYTES:
        raise InvalidEvent(f"{len(body)} bytes; at most {MAX_BODY_BYTES} are read")


def _digest(event_id: str, event_type: str, args: dict[str, Any]) -> str:
    try:
        canonical = orjson.dumps([event_id, event_type, args], option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError as error:
        raise InvalidEvent(f"no canonical form: {error}") from None
    # A stored format, with its version in front: etcd keeps it for as long as the window.
    return "1:" + sha256(canonical).hexdigest()[:32]


# Headers.

Header = str | int | bool
_MAX_HEADERS_BYTES = 32 * 1024  # All headers of a message have to fit in one frame of 128 KiB.
_MAX_TRACE_BYTES = 8192  # The limit of W3C's "Baggage".
_TRACE_HEADERS = ("traceparent", "tracestate", "baggage")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


def check_headers(headers: Mapping[str, Header]) -> dict[str, Header]:
    """Return headers for a message that this library publishes.

    Raises ValueError for a name that belongs to the broker or to this library, is empty or has more
    than 255 bytes, for an integer of more than 64 bits, and for more than 32 KiB in all. Raises
    TypeError for a name that is not a str, or a value that is not a str, int or bool.
    """
    size_bytes = 0
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, (str, int)):
            got = f"{name!r:.100}: {value!r:.100}"
            raise TypeError(f"a header is a str with a str, int or bool as its value, not {got}")
        if not 0 < len(name.encode()) <= 255 or name in RESERVED_HEADERS:
            raise ValueError(f"not a header of your own, or not of 1 to 255 bytes: {name!r:.100}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"the header {name} has an integer past 64 bits: write it as a str")
        size_bytes += len(name) + len(value.encode() if isinstance(value, str) else b"8 bytes.")
    if size_bytes > _MAX_HEADERS_BYTES:
        raise ValueError(f"headers of {size_bytes} bytes; at most {_MAX_HEADERS_BYTES} are sent")
    return dict(headers)


def trace_headers(headers: Mapping[str, Any]) -> dict[str, Header]:
    """Return the headers that continue a trace (W3C's "Trace Context" and "Baggage")."""
    return {
        name: value
        for name in _TRACE_HEADERS
        if isinstance(value := headers.get(name), str) and len(value.encode()) <= _MAX_TRACE_BYTES
    }


# Effects.


class Put(NamedTuple):
    """An effect: a key to write in the transaction that records the event."""

    key: str
    value: bytes


class Publish(NamedTuple):
    """An effect: an event to publish once the handled one is recorded.

    Its id consists of the id of the handled event, the service, and its place among the events
    returned: ``<id>/<service>/<n>``. It is published at least once; consumers that use this library
    skip duplicates. ``headers`` are added to the trace headers of the handled event.
    """

    type: str
    args: Mapping[str, Any] = NOTHING
    headers: Mapping[str, Header] = NOTHING


Effect = Put | Publish
Effects = Effect | Iterable[Effect] | None


class Outgoing(NamedTuple):
    """An event to publish: the body and headers of its message."""

    body: bytes
    headers: Mapping[str, Header] = NOTHING


class Checked(NamedTuple):
    """A handler's effects, ready to be committed: keys and events.

    ``size_bytes`` is an upper bound for their part of a request, with four bytes for a character.
    """

    puts: Sequence[Put] = ()
    events: Sequence[Outgoing] = ()
    size_bytes: int = 0


NO_EFFECTS = Checked()


def check_effects(effects: Effects, service: str, event: Event) -> Checked:
    """Return a handler's effects as etcd and the broker take them.

    Raises TypeError or ValueError, which count as failures of the handler.
    """
    if effects is None:
        return NO_EFFECTS
    puts: list[Put] = []
    events: list[Outgoing] = []
    size_bytes = 0
    for effect in _each(effects):
        if isinstance(effect, Publish):
            event_id, args = f"{event.id}/{service}/{len(events)}", dict(effect.args)
            body = orjson.dumps({"id": event_id, "type": effect.type, "args": args})
            decode(body)
            headers = check_headers({**trace_headers(event.headers), **effect.headers})
            events.append(Outgoing(body, headers))
            size_bytes += len(body) + len(orjson.dumps(headers)) + 2
        else:
            put = _checked_put(effect)
            puts.append(put)
            size_bytes += 4 * len(put.key) + len(put.value) + 32
    if len(puts) > 1 and len({put.key for put in puts}) < len(puts):
        raise ValueError("two effects of one event have the same key")
    return Checked(tuple(puts), tuple(events), size_bytes)


_RETURNS = "return a Put, a Publish, an iterable of these, or None"


def _each(effects: Effects) -> Iterable[object]:
    if isinstance(effects, (Put, Publish)):
        return (effects,)
    if isinstance(effects, (str, bytes, Mapping, Awaitable)) or not isinstance(effects, Iterable):
        unawaited = isinstance(effects, Awaitable)
        why = "what wraps an async def has to be async def too" if unawaited else _RETURNS
        raise TypeError(f"a handler returned {effects!r:.100}: {why}")
    return effects


def _checked_put(put: object) -> Put:
    if not isinstance(put, Put):
        raise TypeError(f"a handler returned {put!r:.100} among its effects: {_RETURNS}")
    if not isinstance(put.key, str):
        raise TypeError(f"a Put's key is a str, not {put.key!r:.100}")
    if not isinstance(put.value, bytes):
        what = f"a Put's value is bytes, not {put.value!r:.100}"
        raise TypeError(f"{what}: write value.encode()" if isinstance(put.value, str) else what)
    if not put.key.encode() or put.key.startswith(RESERVED_PREFIXES):
        where = " or ".join(RESERVED_PREFIXES)
        raise ValueError(f"a key must not be empty or begin with {where}: {put.key!r:.100}")
    return put
