"""A replica's ledger alone, on the etcd in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from hashlib import sha256
from random import Random
from typing import Any, Self

from structlog.testing import LogCapture

from idempotent_consumer.cache import Cache
from idempotent_consumer.event import Event, Publish, Put, check_effects
from idempotent_consumer.health import Health
from idempotent_consumer.ledger import EtcdLedger
from idempotent_consumer.records import Answer, Ask, Kind, Record, decode
from idempotent_consumer.settings import Settings
from idempotent_consumer.system import System
from idempotent_consumer.testing.etcd import FakeEtcd, Store
from idempotent_consumer.testing.loop import Loop, Threads
from idempotent_consumer.testing.process import SETTINGS, captured

OTHER_DIGEST = "1:" + "e" * 32
LONGER_THAN_ANY_BACKOFF_S = 30.0
NOW_S = 1_800_000_000.0


def digest_of(event_id: str) -> str:
    """Return a digest that depends on the id, as every digest does."""
    return "1:" + sha256(event_id.encode()).hexdigest()[:32]


def system_of(etcd: FakeEtcd, seed: str = "") -> System:
    """Return the system of a process that reaches this etcd, and no broker."""

    def no_broker(*_: object, **__: object) -> None:
        raise ConnectionError("there is no broker here")

    return System(
        no_broker, etcd.open_channel, lambda: NOW_S + etcd.agenda.now_s, Random(seed), Threads
    )


class Replica:
    """One process's ledger of the service "order", alone or ``beside`` another on its etcd."""

    def __init__(
        self,
        beside: Replica | None = None,
        process: str = "a" * 32,
        *,
        settings: Settings = SETTINGS,
        longest_call_s: float = 5.0,
    ) -> None:
        self.process = process
        self.loop: Loop = beside.loop if beside else Loop()
        self.store: Store = (
            beside.store if beside else Store(self.loop.time, settings.etcd_max_txn_ops)
        )
        self.etcd, self.health = FakeEtcd(self.loop.agenda, self.store), Health()
        self.lines = LogCapture()
        self.answers: list[Answer] = []
        self._asked = 0
        self._tasks = asyncio.TaskGroup()
        self.ledger = EtcdLedger(
            "order",
            settings,
            system_of(self.etcd, process),
            self.health,
            captured(self.lines),
            Cache(),
            longest_call_s,
            self._tasks,
            self.loop.time,
        )
        self._running: Any = None

    def open(self) -> Self:
        """Open the ledger, as far as that needs no time to pass."""
        self._running = self.loop.create_task(self._run())
        self._running.add_done_callback(lambda run: run.cancelled() or run.result())
        self.loop.run_until_idle()
        return self

    def ask(
        self,
        event_id: str,
        kind: Kind = Kind.RECORD,
        *,
        expect: bytes | None = None,
        digest: str = "",
        effects: Sequence[Put | Publish] = (),
    ) -> Ask:
        """Return an ask with a token of its own."""
        self._asked += 1
        key = f"/service/order/{event_id}".encode()
        digest = digest or digest_of(event_id)
        token = f"{self.process}/1/{self._asked}"
        checked = check_effects(effects, "order", Event(event_id, "new_order", {}))
        return Ask(kind, key, digest, token, None, expect, checked)

    def commit(self, *asks: Ask) -> list[Answer]:
        """Commit asks as one batch; return the answers that need no time to pass."""
        answered = len(self.answers)
        batch = self.ledger.batch()
        for ask in asks:
            if not batch.take(ask):
                raise AssertionError(f"{ask.key!r} does not fit into the batch")
        for together in batch.commits:
            self._tasks.create_task(self._commit(together))
        self.loop.run_until_idle()
        return self.answers[answered:]

    def record(self, event_id: str = "1") -> Record:
        return decode(self.store.get(f"/service/order/{event_id}").value)

    def wait(self) -> None:
        self.loop.advance(LONGER_THAN_ANY_BACKOFF_S)

    def has_logged(self, level: str, part: str) -> bool:
        """Return whether a line of this level contains this."""
        return any(line["log_level"] == level and part in str(line) for line in self.lines.entries)

    async def _run(self) -> None:
        async with self._tasks:
            await self.ledger.open()

    async def _commit(self, asks: Sequence[Ask]) -> None:
        """Commit until every ask has an answer, as a consumer does."""
        while asks:
            answers, asks = await self.ledger.commit(asks)
            self.answers += answers
