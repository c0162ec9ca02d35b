"""What the page shows, from what was observed: publications, records, log lines, depths, processes.

Pure: it asks nobody, and has no clock.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from demo.stage import SERVICES
from idempotent_consumer.names import dead_letter_queue, retry_queue

Kind = Literal["new", "again", "other", "invalid"]
"""A new id, a copy, a known id with another body, something that is not a valid event."""

READINGS = 24
"""What is confirmed, in no queue for so many readings of RabbitMQ and not done is lost. They take
12 s, for its count of unacked messages may be 5 s old."""

_DRAWN = {"recorded": 28, "skipped": 12, "parked": 12}
"""Where a copy comes to rest, and how many of the newest are drawn there."""

_ENDS_DRAWN = 15
"""So many of the newest under way are drawn, and of the oldest."""


@dataclass
class Copy:
    """One service's copy of one publication, and what was last seen of it.

    The label of an event's first copy is its id; what follows a dot tells later ones apart.
    `confirmed_at` counts readings of RabbitMQ, and is 0 before its confirm.
    """

    label: str
    kind: Kind
    confirmed_at: int = 0
    state: str = "publishing"
    why: str = ""

    @property
    def event_id(self) -> str:  # noqa: D102
        return self.label.partition(".")[0]


@dataclass
class Process:
    """A container: what Docker says of it, and what is missing, as it says itself.

    `missing` is a service's /readyz, or what was met by who asks a server; None for no answer.
    """

    service: str
    state: str = "stopped"
    recorded: int = 0
    has_records: bool = True
    missing: Mapping[str, str] | None = None

    def shown(self) -> tuple[str, str]:
        """Return its state, and what is to be said of it."""
        if self.state == "running" and self.missing:
            return "not ready", "; ".join(f"{name}: {why}" for name, why in self.missing.items())
        if self.state == "running" and self.missing is None and self.service in SERVICES:
            return "not ready", "starting"
        return self.state, f"recorded {self.recorded}" if self.recorded else ""


class Lane:
    """One service's side: its copies, oldest first, and what was counted.

    `records` tells how often each id was recorded, or processed without a record; `effects` how
    often its effect was seen: written in etcd, or accepted by the receiver. `held` are the last
    readings of all that its queues hold.
    """

    def __init__(self) -> None:
        self.under_way: dict[str, Copy] = {}
        self.at_rest = {state: deque[Copy](maxlen=drawn) for state, drawn in _DRAWN.items()}
        self.records, self.effects = Counter[str](), Counter[str]()
        self.parked: set[str] = set()
        self.skipped = self.double = self.lost = self.ready = self.dead_letters = 0
        self.held: deque[int] = deque(maxlen=READINGS)

    def confirmed(self) -> list[Copy]:
        """Return the confirmed copies that have not come to rest."""
        return [copy for copy in self.under_way.values() if copy.confirmed_at]

    def find(self, event_id: str) -> Copy | None:
        """Return the copy of an id that something said of it is about: the oldest under way."""
        first = self.under_way.get(event_id)
        return first or next((c for c in self.under_way.values() if c.event_id == event_id), None)

    def rest(self, copy: Copy, state: str, why: str) -> None:
        """End a copy's way."""
        del self.under_way[copy.label]
        copy.state, copy.why = state, why
        self.at_rest["recorded" if state == "processed" else state].append(copy)

    def count(self, seen: Counter[str], event_id: str) -> None:
        """Count a record or an effect; an id is double once for each that is one too many."""
        before = max(1, self.records[event_id], self.effects[event_id])
        seen[event_id] += 1
        self.double += max(before, seen[event_id]) - before

    def record(self, event_id: str, state: str, why: str) -> None:
        """Take note that an event was recorded, or processed without a record."""
        self.count(self.records, event_id)
        if copy := self.find(event_id):
            self.rest(copy, state, why)

    def skip(self, event_id: str, why: str) -> None:
        """Take note of a skipped duplicate; it may be of a copy that is at rest."""
        self.skipped += 1
        if copy := self.find(event_id):
            self.rest(copy, "skipped", why)
            return
        for copy in self.at_rest["recorded"]:
            if copy.event_id == event_id:
                copy.why = f"came again and was skipped {why}"

    def lose(self, readings: int) -> None:
        """Count what should be in a queue and is not.

        What was confirmed before all of the last readings is compared with the most that the
        queues held in one of them. Neither grows older while RabbitMQ does not answer.
        """
        old = [copy for copy in self.confirmed() if readings - copy.confirmed_at > READINGS]
        done = [copy for copy in old if copy.kind != "other" and self.records[copy.event_id]]
        self.lost = max(0, len(old) - len(done) - max(self.held))
        for copy in done if not any(self.held) else ():
            self.rest(copy, "skipped", "it is in no queue, and has its record")

    def shown(self) -> tuple[dict[str, int], list[tuple[str, str, str]]]:
        """Return what was counted, and what is drawn: labels, states, and what to say of each."""
        arrived = [copy for copy in self.confirmed() if copy.state == "arrived"]
        # First in, first out: those in the queue are the newest.
        in_flight = {copy.label for copy in arrived[: max(0, len(arrived) - self.ready)]}
        ends = copies = list(self.under_way.values())
        if len(copies) > 2 * _ENDS_DRAWN:
            ends = copies[:_ENDS_DRAWN] + copies[-_ENDS_DRAWN:]
        dots = []
        for copy in (copy for some in (*self.at_rest.values(), ends) for copy in some):
            place = "in flight" if copy.label in in_flight else "waiting"
            dots.append((copy.label, place if copy.state == "arrived" else copy.state, copy.why))
        numbers = {
            "waiting": self.ready,
            "in flight": len(in_flight) + sum(copy.state == "claimed" for copy in copies),
            "processed": self.records.total(),
            "skipped": self.skipped,
            "retry": sum(copy.state == "retry" for copy in copies),
            "parked": self.dead_letters,
        }
        return numbers, dots


