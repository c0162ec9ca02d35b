"""What the page shows, worked out from observations: publications, records, logs, queue depths.

The board does no I/O and has no clock.
"""

import json
import secrets
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from demo.stage import SERVICES
from idempotent_consumer.names import dead_letter_queue, retry_queue

Kind = Literal["new", "again", "other", "invalid"]
"""A new id, the last id again with the same or with another body, an invalid event."""

READINGS = 24
"""A confirmed event is lost if it is not done and was in no queue for this many readings. They take
12 s, because RabbitMQ's counts of unacked messages may be 5 s old."""

_DRAWN, _ENDS_DRAWN = {"recorded": 28, "skipped": 12, "parked": 12}, 15
"""How many copies are drawn: the newest at rest in each state, and this many of the oldest and of
the newest under way."""


@dataclass
class Copy:
    """One service's copy of one publication, and what was last seen of it.

    The first copy of an event has its id as label; later copies add a dot and a number.
    `confirmed_at` counts readings of RabbitMQ.
    """

    label: str
    event_id: str
    kind: Kind
    confirmed_at: float = float("inf")
    state: str = "publishing"
    why: str = ""


@dataclass
class Process:
    """A container: its state as Docker has it, and what it lacks.

    `missing` is what a service's /readyz says, or why a server cannot be reached; None: no answer.
    """

    service: str
    state: str = "stopped"
    has_records: bool = True
    missing: Mapping[str, str] | None = None

    def shown(self, recorded: int) -> tuple[str, str]:
        """Return the state and the text of its card, given how many events it has recorded."""
        if self.state == "running" and self.missing:
            return "not ready", "; ".join(f"{name}: {why}" for name, why in self.missing.items())
        if self.state == "running" and self.missing is None and self.service in SERVICES:
            return "not ready", "starting"
        return self.state, f"recorded {recorded}" if recorded else ""


class Lane:
    """One service's copies, oldest first, and its numbers by their names on the page.

    `records` counts how often each id was recorded, or processed without a record. `effects` counts
    how often an order was written in etcd, or a call accepted by the receiver. `held` are the last
    readings of how many messages its queues hold.
    """

    def __init__(self) -> None:
        self.under_way: dict[str, Copy] = {}
        self.at_rest = {state: deque[Copy](maxlen=drawn) for state, drawn in _DRAWN.items()}
        self.records, self.effects, self.numbers = Counter[str](), Counter[str](), Counter[str]()
        self.held: deque[int] = deque(maxlen=READINGS)
        self.letters_seen = 0

    def find(self, event_id: str) -> Copy | None:
        """Return the copy that an observation of an id is about: the oldest under way."""
        first = self.under_way.get(event_id)
        return first or next((c for c in self.under_way.values() if c.event_id == event_id), None)

    def rest(self, copy: Copy | None, state: str, why: str) -> bool:
        """Bring a copy to rest; return whether there is one."""
        if copy:
            del self.under_way[copy.label]
            copy.state, copy.why = state, why
            self.at_rest["recorded" if state == "processed" else state].append(copy)
        return copy is not None

    def count(self, seen: Counter[str], event_id: str) -> None:
        """Count a record or an effect. Each one beyond an id's first counts as double, once."""
        before = max(1, self.records[event_id], self.effects[event_id])
        seen[event_id] += 1
        self.numbers["double"] += max(before, seen[event_id]) - before

    def record(self, event_id: str, state: str, why: str) -> None:
        """Note that an event was recorded, or processed without a record."""
        self.count(self.records, event_id)
        self.numbers["processed"] += 1
        self.rest(self.find(event_id), state, why)

    def skip(self, event_id: str, by: str) -> None:
        """Note a skipped duplicate. Its copy may be at rest already."""
        self.numbers["skipped"] += 1
        if not self.rest(self.find(event_id), "skipped", by):
            for copy in self.at_rest["recorded"]:
                if copy.event_id == event_id:
                    copy.why = f"came again and was skipped {by}"

    def drawn(self) -> list[tuple[str, str, str]]:
        """Return label, state and text of each dot, and update the numbers of what is under way."""
        copies = list(self.under_way.values())
        arrived = [copy.label for copy in copies if copy.state == "arrived"]
        # A queue is first in, first out: the newest are still in it.
        taken = arrived[: max(0, len(arrived) - self.numbers["waiting"])]
        places = dict.fromkeys(arrived, "waiting") | dict.fromkeys(taken, "in flight")
        states = Counter(copy.state for copy in copies)
        self.numbers["in flight"] = len(taken) + states["claimed"]
        self.numbers["retry"] = states["retry"]
        if len(copies) > 2 * _ENDS_DRAWN:
            copies = copies[:_ENDS_DRAWN] + copies[-_ENDS_DRAWN:]
        shown = chain(*self.at_rest.values(), copies)
        return [(copy.label, places.get(copy.label, copy.state), copy.why) for copy in shown]


