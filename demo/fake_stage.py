"""A stage without servers, for the tests of the demo. It consumes each event at once."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import cast

from chaos.crash_points import PROOF
from demo.acts import ACTS
from demo.broker import Broker
from demo.panel import panel
from demo.play import COUNTERS, NOUNS, Play
from demo.screen import Screen
from demo.stage import SERVICES, Stage
from demo.steps import PlayFailedError, Step
from demo.watch import Watch
from servers.counters import StatsdListener


def played(play: Play | None = None, acts: str = "12345") -> tuple[Play, Watch]:
    """Play acts as the demo does, with its panel."""
    play = play or Play(FakeStage(), Screen())
    with Watch(play.stage) as watch, play.screen.watching(partial(panel, play, watch)):
        for number in acts:
            ACTS[number](play)
    return play, watch


class FakeStage(Stage):
    """Both services in memory, and their broker and counters.

    With `miscounts` each event counts twice. Without `answers` nothing can be read.
    """

    place = "Nowhere <but in memory>."
    farewell = "farewell"
    receiver_url = "receiver"

    def __init__(self, *, miscounts: bool = False) -> None:
        super().__init__(cast("Broker", self), "", cast("StatsdListener", self))
        self.answers = True
        self.written: Counter[str] = Counter()
        self._by = 2 if miscounts else 1
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._queues: dict[str, list[str]] = {service: [] for service in SERVICES}
        self._records: set[tuple[str, str]] = set()
        self._called: list[str] = []
        self._crashing = ""

    def versions(self) -> list[str]:
        raise OSError("nobody answers")

    def publish(self, *event_ids: str) -> Step:
        return Step(f"curl -i\\\n  -d'{event_ids[0]}'", partial(self._publish, event_ids))

    def run_services(self) -> Step:
        """Run both services, with an empty etcd."""
        self._records.clear()
        each = f", {self.setup.replicas} each" if self.setup.replicas > 1 else ""
        typed = f"{self._typed_settings()}up{each}"
        return Step(typed, partial(self._start, "receiver", *SERVICES))

    def crash_at(self, point: str, service: str) -> Step:
        """Let a service end when it has recorded the next event."""
        return Step(f"crash {service}", lambda: setattr(self, "_crashing", service))

    def ended(self, service: str) -> bool:
        return self.states[service] == "killed"

    def consumers(self, queue: str) -> int:
        return self.setup.replicas

    def orders(self, event_ids: Sequence[str]) -> tuple[list[int], int]:
        """Return what was written, as if by every replica."""
        return [self.written[event_id] for event_id in event_ids], self.setup.replicas

    def stop(self, service: str) -> Step:
        return Step(f"stop {service}", lambda: self.states.update({service: "stopped"}))

    def start(self, service: str) -> Step:
        return Step(f"start {service}", partial(self._start, service))

    def restart_services(self) -> Step:
        return Step("restart", partial(self._start, *SERVICES))

    def waiting(self, queue: str) -> int:
        self._answer()
        return len(self._queues.get(queue, ()))

    def count(self, name: str) -> int:
        self._answer()
        return self._counts[name]

    def gauge(self, name: str) -> int:
        """Return 1 while events are held."""
        self._answer()
        holds = name.startswith("notif") and self._holds("notify")
        return int(holds and bool(self._queues["notify"]))

    def seen(self, name: str) -> bool:
        return name in self._counts

    def wait_counted(self, counters: Sequence[str]) -> None:
        pass

    def log(self, service: str) -> str:
        """Return a line, or what the receiver was called for."""
        if service == "receiver":
            return "\n".join(self._called)
        return f"the log of {service}: {PROOF * self.ended(service)}"

    def _wait_ready(self, service: str) -> None:
        pass

    def _publish(self, event_ids: Sequence[str]) -> None:
        if "not started" in self.states.values():
            raise PlayFailedError("no queue is bound to the exchange: the event is lost", "order")
        for service in SERVICES:
            self._queues[service] += event_ids
            self._consume(service)

    def _start(self, *services: str) -> None:
        self.states.update(dict.fromkeys(services, "running"))
        for service in SERVICES:
            self._consume(service)

    def _calls(self, service: str) -> bool:
        return service == "notify" and self.setup.calls

    def _holds(self, service: str) -> bool:
        return self._calls(service) and self.states["receiver"] != "running"

    def _consume(self, service: str) -> None:
        queue = self._queues[service]
        while queue and self.states[service] == "running" and not self._holds(service):
            event_id, record = queue[0], (service, queue[0])
            is_known = self.setup.enable_etcd and record in self._records
            if not is_known:
                self.written[event_id] += service == "order"
                self._called += [event_id] * self._calls(service)
            self._records.add(record)
            if self._crashing == service:
                self._crashing, self.states[service] = "", "killed"
                return
            queue.pop(0)
            self._counts[f"{NOUNS[service]}_processed{'_skipped' * is_known}"] += self._by

    def _answer(self) -> None:
        if not self.answers:
            raise OSError("nobody answers")
