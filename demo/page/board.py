"""What the page shows, from what was observed: publications, records, log lines, depths, processes.

Pure: it asks nobody, and has no clock of its own. Each time `now_s` is one of `time.monotonic`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from demo.stage import SERVICES

Kind = Literal["new", "again", "other", "invalid"]
"""A new id, a copy, a known id with another body, something that is not a valid event."""

SETTLES_WITHIN_S = 12.0
"""What is confirmed, in no queue for so long and not done is lost. RabbitMQ's count of unacked
messages may be 5 s old."""

_DOTS, _PARKED_DOTS = 30, 10
_WITHOUT_MEMORY = "ENABLE_ETCD is false"


@dataclass
class Copy:
    """One service's copy of one publication, which has a label of its own.

    The state is the last that was seen; "arrived" is in the queue or with a replica.
    """

    label: str
    event_id: str
    kind: Kind
    confirmed_s: float | None = None
    state: str = "publishing"
    why: str = ""
    rests: bool = False

    def becomes(self, state: str, why: str = "", *, rests: bool = False) -> None:
        """Take a state; one that rests has had its end."""
        self.state, self.why, self.rests = state, why, rests


@dataclass
class Process:
    """A container: what Docker says of it, and what it says of itself."""

    name: str
    service: str
    state: str = "stopped"
    why: str = ""
    recorded: int = 0
    remembers: bool = True
    """Whether its service runs with records in etcd."""
    missing: dict[str, str] | None = None
    """What it lacks, as a service's /readyz says, and who asks a server; None for no answer."""

    def shown(self) -> dict[str, object]:
        """Return it as a card: its state, and why where it is not well."""
        state, why = self.state, self.why
        if state == "running" and self.missing is None:
            why = "starting" if self.service in SERVICES else why
        elif state == "running" and self.missing:
            why = "; ".join(f"{name}: {reason}" for name, reason in self.missing.items())
        return {
            "name": self.name,
            "service": self.service,
            "state": "not ready" if state == "running" and why else state,
            "why": why,
            "recorded": self.recorded,
        }


@dataclass
class Lane:
    """One service's side: the copies under way, the newest to draw, and what was counted."""

    copies: dict[str, Copy] = field(default_factory=dict)
    """Those that have not come to rest, and the newest; by label, oldest first."""
    by_id: dict[str, list[Copy]] = field(default_factory=dict)
    times: Counter[str] = field(default_factory=Counter)
    """How often each id was recorded, or processed without a record."""
    outside: Counter[str] = field(default_factory=Counter)
    """How often its effect was seen: written in etcd, or accepted by the receiver."""
    parked: dict[str, Copy] = field(default_factory=dict)
    skipped: int = 0
    ready: int = 0
    depths: deque[tuple[float, int]] = field(default_factory=deque)
    """When, and how much all of its queues held: ready, unacked, retries, and unread dead
    letters."""
    dead_letters: int = 0
    lost: int = 0

    @property
    def double(self) -> int:
        """How often an id had its effect once more than it should."""
        return sum(most - 1 for most in (self.times | self.outside).values() if most > 1)

    def under_way(self) -> list[Copy]:
        """Return the confirmed copies that have not come to rest, oldest first."""
        return [
            copy for copy in self.copies.values() if not copy.rests and copy.confirmed_s is not None
        ]

    def of(self, event_id: str) -> Copy | None:
        """Return the copy of an id that something said of it is about: the oldest under way."""
        found = self.by_id.get(event_id, [])
        return next((copy for copy in found if not copy.rests), found[-1] if found else None)

    def knows(self, event_id: str) -> bool:
        """Return whether the id is one of this round."""
        return event_id in self.by_id or event_id in self.times

    def add(self, copy: Copy) -> None:
        """Begin with a copy."""
        self.copies[copy.label] = copy
        self.by_id.setdefault(copy.event_id, []).append(copy)

    def forget(self) -> None:
        """Drop what is at rest and too old to be drawn."""
        old = [
            copy
            for copy in list(self.copies.values())[:-_DOTS]
            if copy.rests and copy.confirmed_s is not None
        ]
        for copy in old:
            del self.copies[copy.label]
            same = self.by_id[copy.event_id]
            same.remove(copy)
            if not same:
                del self.by_id[copy.event_id]