class Board:
    """The observations of one round. Its labels begin with its name; others are not counted."""

    def __init__(self) -> None:
        self.processes: dict[str, Process] = {}
        self._writers: dict[str, str] = {}
        self.begin()

    def begin(self) -> None:
        """Begin a round, with the same processes."""
        self.round, self.lanes = secrets.token_hex(2), {service: Lane() for service in SERVICES}
        self._numbers, self._recorded = Counter[str](), Counter[str]()
        self._readings, self._last = 1, ""

    def publish(self, kind: Kind) -> tuple[str, bytes]:
        """Begin a publication, and return its label and body. Each service gets a copy."""
        self._numbers["published"] += 1
        number = self._numbers["published"]
        label = event_id = f"{self.round}-{number}"
        if self._last and kind in ("again", "other"):
            label, event_id = f"{self._last}.{number}", self._last
        elif kind != "invalid":
            kind, self._last = "new", label
        for lane in self.lanes.values():
            lane.under_way[label] = Copy(label, event_id, kind)
        args = {"args": {"other": number}} if kind == "other" else {}
        event = {"id": event_id, "type": "new_order", **args}
        return label, b"not an event" if kind == "invalid" else json.dumps(event).encode()

    def confirm(self, label: str) -> None:
        """Note that RabbitMQ has confirmed a publication: it must not be lost any more."""
        self._numbers["confirmed"] += self._is_current(label)
        for lane in self.lanes.values():
            if copy := lane.under_way.get(label):
                copy.confirmed_at = self._readings
                copy.state = "arrived" if copy.state == "publishing" else copy.state

    def record(self, service: str, event_id: str, state: str, token: str) -> None:
        """Note that a record was put. `state` is claimed, released, publishing or done."""
        lane, writer = self.lanes[service], self._writers.get(token.partition("/")[0], "")
        if state == "done" and self._is_current(event_id):
            lane.record(event_id, "recorded", f"by {writer}" if writer else "")
            self._recorded[writer] += 1
        elif state != "done" and (copy := lane.find(event_id)):
            copy.state = "claimed" if state == "claimed" else "arrived"

    def effect(self, service: str, event_id: str, is_repeated: bool = False) -> None:
        """Note that an order was put in etcd, or that the receiver was called.

        A repeated call has no effect: the receiver recognises its key and drops it.
        """
        if self._is_current(event_id):
            self._numbers.update(calls=service == "notify", repeated=is_repeated)
            if not is_repeated:
                self.lanes[service].count(self.lanes[service].effects, event_id)

    def line(self, name: str, line: Mapping[str, Any]) -> None:
        """Note a line in a replica's log."""
        if not (process := self.processes.get(name)):
            return
        text, event_id = str(line.get("event")), str(line.get("event_id"))
        lane, is_current = self.lanes[process.service], self._is_current(event_id)
        by, unrecorded = f"by {name}", f"by {name}, without a record"
        if text == "starting":
            process.has_records, self._writers[str(line.get("process"))] = True, name
        elif text.startswith("ENABLE_ETCD is false"):
            process.has_records = False
        elif text == "settled a batch":
            # The line has only numbers: they are about the oldest, as in the queue.
            copies = list(lane.under_way.values())
            known = [copy for copy in copies if lane.records[copy.event_id]]
            skipped = line.get("processed_skipped", 0)
            lane.numbers["skipped"] += skipped
            for copy in known[:skipped]:
                lane.rest(copy, "skipped", by)
            for copy in copies[: 0 if process.has_records else line.get("processed", 0)]:
                lane.record(copy.event_id, "processed", unrecorded)
        elif is_current and text == "processed" and not process.has_records:
            lane.record(event_id, "processed", unrecorded)
        elif is_current and text.startswith("skipped"):
            lane.skip(event_id, by)
        elif text.startswith("failed") and (failed := lane.find(event_id)):
            failed.state = "retry"
            failed.why = f"again in {line.get('again_in')}: {line.get('error')}"

    def depths(self, ready: Mapping[str, int], unacked: Mapping[str, int]) -> None:
        """Note a reading: the ready messages of each queue now, the unacked ones up to 5 s ago."""
        self._readings += 1
        for service, lane in self.lanes.items():
            letters = ready.get(dead_letter_queue(service), 0)
            lane.numbers["waiting"], lane.numbers["parked"] = ready.get(service, 0), letters
            retries = [queue for queue in ready if queue.startswith(retry_queue(service, ""))]
            held = sum(ready.get(queue, 0) + unacked.get(queue, 0) for queue in (service, *retries))
            lane.held.append(held + max(0, letters - lane.letters_seen))
            # Compare what was confirmed before all of the last readings with the most that the
            # queues held in any of them. Time without an answer of RabbitMQ does not count.
            old = [c for c in lane.under_way.values() if self._readings - c.confirmed_at > READINGS]
            done = [c for c in old if c.kind != "other" and lane.records[c.event_id]]
            lane.numbers["lost"] = max(0, len(old) - len(done) - max(lane.held))
            for copy in done if not any(lane.held) else ():
                lane.rest(copy, "skipped", "it is in no queue, and has its record")

    def park(self, service: str, label: str, why: str) -> None:
        """Note a dead letter and its reason."""
        lane = self.lanes[service]
        lane.letters_seen += lane.rest(lane.under_way.get(label), "parked", why)

    def containers(self, states: Mapping[str, str]) -> None:
        """Note the states of all containers, in the order of the page."""
        before, self.processes = self.processes, {}
        for name, state in states.items():
            process = self.processes[name] = before.get(name, Process(name.rpartition("-")[0]))
            process.state = state
            process.missing = None if state in ("stopped", "killed") else process.missing

    def answers(self, name: str, missing: Mapping[str, str] | None) -> None:
        """Note what a process lacks, or with None that it does not answer."""
        if name in self.processes:
            self.processes[name].missing = missing

    def snapshot(self) -> dict[str, Any]:
        """Return what the page draws. The numbers include how many processes are in each state."""
        dots = [(service, *dot) for service, lane in self.lanes.items() for dot in lane.drawn()]
        cards = [(name, *each.shown(self._recorded[name])) for name, each in self.processes.items()]
        numbers = self._numbers + Counter(state for _, state, _ in cards)
        for service, lane in self.lanes.items():
            for name, number in lane.numbers.items():
                numbers[name if name in ("lost", "double") else f"{service} {name}"] += number
        return {"round": self.round, "numbers": numbers, "processes": cards, "dots": dots}

    def _is_current(self, label: str) -> bool:
        return label.startswith(f"{self.round}-")
