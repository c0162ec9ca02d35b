"""What a handler may return: keys to write and events to publish, both once with its record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import orjson

from . import names
from .event import decode


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


class Checked:
    """A handler's effects, as they are committed: keys, and the bodies of events.

    ``size_bytes`` is how large these make a request, from above: four bytes a character at the
    most.
    """

    __slots__ = ("events", "puts", "size_bytes")

    def __init__(self, puts: Sequence[Put] = (), events: Sequence[bytes] = ()) -> None:
        self.puts, self.events = puts, events
        size_bytes = 0
        for key, value in puts:
            size_bytes += 4 * len(key) + len(value) + 32
        for body in events:
            size_bytes += len(body) + 1
        self.size_bytes = size_bytes


NO_EFFECTS = Checked()


def check_effects(effects: Effects, service: str, event_id: str) -> Checked:
    """Return effects as etcd and the broker will take them.

    Raises TypeError or ValueError, which count as the handler's own failure.
    """
    if effects is None:
        return NO_EFFECTS
    if isinstance(effects, Put):
        return Checked((_checked(effects),))
    puts: list[Put] = []
    events: list[bytes] = []
    for effect in (effects,) if isinstance(effects, Publish) else effects:
        if isinstance(effect, Publish):
            events.append(_body(effect, names.derived_id(event_id, service, len(events))))
        else:
            puts.append(_checked(effect))
    if len({put.key for put in puts}) < len(puts):
        raise ValueError("two effects of one event have the same key")
    return Checked(puts, events)


def _checked(put: Put) -> Put:
    if not isinstance(put, Put) or not isinstance(put.value, bytes):
        raise TypeError(f"an effect is a Put of str and bytes, or a Publish, not {put!r:.100}")
    if not put.key.encode() or put.key.startswith(names.RESERVED_PREFIXES):
        raise ValueError(
            f"an effect's key is not empty, and not under "
            f"{' or '.join(names.RESERVED_PREFIXES)}: {put.key!r:.100}"
        )
    return put


def _body(publish: Publish, event_id: str) -> bytes:
    body = orjson.dumps({"id": event_id, "type": publish.type, "args": dict(publish.args)})
    decode(body)
    return body
