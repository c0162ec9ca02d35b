"""A record as etcd stores it, what can be asked of it, and the answers."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from .etcd import MAX_REQUEST_BYTES
from .event import NO_EFFECTS, Checked, Outgoing, check_headers
from .event import decode as decode_event

CLAIMED, RELEASED, PUBLISHING, DONE = "claimed", "released", "publishing", "done"
"""The states of a record. In *publishing* it holds events that may not have been published yet.

A claim whose handler raised is put as *released*, not deleted. An attempt to claim compares with
"absent": if etcd applied a late one after a delete, nobody would work on that claim."""

UNREADABLE = "unreadable"  # The digest of a record in another format. No event has it.


class Record(NamedTuple):
    """What etcd stores for one event of one service."""

    state: str
    digest: str
    token: str
    time: str
    value: bytes
    events: tuple[Outgoing, ...] = ()


def encode(
    state: str, digest: str, token: str, time: str, events: Sequence[Outgoing] = ()
) -> bytes:
    """Return a record's value: the same bytes for the same arguments.

    Headers are a member of their own, which older versions ignore.
    """
    # The token may be another writer's, so it is encoded as any text.
    value = orjson.dumps({"state": state, "digest": digest, "token": token, "time": time})
    if not events:
        return value
    value = value[:-1] + b',"events":[%s]' % b",".join(event.body for event in events)
    if any(event.headers for event in events):
        value += b',"headers":' + orjson.dumps([dict(event.headers) for event in events])
    return value + b"}"


def decode(value: bytes) -> Record:
    """Read a record's value. If it is in another format, it is done, with a digest no event has."""
    try:
        members = orjson.loads(value)
        state, digest, token, time = (
            members[name] for name in ("state", "digest", "token", "time")
        )
        events = _events(members) if state == PUBLISHING else ()
        if (
            state in (CLAIMED, RELEASED, PUBLISHING, DONE)
            and all(isinstance(text, str) for text in (digest, token, time))
            and bool(events) == (state == PUBLISHING)
        ):
            return Record(state, digest, token, time, value, events)
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    return Record(DONE, UNREADABLE, "", "", value)


def _events(members: Any) -> tuple[Outgoing, ...]:
    bodies = tuple(map(orjson.dumps, members["events"]))
    for body in bodies:
        decode_event(body)
    headers = members.get("headers") or [{}] * len(bodies)
    return tuple(
        Outgoing(body, check_headers(each)) for body, each in zip(bodies, headers, strict=True)
    )


def digest_if_done(value: bytes) -> str:
    """Return a record's digest if it is done, otherwise "". Faster than ``decode``, for imports."""
    try:
        members = orjson.loads(value)
        state, digest, _ = members["state"], str(members["digest"]), members["token"]
        return digest if state == DONE else ""
    except (ValueError, TypeError, KeyError):
        return UNREADABLE


class Kind(enum.StrEnum):
    """What an ask does to its record. The value is the state that it puts, if any."""

    RECORD = DONE  # Put the record as done, with the effects.
    PUBLISH = PUBLISHING  # Put it with the effects and the events that are to be published next.
    CLAIM = CLAIMED  # Put it as claimed, under this process's lease.
    RELEASE = RELEASED  # Put the claimed record as released, so that anyone may claim it.
    LOOK = ""  # Only read it.


@dataclass(slots=True, eq=False)
class Ask:
    """One compare-and-set on one record, sent in a transaction with others.

    It applies if the record has the value ``expect``, or is absent if that is None. The value is
    compared and not the revision, which another record may have in an etcd that was restored from
    a snapshot. ``value`` is what it puts: the same at each attempt, and different from everybody
    else's by the ``token``. ``owner`` is for the caller.
    """

    kind: Kind
    key: bytes
    digest: str
    token: str
    owner: Any
    expect: bytes | None = None
    effects: Checked = NO_EFFECTS
    value: bytes = b""

    @property
    def size_bytes(self) -> int:
        """An upper bound for the bytes that this adds to the request."""
        return 3 * len(self.key) + 320 + len(self.expect or b"") + self.effects.size_bytes


class Answer(NamedTuple):
    """What became of an ask.

    If it ``landed``, it applied under ``lease``. Otherwise ``found`` is its record, or None if
    there is no record.
    """

    ask: Ask
    landed: bool
    lease: int = 0
    found: Record | None = None


# A batch of asks, and the judgement of each.

MAX_BATCH_BYTES = 1024 * 1024
_OVERHEAD_BYTES = 4096


class Batch:
    """Asks that fit into one transaction: no key twice, and within etcd's limits."""

    def __init__(self, max_asks: int, max_operations: int) -> None:
        # The incarnation key takes one comparison, and one read if the transaction fails.
        self._max_asks = min(max_asks, max_operations - 1)
        self._max_operations = max_operations
        self._operations = self._size_bytes = 0
        self._effect_keys: set[str] = set()
        self._puts: list[Ask] = []
        self._looks: list[Ask] = []

    @property
    def commits(self) -> list[list[Ask]]:
        """What is committed together: the puts, and separately the looks, so that no put waits."""
        return [asks for asks in (self._puts, self._looks) if asks]

    def take(self, ask: Ask) -> bool:
        """Add an ask, or return False if it has to go into the next batch."""
        puts = ask.effects.puts
        operations = self._operations + 1 + len(puts)
        size_bytes = self._size_bytes + ask.size_bytes
        asks = len(self._puts) + len(self._looks)
        if asks and (
            asks >= self._max_asks
            or operations > self._max_operations
            or size_bytes > MAX_BATCH_BYTES
            or (puts and not self._effect_keys.isdisjoint(put.key for put in puts))
        ):
            return False
        self._operations, self._size_bytes = operations, size_bytes
        if puts:
            self._effect_keys.update(put.key for put in puts)
        (self._looks if ask.kind is Kind.LOOK else self._puts).append(ask)
        return True


def why_never(effects: Checked, max_operations: int) -> str | None:
    """Return why these effects do not fit into any transaction, or None if they do."""
    if 1 + len(effects.puts) > max_operations:
        return f"{len(effects.puts)} effects, and ETCD_MAX_TXN_OPS is {max_operations}"
    size_bytes = effects.size_bytes
    if size_bytes > MAX_REQUEST_BYTES - _OVERHEAD_BYTES:
        return f"effects of {size_bytes} bytes, and etcd takes {MAX_REQUEST_BYTES} in a request"
    return None


def judge(ask: Ask, kv: Any) -> Answer | None:
    """Judge an ask whose transaction did not apply by its record as etcd has it (or None).

    A record with the ask's own value, byte for byte, means that an earlier attempt landed. If the
    record is as the ask expects, another ask prevented the transaction: then this one is to be sent
    again, and None is returned.
    """
    found = decode(kv.value) if kv is not None else None
    value = found.value if found is not None else None
    if ask.kind is not Kind.LOOK:
        if value == ask.value:
            return Answer(ask, True, kv.lease, found)
        if value == ask.expect:
            return None
    return Answer(ask, False, found=found)
