"""What the page shows, from what was observed: publications, records, log lines, depths, processes.

Pure: it asks nobody, and has no clock.
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
"""A new id, a copy, a known id with another body, something that is not a valid event."""

READINGS = 24
"""What is confirmed, in no queue for so many readings of RabbitMQ and not done is lost. They take
12 s, for its count of unacked messages may be 5 s old."""

_DRAWN, _ENDS_DRAWN = {"recorded": 28, "skipped": 12, "parked": 12}, 15
"""Where a copy comes to rest, and how many of the newest are drawn there; of those under way as
many of the oldest as of the newest."""


@dataclass
class Copy:
    """One service's copy of one publication, and what was last seen of it.

    The label of an event's first copy is its id; what follows a dot tells later ones apart.
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
    """A container: what Docker says of it, and what is missing, as it says itself.

    `missing` is a service's /readyz, or what was met by who asks a server; None for no answer.
    """

    service: str
    state: str = "stopped"
    has_records: bool = True
    missing: Mapping[str, str] | None = None

    def shown(self, recorded: int) -> tuple[str, str]:
        """Return its state, and what is to be said of it, which has recorded so many events."""
        if self.state == "running" and self.missing:
            return "not ready", "; ".join(f"{name}: {why}" for name, why in self.missing.items())
        if self.state == "running" and self.missing is None and self.service in SERVICES:
            return "not ready", "starting"
        return self.state, f"recorded {recorded}" if recorded else ""


