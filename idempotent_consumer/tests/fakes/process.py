"""One service process around the fakes: the real consumer and ledger, and no thread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import structlog
from structlog.testing import LogCapture

from fakes.bus import FakeBus
from fakes.etcd import FakeEtcd
from fakes.loop import ManualLoop
from fakes.store import Store
from idempotent_consumer.consumer import Consumer
from idempotent_consumer.handlers import Handler, Pool
from idempotent_consumer.health import Health
from idempotent_consumer.ledger.cache import Cache
from idempotent_consumer.ledger.ledger import EtcdLedger, Ledger
from idempotent_consumer.ledger.off import NoLedger
from idempotent_consumer.metrics import Metrics
from idempotent_consumer.settings import Settings
from idempotent_consumer.tally import Outcome, Tally

SETTINGS = Settings(enable_etcd=True)


class Counts(Metrics):
    """Metrics that stay where they are counted."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.timings: list[str] = []

    def count(self, name: str, by: int = 1) -> None:
        """Add to a counter."""
        self.counts[name] += by

    def timing(self, name: str, elapsed_s: float) -> None:
        """Note that something was timed."""
        self.timings.append(name)


class ManualPool(Pool):
    """A pool without threads: its jobs run when the test says so."""

    def __init__(self) -> None:
        super().__init__(0)
        self.jobs: list[Callable[[], None]] = []

    def run(self, job: Callable[[], None]) -> None:
        """Keep a job."""
        self.jobs.append(job)

    def work(self) -> None:
        """Run the jobs there are."""
        jobs, self.jobs = self.jobs, []
        for job in jobs:
            job()


class Process:
    """A running process of the service "order", which counts "orders".

    ``name`` stands for its random bits. Handlers are given by their event type.
    """

    def __init__(self, loop: ManualLoop, store: Store, handlers: Mapping[str, Handler],
                 name: str = "a" * 32, settings: Settings = SETTINGS,
                 cache: Cache | None = None) -> None:
        self.loop, self.store, self.name = loop, store, name
        self.etcd, self.bus = FakeEtcd(loop, store), FakeBus(loop)
        self.health, self.pool, self.metrics = Health(), ManualPool(), Counts()
        self.lines = LogCapture()
        log: Any = structlog.wrap_logger(
            None, processors=[self.lines], wrapper_class=structlog.make_filtering_bound_logger(0)
        )
        self.tally = Tally("orders", self.metrics, log)
        timeouts_s = [h.timeout_s for h in handlers.values() if h.timeout_s is not None]
        self.ledger: Ledger = NoLedger(settings, loop, log)
        if settings.enable_etcd:
            self.ledger = EtcdLedger(
                "order", name, settings, self.etcd, loop, self.health, log,
                Cache() if cache is None else cache, longest_call_s=max(timeouts_s, default=0.0),
            )
        self.consumer = Consumer("order", name, handlers, settings.retry_delays, self.ledger,
                                 self.bus, loop, self.pool, self.tally, log)
        self.bus.take, self.bus.returned = self.consumer.take, self.tally.returned

    def open(self) -> None:
        """Reach etcd and begin to consume."""
        self.ledger.open(self.bus.open)
        self.loop.run_until_idle()

    def deliver(self, *bodies: bytes, **properties: Any) -> None:
        """Let messages arrive, and do all that can be done without time passing."""
        self.bus.deliver(*bodies, **properties)
        self.loop.run_until_idle()

    def work(self) -> None:
        """Run the calls of claimed handlers, and what follows from them."""
        self.pool.work()
        self.loop.run_until_idle()

    def count(self, name: str) -> int:
        """Return one of the service's counters."""
        return self.metrics.counts[f"orders_{name}"]

    def counts(self) -> dict[str, int]:
        """Return the counters that are not zero, without the noun."""
        return {name.removeprefix("orders_"): number
                for name, number in self.metrics.counts.items() if number}

    def assert_all_counted(self) -> None:
        """Hold the contract's sum: each delivery that is not in hand ended in one counter."""
        ended = sum(self.count(outcome.value) for outcome in Outcome)
        if self.count("received") != ended + self.bus.in_hand:
            raise AssertionError(f"{self.counts()}, in hand: {self.bus.in_hand}")
