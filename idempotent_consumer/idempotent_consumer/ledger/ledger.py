"""The ledger: which events this service has done, kept in etcd."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any, Protocol

from structlog.typing import FilteringBoundLogger

from .. import names
from ..effects import Checked
from ..event import Event
from ..health import Health
from ..loop import Loop
from ..settings import Settings
from . import messages as m
from . import records
from .cache import Cache
from .calls import Calls
from .commit import Batch, Commit, why_never
from .etcd import Client
from .leases import ClaimLease, WindowLease
from .records import DONE, Answer, Kind, Record

GUARD_EVERY_S = 5.0

OnAnswers = Callable[[list[Answer]], None]


class Ledger(Protocol):
    """What the consumer needs of a ledger, with etcd behind it or without."""

    def open(self, opened: Callable[[], None]) -> None:
        """Reach the ledger, then call ``opened``. Nothing is consumed before."""
        ...

    def key(self, event: Event, token: str) -> bytes:
        """Return the key of an event's record; equal keys are one event."""
        ...

    def is_done(self, digest: str) -> bool:
        """Return whether this very event is known to be recorded as done. False decides nothing."""
        ...

    @property
    def halted(self) -> bool:
        """Whether nothing may be settled any more, on whatever grounds."""
        ...

    def batch(self) -> Batch:
        """Return an empty batch."""
        ...

    def why_never(self, effects: Checked) -> str | None:
        """Return why these effects can never be committed, or None."""
        ...

    def submit(self, batch: Batch, answered: OnAnswers) -> None:
        """Commit a batch; ``answered`` is called until each of its asks has had its answer."""
        ...

    def read(self, key: bytes, found: Callable[[Record | None], None]) -> None:
        """Read a record once, for information; nothing is called where etcd does not answer."""
        ...

    def claim_remaining_s(self, lease: int) -> float:
        """Return for how long a claim under this lease holds at the least. Any thread."""
        ...

    def close(self) -> None:
        """Answer nothing more, and end what is under way."""
        ...


class CacheSource(Protocol):
    """What fills the cache beside the consuming, from its making until it is closed."""

    def close(self) -> None:
        """Stop."""
        ...


class EtcdLedger:
    """The ledger on etcd. ``longest_call_s`` is the longest time-out of a claimed handler."""

    def __init__(
        self,
        service: str,
        settings: Settings,
        client: Client,
        loop: Loop,
        health: Health,
        log: FilteringBoundLogger,
        cache: Cache,
        fill_cache: Callable[[int], CacheSource] | None = None,
        longest_call_s: float = 0.0,
    ) -> None:
        self._service, self._settings = service, settings
        self._loop, self._log, self._cache = loop, log, cache
        self._calls = Calls(client, loop, health, log)
        self._window = WindowLease(self._calls, loop, settings.dedup_window_s)
        self._claims = ClaimLease(self._calls, loop, longest_call_s)
        self._fill_cache = fill_cache
        self._source: CacheSource | None = None
        self._incarnation_key = names.incarnation_key(service).encode()
        self._incarnation = b""
        health.lacks("etcd", "not reached yet")

    def open(self, opened: Callable[[], None]) -> None:
        """Learn which life of etcd's data this is: the one that is there, or a first one."""
        key = self._incarnation_key

        def make() -> Any:
            # Anew each time: an attempt that applied, unseen, must not be repeated after a wipe.
            self._incarnation = secrets.token_hex(16).encode()
            request = m.TxnRequest()
            m.unchanged(request.compare, key, 0)
            m.put(request.success, key, self._incarnation)
            m.get(request.failure, key)
            return request

        def known(reply: Any, _sent_s: float) -> None:
            if not reply.succeeded:
                self._incarnation = reply.responses[0].response_range.kvs[0].value
            self._log.info(
                "etcd reached: no history of this service, so it is new, or was wiped"
                if reply.succeeded
                else "etcd reached: it holds this service's history",
                incarnation=self._incarnation.decode(errors="replace"),
            )
            self._guard_later()
            if self._fill_cache is not None:
                # As of now: what this process records from here on is in the cache anyway.
                self._source = self._fill_cache(reply.header.revision)
            opened()

        self._calls.until_known("Txn", make, known)

    def key(self, event: Event, token: str) -> bytes:
        """Return the key of an event's record."""
        return names.record_key(self._service, event.id)

    def is_done(self, digest: str) -> bool:
        """Return whether the cache knows this event as done."""
        return self._cache.holds(digest) and not self._calls.ended

    @property
    def halted(self) -> bool:
        """Whether etcd has turned out to be another than at the start."""
        return self._calls.ended

    def batch(self) -> Batch:
        """Return an empty batch within the settings' limits."""
        return Batch(self._settings.batch_size, self._settings.etcd_max_txn_ops)

    def why_never(self, effects: Checked) -> str | None:
        """Return why these effects fit into no transaction, or None."""
        return why_never(effects, self._settings.etcd_max_txn_ops)

    def submit(self, batch: Batch, answered: OnAnswers) -> None:
        """Commit a batch, and remember what is done."""

        def remember(answers: list[Answer]) -> None:
            for answer in answers:
                self._remember(answer)
            answered(answers)

        services = (self._calls, self._loop, self._window, self._claims)
        guard = (self._incarnation_key, self._incarnation)
        Commit(batch.asks, guard, services, remember, self._wiped).send()

    def read(self, key: bytes, found: Callable[[Record | None], None]) -> None:
        """Read a record once, for information; nothing is called where etcd does not answer."""

        def known(reply: Any, _sent_s: float) -> None:
            kvs = reply.kvs
            found(records.decode(kvs[0].value, kvs[0].mod_revision) if kvs else None)

        self._calls.once("Range", m.RangeRequest(key=key), known, lambda _error: None)

    def claim_remaining_s(self, lease: int) -> float:
        """Return for how long a claim under this lease holds at the least."""
        return self._claims.remaining_s(lease)

    def close(self) -> None:
        """Answer nothing more. Claims are left to end with their lease."""
        if self._source is not None:
            self._source.close()
        self._calls.close()

    def _remember(self, answer: Answer) -> None:
        ask, found = answer.ask, answer.found
        if answer.landed:
            if ask.kind is Kind.RECORD:
                self._cache.add(ask.digest)
        elif found is not None and found.state == DONE:
            self._cache.add(found.digest)

    def _guard_later(self) -> None:
        request = m.RangeRequest(key=self._incarnation_key)

        def known(reply: Any, _sent_s: float) -> None:
            if not reply.kvs or reply.kvs[0].value != self._incarnation:
                self._wiped()
            else:
                self._guard_later()

        self._loop.call_later(
            GUARD_EVERY_S, lambda: self._calls.until_known("Range", lambda: request, known)
        )

    def _wiped(self) -> None:
        self._cache.clear()
        self._calls.halt("wiped: its incarnation key is not the one seen at the start")