class Board:
    """All observations of one round, from a reset to the next."""

    def __init__(self) -> None:
        self.lanes = {service: Lane() for service in SERVICES}
        self.processes: dict[str, Process] = {}
        self.published = self.confirmed = self.repeated_calls = self.calls = 0
        self._writers: dict[str, str] = {}

    # The producer.

    def sent(self, label: str, event_id: str, kind: Kind) -> None:
        """Take note that a publication has begun: each service is to get a copy."""
        self.published += 1
        for lane in self.lanes.values():
            lane.add(Copy(label, event_id, kind))

    def confirm(self, label: str, now_s: float) -> None:
        """Take note that RabbitMQ has confirmed it: from now on it must not be lost."""
        self.confirmed += label in self.lanes["order"].copies
        for lane in self.lanes.values():
            copy = lane.copies.get(label)
            if copy is not None:
                copy.confirmed_s = now_s
                if copy.state == "publishing":
                    copy.state = "arrived"

    # etcd.

    def record(self, service: str, event_id: str, state: str, token: str) -> None:
        """Take note of a record that was put: claimed, released, publishing or done."""
        lane = self.lanes[service]
        if not lane.knows(event_id):
            return
        copy = lane.of(event_id)
        if state == "done":
            lane.times[event_id] += 1
            writer = self._writers.get(token.partition("/")[0], "")
            if writer in self.processes:
                self.processes[writer].recorded += 1
            if copy is not None and not copy.rests:
                copy.becomes("recorded", f"by {writer}" if writer else "", rests=True)
        elif copy is not None and not copy.rests:
            copy.becomes("claimed" if state == "claimed" else "arrived")

    def effect(self, event_id: str) -> None:
        """Take note that an order was put."""
        if self.lanes["order"].knows(event_id):
            self.lanes["order"].outside[event_id] += 1

    # The receiver.

    def called(self, event_id: str, *, again: bool) -> None:
        """Take note of a call that was accepted; `again`: dropped, since its key was known."""
        lane = self.lanes["notify"]
        if lane.knows(event_id):
            self.calls += 1
            self.repeated_calls += again
            lane.outside[event_id] += not again

    # The services' logs.

    def line(self, name: str, line: Mapping[str, Any]) -> None:
        """Take note of a line in a replica's log."""
        process = self.processes.get(name)
        if process is None or process.service not in SERVICES:
            return
        text, lane = str(line.get("event", "")), self.lanes[process.service]
        if text == "starting":
            process.remembers = True
            self._writers[str(line.get("process"))] = name
        elif text.startswith(_WITHOUT_MEMORY):
            process.remembers = False
        elif text == "settled a batch":
            self._batch(process, lane, line)
        elif "event_id" in line:
            self._single(process, lane, text, line)

    def _single(self, process: Process, lane: Lane, text: str, line: Mapping[str, Any]) -> None:
        event_id, error = str(line["event_id"]), str(line.get("error", ""))
        copy = lane.of(event_id)
        if copy is None:
            return
        if text == "processed" and not process.remembers:
            lane.times[event_id] += 1
            copy.becomes("processed", f"by {process.name}, without a record", rests=True)
        elif text.startswith("skipped"):
            lane.skipped += 1
            came = "came again and was skipped" if copy.rests else f"by {process.name}"
            copy.becomes(copy.state if copy.rests else "skipped", came, rests=True)
        elif text.startswith("failed") and not copy.rests:
            copy.becomes("retry", f"again in {line.get('again_in')}: {error}")

    def _batch(self, process: Process, lane: Lane, line: Mapping[str, Any]) -> None:
        """Rest what a line tells only the number of: the oldest first, as in the queue."""
        skipped = int(line.get("processed_skipped", 0))
        lane.skipped += skipped
        known = [copy for copy in lane.under_way() if lane.times[copy.event_id]]
        for copy in known[:skipped]:
            copy.becomes("skipped", f"by {process.name}", rests=True)
        if not process.remembers:
            for copy in lane.under_way()[: int(line.get("processed", 0))]:
                lane.times[copy.event_id] += 1
                copy.becomes("processed", f"by {process.name}, without a record", rests=True)

    # RabbitMQ.

    def depths(self, ready: Mapping[str, int], unacked: Mapping[str, int], now_s: float) -> None:
        """Take note of what each queue holds: ready now, unacked at most 5 s ago."""
        for service, lane in self.lanes.items():
            lane.ready = ready.get(service, 0)
            lane.dead_letters = ready.get(f"{service}.dead-letter", 0)
            held = sum(
                ready[queue] + unacked.get(queue, 0)
                for queue in ready
                if queue == service or queue.startswith(f"{service}.retry.")
            )
            unread = max(0, lane.dead_letters - len(lane.parked))
            lane.depths.append((now_s, held + unread))
            self._judge(lane, now_s)

    def park(self, service: str, label: str, reason: str, error: str) -> None:
        """Take note of a dead letter, and of its reason."""
        lane = self.lanes[service]
        copy = lane.copies.get(label)
        if copy is not None and label not in lane.parked:
            copy.becomes("parked", f"{reason}: {error}", rests=True)
            lane.parked[label] = copy

    def _judge(self, lane: Lane, now_s: float) -> None:
        """Count what should be in a queue and is not.

        What is under way and older than the window is compared with the most that the queues
        held in that window. The gap while RabbitMQ did not answer makes the window begin again.
        """
        depths = lane.depths
        if len(depths) > 1 and depths[-1][0] - depths[-2][0] > SETTLES_WITHIN_S / 4:
            lane.depths = depths = deque([depths[-1]])
        while len(depths) > 1 and depths[1][0] <= now_s - SETTLES_WITHIN_S:
            depths.popleft()
        if now_s - depths[0][0] < SETTLES_WITHIN_S:
            return
        most = max(held for _, held in depths)
        old = [copy for copy in lane.under_way() if _since(copy, now_s) > SETTLES_WITHIN_S]
        done = [copy for copy in old if copy.kind in ("new", "again") and lane.times[copy.event_id]]
        if not most:
            for copy in done:
                copy.becomes("skipped", "it is in no queue, and has its record", rests=True)
        lane.lost = max(0, len(old) - len(done) - most)

    # The processes.

    def containers(self, seen: Iterable[tuple[str, str, str, str]]) -> None:
        """Take note of all containers there are: name, service, state, and why."""
        before, self.processes = self.processes, {}
        for name, service, state, why in sorted(seen, key=_order):
            process = before.get(name, Process(name, service))
            if state in ("stopped", "killed"):
                process.missing = None
            process.state, process.why = state, why
            self.processes[name] = process

    def ready(self, name: str, missing: dict[str, str] | None) -> None:
        """Take note of what a process lacks; None for no answer."""
        if name in self.processes:
            self.processes[name].missing = missing

    # What comes of it.

    def next_round(self) -> Board:
        """Return an empty board for the same processes."""
        board = Board()
        board.processes, board._writers = self.processes, self._writers
        for process in board.processes.values():
            process.recorded = 0
        return board

    def snapshot(self) -> dict[str, Any]:
        """Return what the page draws, as JSON has it."""
        for lane in self.lanes.values():
            lane.forget()
        return {
            "lost": sum(lane.lost for lane in self.lanes.values()),
            "double": sum(lane.double for lane in self.lanes.values()),
            "published": self.published,
            "confirmed": self.confirmed,
            "calls": self.calls,
            "repeated": self.repeated_calls,
            "processes": [process.shown() for process in self.processes.values()],
            "lanes": {service: _drawn(lane) for service, lane in self.lanes.items()},
        }


