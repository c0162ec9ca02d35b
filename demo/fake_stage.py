"""A stage without servers, for the tests of the demo: it counts at once what it is sent."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import cast

from chaos.crash_points import PROOF
from demo.broker import Broker
from demo.play import COUNTERS
from demo.stage import SERVICES, Stage, Step, StepFailedError
from servers.counters import StatsdListener

NOUNS = {"order": "orders", "notify": "notifications"}


class FakeStage(Stage):
    """Both services in memory. With `miscounts` each event counts twice, as a faulty one would."""

    place = "Nowhere <but in memory>."

    def __init__(self, *, miscounts: bool = False) -> None:
        super().__init__(cast("Broker", self), "", cast("StatsdListener", self))
        self.typed: list[str] = []
        self.answers = True
        self.written: Counter[str] = Counter()
        self._by = 2 if miscounts else 1
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._queues: dict[str, list[str]] = {service: [] for service in SERVICES}
        self._records: set[tuple[str, str]] | None = None
        self._calls, self._crashing = False, ""
        self._called: list[str] = []

    def versions(self) -> list[str]:
        """Raise OSError: it has none."""
        raise OSError("nobody answers")

    def publish(self, event_id: str) -> Step:
        """Put it into both queues."""
        return self._step(f"curl -i\\\n  -d'{event_id}'", lambda: self._publish(event_id))

    def run_services(self, *, enable_etcd: bool, calls: bool, replicas: int) -> Step:
        """Run both; with etcd it begins empty."""

        def run() -> None:
            self._records, self._calls = set() if enable_etcd else None, calls
            self._replicas = replicas
            self._start(*["receiver"] * calls, *SERVICES)

        typed = f"ENABLE_ETCD={str(enable_etcd).lower()} {'NOTIFY_URL=receiver ' * calls}up"
        return self._step(typed + f", {replicas} each" * (replicas > 1), run)

    def crash_at(self, point: str, service: str) -> Step:
        """Let it end at the next event that it records."""
        return self._step(f"crash {service}", lambda: setattr(self, "_crashing", service))

    def ended(self, service: str) -> bool:
        """Return whether it was killed."""
        return self.states[service] == "killed"

    def consumers(self, queue: str) -> int:
        """Return how many replicas run."""
        return self._replicas

    def orders(self, event_ids: Sequence[str]) -> tuple[list[int], int]:
        """Return what has been written, as if by every replica."""
        return [self.written[event_id] for event_id in event_ids], self._replicas

    def stop(self, service: str) -> Step:
        """Stop it."""
        return self._step(f"stop {service}", lambda: self.states.update({service: "stopped"}))

    def start(self, service: str) -> Step:
        """Start it, and let it consume."""
        return self._step(f"start {service}", lambda: self._start(service))

    def restart_services(self) -> Step:
        """Let them consume again; records stay."""
        return self._step("restart", lambda: self._start(*SERVICES))

    def waiting(self, queue: str) -> int:
        """Return how many are in the queue; raises OSError."""
        self._answer()
        return len(self._queues.get(queue, ()))

    def count(self, name: str) -> int:
        """Return the sum; raises OSError."""
        self._answer()
        return self._counts[name]

    def gauge(self, name: str) -> int:
        """Return 1 while events are held; raises OSError."""
        self._answer()
        return int(self._holds("notify") and bool(self._queues["notify"]))

    def seen(self, name: str) -> bool:
        """Return whether it is one of the counters."""
        return name in self._counts

    def wait_counted(self, counters: Sequence[str]) -> None:
        """Return at once."""

    def log(self, service: str) -> str:
        """Return a line, or what the receiver was called for."""
        if service == "receiver":
            return "\n".join(self._called)
        return f"the log of {service}: {PROOF * self.ended(service)}"

    def farewell(self) -> str:
        """Return a word."""
        return "farewell"

    def _wait_ready(self, service: str) -> None:
        pass

    def _step(self, typed: str, run: Callable[[], None]) -> Step:
        def noted() -> None:
            self.typed.append(typed)
            run()

        return Step(typed, noted)

    def _publish(self, event_id: str) -> None:
        if "not started" in self.states.values():
            raise StepFailedError("no queue is bound to the exchange: the event is lost", "order")
        for service in SERVICES:
            self._queues[service].append(event_id)
            self._consume(service)

    def _start(self, *services: str) -> None:
        for service in services:
            self.states[service] = "running"
        for service in SERVICES:
            self._consume(service)

    def _holds(self, service: str) -> bool:
        return service == "notify" and self._calls and self.states["receiver"] != "running"

    def _consume(self, service: str) -> None:
        runs = self.states[service] == "running" and not self._holds(service)
        while runs and self._queues[service]:
            event_id = self._queues[service][0]
            if service == "notify" and self._calls:
                self._called.append(event_id)
            record = (service, event_id)
            known = self._records is not None and record in self._records
            if service == "order" and self._records is not None and not known:
                self.written[event_id] += 1
            if self._crashing == service and self._records is not None:
                self._records.add(record)
                self._crashing, self.states[service] = "", "killed"
                return
            self._queues[service].pop(0)
            self._counts[f"{NOUNS[service]}_processed{'_skipped' * known}"] += self._by
            if self._records is not None:
                self._records.add(record)

    def _answer(self) -> None:
        if not self.answers:
            raise OSError("nobody answers")
