"""What a handler gets and returns: an event, and effects that are committed with its record."""

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
"""A larger body is parked unread: etcd takes 1.5 MiB in one request, and parsing costs memory."""


class InvalidEvent(ValueError):
    """The body is not a valid event; the message tells its sender what is wrong with it."""


class Event(NamedTuple):
    """One event as its producer sent it.

    ``id`` and ``type`` are non-empty strings, ``args`` is an object (empty if it was left out).
    ``members`` is the whole JSON object, including members that this library does not use.
    ``digest`` is equal for two bodies with equal id, type and args, however they were serialised,
    but that an integer is equal to no float: 1 and 1.0 differ.
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
        """Return what a log line says of it, cut short: an id or a type can be a megabyte long."""
        about = {"event_id": self.id[:200], "type": self.type[:200]}
        if self.headers and (trace := _trace_id(self.headers)):
            about["trace_id"] = trace
        return about


class Properties(NamedTuple):
    """What a decoder sees of a message apart from its body; None: the message does not have it."""

    headers: Mapping[str, Any] = NOTHING
    message_id: str | None = None
    type: str | None = None
    content_type: str | None = None


Decoder = Callable[[bytes, Properties], Event]
"""Makes an event of a message: its id, type and args. Raises InvalidEvent for one that its sender
got wrong; whatever else it raises is the service's own failure."""


def decode_by(decoder: Decoder, body: bytes, properties: Properties) -> Event:
    """Read an event by a decoder of the service's own, and give it its digest.

    Raises InvalidEvent for what is the sender's fault, be it that the event holds text that cannot
    be written as UTF-8; what else is raised is the decoder's.
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
        # Only what a decoder has made itself can be of another type than JSON's.
        if "serializable" in str(error) or "key must be str" in str(error):
            raise TypeError(str(error)) from None
        raise


def decode(body: bytes) -> Event:
    """Read an event from a message body.

    Raises InvalidEvent for whatever is not a JSON object in UTF-8 with a non-empty string id and
    type and, where present, an object as args. NaN, unpaired surrogates and nesting deeper than
    orjson writes (254 levels) are refused too: none of them can be given a digest. An integer
    past 64 bits is read as a float, as orjson does: send such a number as a string.
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
    # A stored format, kept in etcd for as long as the window, with its version in front.
    return "1:" + sha256(canonical).hexdigest()[:32]


# Headers.

Header = str | int | bool
_MAX_HEADERS_BYTES = 32 * 1024  # All of a message's have to fit into one frame of 128 KiB.
_MAX_TRACE_BYTES = 8192  # What W3C's "Baggage" has to fit into.
_TRACE_HEADERS = ("traceparent", "tracestate", "baggage")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


def check_headers(headers: Mapping[str, Header]) -> dict[str, Header]:
    """Return headers for a message of this library's.

    Raises ValueError for a name that is the broker's or the library's own, for one longer than
    255 bytes or empty, for an integer past 64 bits and for more than 32 KiB in all, and TypeError
    for a name that is no str or a value that is no str, int or bool.
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
    """Return the headers by which a trace goes on (W3C's "Trace Context" and "Baggage")."""
    return {
        name: value
        for name in _TRACE_HEADERS
        if isinstance(value := headers.get(name), str) and len(value.encode()) <= _MAX_TRACE_BYTES
    }


def _trace_id(headers: Mapping[str, Any]) -> str | None:
    """Return the id of the trace that a message belongs to, None where it belongs to none."""
    parent = headers.get("traceparent")
    matched = _TRACEPARENT.match(parent) if isinstance(parent, str) else None
    return matched[1] if matched else None


# Effects.


class Put(NamedTuple):
    """An effect: one key to be written in the transaction that records the event."""

    key: str
    value: bytes


class Publish(NamedTuple):
    """An effect: an event to be published once this one is recorded.

    Its id is derived from the id of the event it comes from, the service, and its place among
    the events returned: ``<id>/<service>/<n>``. It is published at least once, and consumers that
    use this library skip a repeat. ``headers`` are added to those of the trace that the event it
    comes from belongs to.
    """

    type: str
    args: Mapping[str, Any] = NOTHING
    headers: Mapping[str, Header] = NOTHING


Effect = Put | Publish
Effects = Effect | Iterable[Effect] | None


class Outgoing(NamedTuple):
    """An event that is to be published: its message's body and headers."""

    body: bytes
    headers: Mapping[str, Header] = NOTHING


class Checked(NamedTuple):
    """A handler's effects, as they are committed: keys, and events.

    ``size_bytes`` is how large these make a request, from above: four bytes a character at most.
    """

    puts: Sequence[Put] = ()
    events: Sequence[Outgoing] = ()
    size_bytes: int = 0


NO_EFFECTS = Checked()


def check_effects(effects: Effects, service: str, event: Event) -> Checked:
    """Return an event's effects as etcd and the broker will take them.

    Raises TypeError or ValueError, which count as the handler's own failure.
    """
    if effects is None:
        return NO_EFFECTS
    puts: list[Put] = []
    events: list[Outgoing] = []
    size_bytes = 0
    for effect in _each(effects):
        if isinstance(effect, Publish):
            outgoing = _outgoing(effect, f"{event.id}/{service}/{len(events)}", event.headers)
            events.append(outgoing)
            size_bytes += len(outgoing.body) + len(orjson.dumps(outgoing.headers)) + 2
        else:
            put = _checked_put(effect)
            puts.append(put)
            size_bytes += 4 * len(put.key) + len(put.value) + 32
    if len(puts) > 1 and len({put.key for put in puts}) < len(puts):
        raise ValueError("two effects of one event have the same key")
    return Checked(tuple(puts), tuple(events), size_bytes)


_RETURNS = "return a Put, a Publish, an iterable of these, or None"


def _each(effects: Effects) -> Iterable[object]:
    """Return the effects one by one."""
    if isinstance(effects, (Put, Publish)):
        return (effects,)
    if isinstance(effects, (str, bytes, Mapping, Awaitable)) or not isinstance(effects, Iterable):
        unawaited = isinstance(effects, Awaitable)
        why = "what wraps an async def has to be async def too" if unawaited else _RETURNS
        raise TypeError(f"a handler returned {effects!r:.100}: {why}")
    return effects


def _outgoing(publish: Publish, derived_id: str, headers: Mapping[str, Any]) -> Outgoing:
    members = {"id": derived_id, "type": publish.type, "args": dict(publish.args)}
    body = orjson.dumps(members)
    decode(body)
    return Outgoing(body, check_headers({**trace_headers(headers), **publish.headers}))


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
