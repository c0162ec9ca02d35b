"""Group commit: one etcd transaction for a batch of asks, and the judgement of its reply."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from ..effects import Checked
from ..loop import Loop
from ..policies import COMMIT_AGAIN, Backoff
from . import messages as m
from . import records
from .calls import Calls
from .etcd import MAX_REQUEST_BYTES, EtcdError, Failure
from .leases import ClaimLease, WindowLease
from .records import Answer, Ask, Kind

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
        self.asks: list[Ask] = []

    def take(self, ask: Ask) -> bool:
        """Add an ask, or return False where it belongs into the next batch."""
        operations, size_bytes = ask.operations, ask.size_bytes
        if self.asks and (
            len(self.asks) >= self._max_asks
            or self._operations + operations > self._max_operations
            or self._size_bytes + size_bytes > MAX_BATCH_BYTES
        ):
            return False
        if ask.effects.puts:
            keys = [put.key for put in ask.effects.puts]
            if not self._effect_keys.isdisjoint(keys):
                return False
            self._effect_keys.update(keys)
        self._operations += operations
        self._size_bytes += size_bytes
        self.asks.append(ask)
        return True


def why_never(effects: Checked, max_operations: int) -> str | None:
    """Return why these effects fit into no transaction, or None where they do."""
    if 1 + len(effects.puts) > max_operations:
        return f"{len(effects.puts)} effects, and ETCD_MAX_TXN_OPS is {max_operations}"
    size_bytes = effects.size_bytes
    if size_bytes > MAX_REQUEST_BYTES - _OVERHEAD_BYTES:
        return f"effects of {size_bytes} bytes, and etcd takes {MAX_REQUEST_BYTES} in a request"
    return None


class Commit:
    """One batch on its way: sent until each of its asks has its answer.

    ``answered`` is called with the answers each reply brings: all of them where the transaction
    applied; else those that something stands in the way of, while the others are sent again.
    After each sending the outcome is unknown until etcd has answered: nothing is concluded from
    an error, and the asks' tokens tell an earlier attempt that landed from somebody else's write.
    """

    def __init__(
        self,
        asks: list[Ask],
        guard: tuple[bytes, bytes],
        services: tuple[Calls, Loop, WindowLease, ClaimLease],
        answered: Callable[[list[Answer]], None],
        wiped: Callable[[], None],
    ) -> None:
        self._asks, self._guard = asks, guard
        self._calls, self._loop, self._window, self._claims = services
        self._answered, self._wiped = answered, wiped
        self._leases = (0, 0)
        self._backoff = Backoff(COMMIT_AGAIN)
        self._write_values()

    def send(self) -> None:
        """Send the transaction once both leases are good for it."""
        recorded = sum(ask.kind in _UNDER_WINDOW_LEASE for ask in self._asks)
        if self._claiming:
            self._claims.usable(lambda: self._window.usable(recorded, self._send))
        else:
            self._window.usable(recorded, self._send)

    def _write_values(self) -> None:
        now = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")
        for ask in self._asks:
            if ask.kind is not Kind.LOOK and not ask.value:
                ask.value = records.encode(ask.kind, ask.digest, ask.token, now, ask.effects.events)

    def _send(self) -> None:
        self._calls.once("Txn", self._request(), self._known, self._failed)

    def _request(self) -> Any:
        self._leases = self._window.current, self._claims.current
        request = m.TxnRequest()
        compare, success = request.compare, request.success
        m.value_is(compare, *self._guard)
        for ask in self._asks:
            if ask.kind is Kind.LOOK:
                m.get(success, ask.key)
                continue
            m.unchanged(compare, ask.key, ask.expect)
            m.put(success, ask.key, ask.value, self._leases[ask.kind in _UNDER_CLAIM_LEASE])
            for put in ask.effects.puts:
                m.put(success, put.key.encode(), put.value)
        return request

    @property
    def _claiming(self) -> bool:
        return any(ask.kind in _UNDER_CLAIM_LEASE for ask in self._asks)

    def _failed(self, error: EtcdError) -> None:
        """Send again. An attempt to claim may apply when its event is settled and its record gone.

        Under a lease that is kept alive, such a claim would hold the next delivery for ever.
        """
        if error.failure is Failure.LEASE_NOT_FOUND:
            self._window.lost()
        if self._claiming:
            self._claims.give_up()
        self._loop.call_later(self._backoff.next_s(), self.send)

    def _known(self, reply: Any, _sent_s: float) -> None:
        self._backoff.reset()
        if reply.succeeded:
            self._answered(self._all_landed(reply))
        else:
            # Read apart and not in an ELSE branch, which etcd would have to log with each batch.
            self._calls.once("Txn", self._reads(), self._read, self._failed)

    def _reads(self) -> Any:
        request = m.TxnRequest()
        m.get(request.success, self._guard[0])
        for ask in self._asks:
            m.get(request.success, ask.key)
        return request

    def _read(self, reply: Any, _sent_s: float) -> None:
        guard, *reads = (response.response_range.kvs for response in reply.responses)
        if not guard or guard[0].value != self._guard[1]:
            self._wiped()
            return
        answers, remaining = [], []
        for ask, kvs in zip(self._asks, reads, strict=True):
            answer = judge(ask, kvs[0] if kvs else None)
            if answer is None:
                remaining.append(ask)
            else:
                answers.append(answer)
        self._asks = remaining
        if answers:
            self._answered(answers)
        if remaining:
            self.send()

    def _all_landed(self, reply: Any) -> list[Answer]:
        revision = reply.header.revision
        answers, position = [], 0
        for ask in self._asks:
            if ask.kind is Kind.LOOK:
                kvs = reply.responses[position].response_range.kvs
                answers.append(_found(ask, kvs[0] if kvs else None))
            else:
                lease = self._leases[ask.kind in _UNDER_CLAIM_LEASE]
                answers.append(Answer(ask, True, revision, lease))
            position += ask.operations
        return answers


_UNDER_CLAIM_LEASE = (Kind.CLAIM, Kind.RELEASE)
_UNDER_WINDOW_LEASE = (Kind.RECORD, Kind.PUBLISH)


def judge(ask: Ask, kv: Any) -> Answer | None:
    """Judge an ask by what a failed transaction read of its record; None is: send it again.

    A value that is the ask's own, byte for byte, landed in an earlier attempt. A record still at
    the revision the ask expects stands in nobody's way: another ask's record failed the batch.
    """
    if kv is not None and ask.value and kv.value == ask.value:
        return Answer(ask, True, kv.mod_revision, kv.lease)
    if ask.kind is not Kind.LOOK and (kv.mod_revision if kv is not None else 0) == ask.expect:
        return None
    return _found(ask, kv)


def _found(ask: Ask, kv: Any) -> Answer:
    record = records.decode(kv.value, kv.mod_revision) if kv is not None else None
    return Answer(ask, False, found=record)