def _drawn(lane: Lane) -> dict[str, Any]:
    under_way = lane.under_way()
    retry = sum(copy.state == "retry" for copy in under_way)
    arrived = [copy for copy in under_way if copy.state in ("arrived", "claimed")]
    # The queue is first in, first out: those that it still holds are the newest.
    in_flight = {copy.label for copy in arrived[: max(0, len(arrived) - lane.ready)]}
    newest = list(lane.copies.values())[-_DOTS:]
    older = [copy for copy in list(lane.parked.values())[-_PARKED_DOTS:] if copy not in newest]
    return {
        "waiting": lane.ready,
        "in_flight": len(in_flight),
        "retry": retry,
        "processed": sum(lane.times.values()),
        "skipped": lane.skipped,
        "parked": lane.dead_letters,
        "lost": lane.lost,
        "double": lane.double,
        "dots": [
            [copy.label, copy.event_id, _place(copy, in_flight), copy.why]
            for copy in older + newest
        ],
    }


def _place(copy: Copy, in_flight: set[str]) -> str:
    if copy.state == "arrived":
        return "in flight" if copy.label in in_flight else "waiting"
    return copy.state


def _since(copy: Copy, now_s: float) -> float:
    return now_s - (now_s if copy.confirmed_s is None else copy.confirmed_s)


_FIRST = ("rabbitmq", "etcd", "receiver", *SERVICES)


def _order(seen: tuple[str, str, str, str]) -> tuple[int, int]:
    name, service, *_ = seen
    return _FIRST.index(service), int(name.rpartition("-")[2])