class Lane:
    """One service's side: its copies, oldest first, and its numbers by their names on the page.

    `records` tells how often each id was recorded, or processed without a record; `effects` how
    often its effect was seen: written in etcd, or accepted by the receiver. `held` are the last
    readings of all that its queues hold.
    """

    def __init__(self) -> None:
        self.under_way: dict[str, Copy] = {}
        self.at_rest = {state: deque[Copy](maxlen=drawn) for state, drawn in _DRAWN.items()}
        self.records, self.effects, self.numbers = Counter[str](), Counter[str](), Counter[str]()
        self.held: deque[int] = deque(maxlen=READINGS)
        self.letters_seen = 0

    def find(self, event_id: str) -> Copy | None:
        """Return the copy of an id that something said of it is about: the oldest under way."""
        first = self.under_way.get(event_id)
        return first or next((c for c in self.under_way.values() if c.event_id == event_id), None)

    def rest(self, copy: Copy | None, state: str, why: str) -> bool:
        """End a copy's way, if there is one."""
        if copy:
            del self.under_way[copy.label]
            copy.state, copy.why = state, why
            self.at_rest["recorded" if state == "processed" else state].append(copy)
        return copy is not None

    def count(self, seen: Counter[str], event_id: str) -> None:
        """Count a record or an effect; an id is double once for each that is one too many."""
        before = max(1, self.records[event_id], self.effects[event_id])
        seen[event_id] += 1
        self.numbers["double"] += max(before, seen[event_id]) - before

    def record(self, event_id: str, state: str, why: str) -> None:
        """Take note that an event was recorded, or processed without a record."""
        self.count(self.records, event_id)
        self.numbers["processed"] += 1
        self.rest(self.find(event_id), state, why)

    def skip(self, event_id: str, by: str) -> None:
        """Take note of a skipped duplicate; it may be of a copy that is at rest."""
        self.numbers["skipped"] += 1
        if not self.rest(self.find(event_id), "skipped", by):
            for copy in self.at_rest["recorded"]:
                if copy.event_id == event_id:
                    copy.why = f"came again and was skipped {by}"

    def drawn(self) -> list[tuple[str, str, str]]:
        """Return labels, states, and what to say of each; count what is under way by its state."""
        copies = list(self.under_way.values())
        arrived = [copy.label for copy in copies if copy.state == "arrived"]
        # First in, first out: those in the queue are the newest.
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
    """All observations of one round. Its labels begin with its name; others are not counted."""

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
        """Begin a publication, of which each service is to get a copy: its label and its body."""
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
        """Take note that RabbitMQ has confirmed it: from now on it must not be lost."""
        self._numbers["confirmed"] += self._is_current(label)
        for lane in self.lanes.values():
            if copy := lane.under_way.get(label):
                copy.confirmed_at = self._readings
                copy.state = "arrived" if copy.state == "publishing" else copy.state

    def record(self, service: str, event_id: str, state: str, token: str) -> None:
        """Take note of a record that was put: claimed, released, publishing or done."""
        lane, writer = self.lanes[service], self._writers.get(token.partition("/")[0], "")
        if state == "done" and self._is_current(event_id):
            lane.record(event_id, "recorded", f"by {writer}" if writer else "")
            self._recorded[writer] += 1
        elif state != "done" and (copy := lane.find(event_id)):
            copy.state = "claimed" if state == "claimed" else "arrived"

    def effect(self, service: str, event_id: str, is_repeated: bool = False) -> None:
        """Take note that an order was put in etcd, or that the receiver was called.

        A repeated call does not count as an effect: the receiver has dropped it, by its key.
        """
        if self._is_current(event_id):
            self._numbers.update(calls=service == "notify", repeated=is_repeated)
            if not is_repeated:
                self.lanes[service].count(self.lanes[service].effects, event_id)

    def line(self, name: str, line: Mapping[str, Any]) -> None:
        """Take note of a line in a replica's log."""
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
            # It tells only numbers: the oldest, as in the queue.
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
        """Take note of a reading: what each queue holds ready now, and unacked at most 5 s ago."""
        self._readings += 1
        for service, lane in self.lanes.items():
            letters = ready.get(dead_letter_queue(service), 0)
            lane.numbers["waiting"], lane.numbers["parked"] = ready.get(service, 0), letters
            retries = [queue for queue in ready if queue.startswith(retry_queue(service, ""))]
            held = sum(ready.get(queue, 0) + unacked.get(queue, 0) for queue in (service, *retries))
            lane.held.append(held + max(0, letters - lane.letters_seen))
            # What was confirmed before all of the last readings is compared with the most that the
            # queues held in one of them. Neither grows older while RabbitMQ does not answer.
            old = [c for c in lane.under_way.values() if self._readings - c.confirmed_at > READINGS]
            done = [c for c in old if c.kind != "other" and lane.records[c.event_id]]
            lane.numbers["lost"] = max(0, len(old) - len(done) - max(lane.held))
            for copy in done if not any(lane.held) else ():
                lane.rest(copy, "skipped", "it is in no queue, and has its record")

    def park(self, service: str, label: str, why: str) -> None:
        """Take note of a dead letter, and of its reason."""
        lane = self.lanes[service]
        lane.letters_seen += lane.rest(lane.under_way.get(label), "parked", why)

    def containers(self, states: Mapping[str, str]) -> None:
        """Take note of all containers there are, in their order, with their states."""
        before, self.processes = self.processes, {}
        for name, state in states.items():
            process = self.processes[name] = before.get(name, Process(name.rpartition("-")[0]))
            process.state = state
            process.missing = None if state in ("stopped", "killed") else process.missing

    def answers(self, name: str, missing: Mapping[str, str] | None) -> None:
        """Take note of what a process lacks; None for no answer."""
        if name in self.processes:
            self.processes[name].missing = missing

    def snapshot(self) -> dict[str, Any]:
        """Return what the page draws, as JSON has it; the numbers tell how many run, too."""
        dots = [(service, *dot) for service, lane in self.lanes.items() for dot in lane.drawn()]
        cards = [(name, *each.shown(self._recorded[name])) for name, each in self.processes.items()]
        numbers = self._numbers + Counter(state for _, state, _ in cards)
        for service, lane in self.lanes.items():
            for name, number in lane.numbers.items():
                numbers[name if name in ("lost", "double") else f"{service} {name}"] += number
        return {"round": self.round, "numbers": numbers, "processes": cards, "dots": dots}

    def _is_current(self, label: str) -> bool:
        return label.startswith(f"{self.round}-")
