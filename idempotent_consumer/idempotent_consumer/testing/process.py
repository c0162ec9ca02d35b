"""One process of a service in memory: the library's own code, on a simulated clock."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import Executor
from random import Random
from typing import Any

import structlog
from structlog.testing import LogCapture

from ..metrics import Metrics, Outcome
from ..service import Running, Service
from ..settings import Settings
from ..system import System
from .broker import FakeBroker
from .etcd import FakeEtcd
from .loop import Loop, Threads

SETTINGS = Settings(enable_etcd=True)


def captured(lines: Any) -> Any:
    """Return a logger that sends lines of every level to a processor, such as a LogCapture."""
    return structlog.wrap_logger(
        None, processors=[lines], wrapper_class=structlog.make_filtering_bound_logger(0)
    )


class Counts(Metrics):
    """Metrics that are kept, and sent nowhere."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.timings: defaultdict[str, list[float]] = defaultdict(list)
        self.gauges: dict[str, int] = {}

    def count(self, name: str, by: int = 1) -> None:
        self.counts[name] += by

    def timing(self, name: str, elapsed_s: float) -> None:
        self.timings[name].append(elapsed_s)

    def gauge(self, name: str, value: int) -> None:
        self.gauges[name] = value

    def send(self) -> None:
        """Send nothing."""


class Process(Loop):
    """A process that runs a service on an etcd and a RabbitMQ in memory. It is its event loop.

    It is on the broker's agenda. It starts with its next step, and reads the service's handlers
    only then. Without a ``log`` its lines are captured in ``lines``. ``bounds`` are as for
    ``Running``, which becomes ``running``.
    """

    running: Running

    def __init__(
        self,
        service: Service,
        broker: FakeBroker,
        etcd: FakeEtcd,
        settings: Settings = SETTINGS,
        *,
        random: Random,
        clock_s: float = 0.0,
        threads: Callable[[int], Executor] = Threads,
        log: Any = None,
        elapsed_s: Callable[[], float] | None = None,
        **bounds: int,
    ) -> None:
        super().__init__(broker.agenda, clock_s)
        self.service, self.broker, self.etcd = service, broker, etcd
        self.metrics, self.lines = Counts(), LogCapture()
        system = System(
            broker.connect, etcd.open_channel, broker.agenda.time, random, threads, elapsed_s
        )
        log = captured(self.lines) if log is None else log

        async def run() -> None:
            self.running = Running(service, settings, system, self.metrics, log, **bounds)
            await self.running.run()

        self.task = self.create_task(run())
        self.task.add_done_callback(self._ended)

    def deliver(self, *bodies: bytes, properties: Any = None) -> None:
        """Publish messages to the service's queue, and run what is due now."""
        for body in bodies:
            self.broker.publish("", self.service.name, body, properties)
        self.run_until_idle()

    def stop(self) -> None:
        """Stop it as SIGTERM does."""
        self.call_soon(lambda: self.running.stop("SIGTERM"))

    def count(self, name: str) -> int:
        return self.metrics.counts[f"{self.service.noun}_{name}"]

    def counts(self) -> dict[str, int]:
        """Return the counters that are not zero, without the noun."""
        prefix = f"{self.service.noun}_"
        counted = self.metrics.counts.items()
        return {name.removeprefix(prefix): number for name, number in counted if number}

    def miscounted(self) -> str:
        """Return why the counters do not add up, or an empty string.

        Between two steps each delivery is in flight, or in exactly one of the outcomes' counters.
        """
        if not hasattr(self, "running"):
            return ""
        arrived, received = self.broker.arrived[self], self.count("received")
        ended = sum(self.count(outcome.value) for outcome in Outcome)
        in_hand, held = self.running.intake.in_hand, self.running.consumer.held
        if arrived == ended + in_hand and received <= arrived:
            return ""
        counts = f"arrived {arrived}, received {received}, ended {ended}, in flight {in_hand}"
        return f"{counts} (events held: {held})"

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if self.alive and (defect := self.running.defect_of(context)) is not None:
            self.on_defect(defect)

    def _ended(self, task: Any) -> None:
        if not task.cancelled() and task.exception() is not None:
            self.on_defect(task.exception())