class Board:
    """All observations of one round. Its labels begin with its name; others are not counted."""

    def __init__(self) -> None:
        self.processes: dict[str, Process] = {}
        self._writers: dict[str, str] = {}
        self.begin()

    def begin(self) -> None:
        """Begin a round, with the same processes."""
        self.round, self.lanes = secrets.token_hex(2), {service: Lane() for service in SERVICES}
        self.published = self.confirmed = self.calls = self.repeated = 0
        self._readings, self._last = 1, ""
        for process in self.processes.values():
            process.recorded = 0

    def publish(self, kind: Kind) -> tuple[str, bytes]:
        """Begin a publication, of which each service is to get a copy: its label and its body."""
        if not self._last and kind in ("again", "other"):
            kind = "new"
        self.published += 1
        label = f"{self.round}-{self.published}"
        if kind in ("again", "other"):
            label = f"{self._last}.{self.published}"
        self._last = label if kind == "new" else self._last
        for lane in self.lanes.values():
            lane.under_way[label] = Copy(label, kind)
        event: dict[str, object] = {"id": label.partition(".")[0], "type": "new_order"}
        if kind == "other":
            event["args"] = {"other": self.published}
        return label, b"not an event" if kind == "invalid" else json.dumps(event).encode()

    def confirm(self, label: str) -> None:
        """Take note that RabbitMQ has confirmed it: from now on it must not be lost."""
        self.confirmed += self._is_current(label)
        for lane in self.lanes.values():
            if copy := lane.under_way.get(label):
                copy.confirmed_at = self._readings
                copy.state = "arrived" if copy.state == "publishing" else copy.state

    def record(self, service: str, event_id: str, state: str, token: str) -> None:
        """Take note of a record that was put: claimed, released, publishing or done."""
        lane, writer = self.lanes[service], self._writers.get(token.partition("/")[0], "")
        if state == "done" and self._is_current(event_id):
            lane.record(event_id, "recorded", f"by {writer}" if writer else "")
            if writer in self.processes:
                self.processes[writer].recorded += 1
        elif state != "done" and (copy := lane.find(event_id)):
            copy.state = "claimed" if state == "claimed" else "arrived"

    def effect(self, service: str, event_id: str) -> None:
        """Take note that an order was put in etcd, or that the receiver accepted a call."""
        if self._is_current(event_id):
            self.lanes[service].count(self.lanes[service].effects, event_id)
            self.calls += service == "notify"

    def repeat(self, event_id: str) -> None:
        """Take note that the receiver dropped a repeated call, by its key."""
        self.calls += self._is_current(event_id)
        self.repeated += self._is_current(event_id)

    def line(self, name: str, line: Mapping[str, Any]) -> None:
        """Take note of a line in a replica's log."""
        process = self.processes.get(name)
        if process is None:
            return
        text, event_id = str(line.get("event")), str(line.get("event_id"))
        lane = self.lanes[process.service]
        by, unrecorded = f"by {name}", f"by {name}, without a record"
        if text == "starting":
            process.has_records, self._writers[str(line.get("process"))] = True, name
        elif text.startswith("ENABLE_ETCD is false"):
            process.has_records = False
        elif text == "settled a batch":
            # It tells only numbers: the oldest, as in the queue.
            known = [copy for copy in lane.confirmed() if lane.records[copy.event_id]]
            lane.skipped += line.get("processed_skipped", 0)
            for each in known[: line.get("processed_skipped", 0)]:
                lane.rest(each, "skipped", by)
            for each in lane.confirmed()[: 0 if process.has_records else line.get("processed", 0)]:
                lane.record(each.event_id, "processed", unrecorded)
        elif self._is_current(event_id) and text == "processed" and not process.has_records:
            lane.record(event_id, "processed", unrecorded)
        elif self._is_current(event_id) and text.startswith("skipped"):
            lane.skip(event_id, by)
        elif text.startswith("failed") and (copy := lane.find(event_id)):
            copy.state, copy.why = "retry", f"again in {line.get('again_in')}: {line.get('error')}"

    def depths(self, ready: Mapping[str, int], unacked: Mapping[str, int]) -> None:
        """Take note of a reading: what each queue holds ready now, and unacked at most 5 s ago."""
        self._readings += 1
        for service, lane in self.lanes.items():
            lane.ready = ready.get(service, 0)
            lane.dead_letters = ready.get(dead_letter_queue(service), 0)
            retries = [queue for queue in ready if queue.startswith(retry_queue(service, ""))]
            held = sum(ready.get(queue, 0) + unacked.get(queue, 0) for queue in (service, *retries))
            lane.held.append(held + max(0, lane.dead_letters - len(lane.parked)))
            lane.lose(self._readings)

    def park(self, service: str, label: str, why: str) -> None:
        """Take note of a dead letter, and of its reason."""
        lane = self.lanes[service]
        if copy := lane.under_way.get(label):
            lane.parked.add(label)
            lane.rest(copy, "parked", why)

    def containers(self, seen: Iterable[tuple[str, str, str]]) -> None:
        """Take note of all containers there are, in their order: name, service, and state."""
        before, self.processes = self.processes, {}
        for name, service, state in seen:
            process = self.processes[name] = before.get(name, Process(service))
            process.state = state
            if state in ("stopped", "killed"):
                process.missing = None

    def answers(self, name: str, missing: Mapping[str, str] | None) -> None:
        """Take note of what a process lacks; None for no answer."""
        if name in self.processes:
            self.processes[name].missing = missing

    def snapshot(self) -> dict[str, Any]:
        """Return what the page draws, as JSON has it; the numbers tell how many run, too."""
        lanes = {service: lane.shown() for service, lane in self.lanes.items()}
        cards = [(name, *process.shown()) for name, process in self.processes.items()]
        numbers = {
            "lost": sum(lane.lost for lane in self.lanes.values()),
            "double": sum(lane.double for lane in self.lanes.values()),
            "published": self.published,
            "confirmed": self.confirmed,
            "calls": self.calls,
            "repeated": self.repeated,
            **Counter(state for _, state, _ in cards),
        }
        for service, (of_lane, _) in lanes.items():
            numbers |= {f"{service} {name}": number for name, number in of_lane.items()}
        dots = {service: drawn for service, (_, drawn) in lanes.items()}
        return {"round": self.round, "numbers": numbers, "processes": cards, "dots": dots}

    def _is_current(self, label: str) -> bool:
        return label.startswith(f"{self.round}-")
