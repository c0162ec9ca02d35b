"""A ledger alone at a desk: asks go in, answers come out, over the etcd in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any

import structlog
from structlog.testing import LogCapture

from idempotent_consumer.effects import Checked, Put
from idempotent_consumer.health import Health
from idempotent_consumer.ledger.cache import Cache
from idempotent_consumer.ledger.ledger import CacheSource, EtcdLedger
from idempotent_consumer.ledger.records import Answer, Ask, Kind
from idempotent_consumer.settings import Settings
from idempotent_consumer.testing.etcd import FakeEtcd
from idempotent_consumer.testing.loop import ManualLoop
from idempotent_consumer.testing.store import Store

OTHER_DIGEST = "1:" + "e" * 32
LONGER_THAN_ANY_BACKOFF_S = 30.0


def digest_of(event_id: str) -> str:
    """Return a digest that covers an id, as each does."""
    return "1:" + sha256(event_id.encode()).hexdigest()[:32]


class Desk:
    """One process's ledger of the service "order". Several may share a store."""

    def __init__(
        self,
        loop: ManualLoop,
        store: Store,
        name: str = "a" * 32,
        *,
        settings: Settings | None = None,
        longest_call_s: float = 5.0,
        fill_cache: Callable[[int], CacheSource] | None = None,
    ) -> None:
        self.loop, self.store, self.name = loop, store, name
        self.etcd, self.health, self.cache = FakeEtcd(loop, store), Health(), Cache()
        self.lines = LogCapture()
        log: Any = structlog.wrap_logger(
            None, processors=[self.lines], wrapper_class=structlog.make_filtering_bound_logger(0)
        )
        self.ledger = EtcdLedger(
            "order",
            settings or Settings(enable_etcd=True),
            self.etcd,
            loop,
            self.health,
            log,
            self.cache,
            fill_cache,
            longest_call_s,
        )
        self.answers: list[Answer] = []
        self.opened = 0
        self._asked = 0

    def open(self) -> None:
        """Reach etcd, where it can be reached without time passing."""
        self.ledger.open(self._opened)
        self.loop.run_until_idle()

    def _opened(self) -> None:
        self.opened += 1

    def ask(
        self,
        event_id: str,
        kind: Kind = Kind.RECORD,
        *,
        expect: int = 0,
        digest: str = "",
        effects: Sequence[Put] = (),
    ) -> Ask:
        """Return an ask with a token of its own."""
        self._asked += 1
        key = f"/service/order/{event_id}".encode()
        digest = digest or digest_of(event_id)
        return Ask(
            kind, key, digest, f"{self.name}/1/{self._asked}", None, expect, Checked(effects)
        )

    def submit(self, *asks: Ask) -> None:
        """Commit asks as one batch, and do all that can be done without time passing."""
        batch = self.ledger.batch()
        for ask in asks:
            if not batch.take(ask):
                raise AssertionError(f"{ask.key!r} does not fit into the batch")
        self.ledger.submit(batch, self.answers.extend)
        self.loop.run_until_idle()

    def wait(self) -> None:
        """Let every backoff pass."""
        self.loop.advance(LONGER_THAN_ANY_BACKOFF_S)

    @property
    def answer(self) -> Answer:
        """Return the one answer there is."""
        (answer,) = self.answers
        return answer

    def has_said(self, level: str, part: str) -> bool:
        """Return whether a line of this level contains this."""
        return any(line["log_level"] == level and part in str(line) for line in self.lines.entries)
