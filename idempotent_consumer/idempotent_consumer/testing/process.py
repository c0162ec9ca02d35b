"""One service process around the fakes: the real consumer and ledger, and no thread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import structlog
from structlog.testing import LogCapture

from ..consumer import Consumer
from ..handlers import Handler, Pool
from ..health import Health
from ..ledger.cache import Cache
from ..ledger.ledger import EtcdLedger, Ledger
from ..ledger.off import NoLedger
from ..loop import Loop
from ..metrics import Metrics
from ..settings import Settings
from ..tally import Outcome, Tally
from .bus import FakeBus
from .etcd import FakeEtcd
from .loop import ManualLoop
from .store import Store

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
    """A running process of a service. Handlers are given by their event type.

    ``name`` stands for its random bits. ``own_loop`` is what it is given as its loop, where that
    is not the loop of the servers too.
    """

    def __init__(
        self,
        loop: ManualLoop,
        store: Store,
        handlers: Mapping[str, Handler],
        name: str = "a" * 32,
        settings: Settings = SETTINGS,
        cache: Cache | None = None,
        *,
        service: str = "order",
        noun: str = "orders",
        bus: FakeBus | None = None,
        own_loop: Loop | None = None,
    ) -> None:
        self.loop, self.store, self.name = loop, store, name
        self._noun, its_loop = noun, own_loop or loop
        self.etcd, self.bus = FakeEtcd(loop, store), bus or FakeBus(loop)
        self.health, self.pool, self.metrics = Health(), ManualPool(), Counts()
        self.lines = LogCapture()
        log: Any = structlog.wrap_logger(
            None, processors=[self.lines], wrapper_class=structlog.make_filtering_bound_logger(0)
        )
        self.tally = Tally(noun, self.metrics, log)
        timeouts_s = [h.timeout_s for h in handlers.values() if h.timeout_s is not None]
        self.ledger: Ledger = NoLedger(settings, its_loop, log)
        if settings.enable_etcd:
            self.ledger = EtcdLedger(
                service,
                settings,
                self.etcd,
                its_loop,
                self.health,
                log,
                Cache() if cache is None else cache,
                longest_call_s=max(timeouts_s, default=0.0),
            )
        self.consumer = Consumer(
            service,
            name,
            handlers,
            settings.retry_delays,
            self.ledger,
            self.bus,
            its_loop,
            self.pool,
            self.tally,
            log,
        )
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
        return self.metrics.counts[f"{self._noun}_{name}"]

    def counts(self) -> dict[str, int]:
        """Return the counters that are not zero, without the noun."""
        return {
            name.removeprefix(f"{self._noun}_"): number
            for name, number in self.metrics.counts.items()
            if number
        }

    def assert_all_counted(self) -> None:
        """Hold the contract's sum: each delivery that is not in hand ended in one counter."""
        ended = sum(self.count(outcome.value) for outcome in Outcome)
        if self.count("received") != ended + self.bus.in_hand:
            raise AssertionError(f"{self.counts()}, in hand: {self.bus.in_hand}")
