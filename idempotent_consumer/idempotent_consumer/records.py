"""A record as etcd keeps it, what can be asked of it, and what is answered."""

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
"""A record is publishing while it holds events that may not have been published yet.

A claim whose handler raised is put as released, not deleted: an attempt to claim that etcd applies
late compares with "absent", and would otherwise bring the claim back with nobody at it."""

UNREADABLE = "unreadable"  # The digest of a record that nobody here wrote: no event has it.


class Record(NamedTuple):
    """What etcd holds for one event of one service."""

    state: str
    digest: str
    token: str
    time: str
    value: bytes
    events: tuple[Outgoing, ...] = ()


def encode(
    state: str, digest: str, token: str, time: str, events: Sequence[Outgoing] = ()
) -> bytes:
    """Write a record's value, the same bytes each time.

    Headers stand in a member of their own, which versions that know of none pass over.
    """
    # A token can be anybody's: a record of another writer keeps it.
    value = orjson.dumps({"state": state, "digest": digest, "token": token, "time": time})
    if not events:
        return value
    value = value[:-1] + b',"events":[%s]' % b",".join(event.body for event in events)
    if any(event.headers for event in events):
        value += b',"headers":' + orjson.dumps([dict(event.headers) for event in events])
    return value + b"}"


def decode(value: bytes) -> Record:
    """Read a record's value. One that nobody here wrote is done, with a digest that none has."""
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
    """Return the digest of a record that is done, else "": what an import reads of a million."""
    try:
        members = orjson.loads(value)
        state, digest, _ = members["state"], str(members["digest"]), members["token"]
        return digest if state == DONE else ""
    except (ValueError, TypeError, KeyError):
        return UNREADABLE


class Kind(enum.StrEnum):
    """What an ask does where its record is still the one it expects.

    The value is the state in which that leaves the record, empty where it changes nothing.
    """

    RECORD = DONE  # Put the record as done, with the effects.
    PUBLISH = PUBLISHING  # Put it with the effects and the events that are to be published next.
    CLAIM = CLAIMED  # Put it as claimed, under this process's lease.
    RELEASE = RELEASED  # Put the claimed record as released: whoever comes next may claim it.
    LOOK = ""  # Only read.


@dataclass(slots=True, eq=False)
class Ask:
    """One compare-and-set on one record, sent in a transaction with others.

    ``expect`` is the value that the record must have for the ask to apply, None for absent. Its
    revision would not do: in an etcd restored from a snapshot another record may have it.
    ``value`` is written once, at the first sending, and with its ``token`` tells this ask's own
    write from everybody else's, however often it is sent. ``owner`` is the asker's own.
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
        """About how large this makes the request, from above."""
        return 3 * len(self.key) + 320 + len(self.expect or b"") + self.effects.size_bytes


class Answer(NamedTuple):
    """What became of an ask.

    ``landed``: it applied, under ``lease``. Otherwise ``found`` is the record that stands in its
    way, or None where there is none and the ask expected one (or only looked).
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
        # One comparison of the transaction, and one read after a failure, are the incarnation's.
        self._max_asks = min(max_asks, max_operations - 1)
        self._max_operations = max_operations
        self._operations = self._size_bytes = 0
        self._effect_keys: set[str] = set()
        self._puts: list[Ask] = []
        self._looks: list[Ask] = []

    @property
    def commits(self) -> list[list[Ask]]:
        """What is committed together: the puts, and the looks, for which no put waits."""
        return [asks for asks in (self._puts, self._looks) if asks]

    def take(self, ask: Ask) -> bool:
        """Add an ask, or return False where it belongs into the next batch."""
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
    """Return why these effects fit into no transaction, or None where they do."""
    if 1 + len(effects.puts) > max_operations:
        return f"{len(effects.puts)} effects, and ETCD_MAX_TXN_OPS is {max_operations}"
    size_bytes = effects.size_bytes
    if size_bytes > MAX_REQUEST_BYTES - _OVERHEAD_BYTES:
        return f"effects of {size_bytes} bytes, and etcd takes {MAX_REQUEST_BYTES} in a request"
    return None


def judge(ask: Ask, kv: Any) -> Answer | None:
    """Judge an ask by what was read of its record after its transaction did not apply.

    ``kv`` is etcd's, or None where there is none. None is returned where the ask is to be sent
    again: a value that is the ask's own, byte for byte, landed in an earlier attempt, and a
    record that is as the ask expects it stands in nobody's way.
    """
    found = decode(kv.value) if kv is not None else None
    value = found.value if found is not None else None
    if ask.kind is not Kind.LOOK:
        if value == ask.value:
            return Answer(ask, True, kv.lease, found)
        if value == ask.expect:
            return None
    return Answer(ask, False, found=found)
