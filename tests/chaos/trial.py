"""One trial: a fault under load, and the verdict on what came of it. All of them as a table."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import count
from statistics import median
from typing import Any

from chaos.acks import AckAudit
from chaos.checks import lines, passes
from chaos.load import Load, order
from chaos.rig import Rig
from servers.broker import Event
from servers.services import Service
from servers.wait import eventually

RECOVERY_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Result:
    """What one trial has shown: how often its fault fired, and what it did to the events.

    ``held`` are those that circuit breakers held when they closed.
    """

    fault: str
    injected: int
    confirmed: int
    held: int
    lost: int
    double: int
    acks_checked: int
    unchecked: int
    early: int
    recovery_s: float | None


_SUMS = [field.name for field in fields(Result)][1:-1]


def table(results: Sequence[Result]) -> str:
    """Return a line for each fault and one for all; recovery is the median and the greatest."""
    by_fault: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_fault[result.fault].append(result)
    rows = [_row(fault, found) for fault, found in [*sorted(by_fault.items()), ("all", results)]]
    columns = (name.replace("_", " ") for name in _SUMS)
    return aligned([("fault", "runs", *columns, "recovery"), *rows])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines with columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )


def _row(fault: str, results: Sequence[Result]) -> tuple[str, ...]:
    sums = (sum(getattr(result, name) for result in results) for name in _SUMS)
    recoveries = [r.recovery_s for r in results if r.recovery_s is not None]
    recovery = f"{median(recoveries):.1f} s, {max(recoveries):.1f} s" if recoveries else "-"
    return (fault, str(len(results)), *map(str, sums), recovery)


class Trial:
    """Publishes to one service while a fault happens, and judges by etcd's whole history.

    A trial that is not judged to its end leaves no result, so nothing passes by being cut short.
    """

    def __init__(
        self,
        fault: str,
        service: str,
        rig: Rig,
        results: list[Result],
        audit: AckAudit | None = None,
    ) -> None:
        self.fault, self.service, self.rig = fault, service, rig
        self.servers, self.statsd = rig.servers, rig.statsd
        self.broker, self.store = rig.broker, rig.store
        self.injected = 0
        self.recoveries_s: list[float] = []
        self.parked = Counter[bytes]()
        """The bodies that `judge` has found parked."""
        self._results, self._audit = results, audit
        self._sent: list[Event] = []
        self._confirmed: list[Event] = []
        self._poison: set[bytes] = set()
        self._services: list[Service] = []
        self._probes = count()

    @property
    def acks(self) -> AckAudit:
        """What stands between its services and the broker, and has looked at each ack."""
        assert self._audit is not None, "nobody looks at the acks"
        return self._audit

    def start(self, **options: Any) -> Service:
        """Start the service as the fixture `start_service` does, with its acks audited."""
        settings = {"RABBITMQ_URL": self.acks.url, **options}
        self._services.append(self.rig.start(self.service, **settings))
        return self._services[-1]

    @property
    def sent(self) -> int:
        return len(self._sent)

    def publish(self, events: list[Event], timeout_s: float = 120.0) -> list[Event]:
        """Publish events, wait for their confirms, and return the confirmed ones."""
        self._sent += events
        confirmed = self.broker.publish(events, timeout_s=timeout_s)
        self._confirmed += confirmed
        return confirmed

    @contextmanager
    def load(self, rate_per_s: float = 200, seed: int = 1) -> Iterator[Load]:
        """Publish new events and duplicates of them all through the block."""
        with Load(self.broker, rate_per_s, seed) as load:
            yield load
            self.finish(load)

    def finish(self, load: Load) -> None:
        """End a load and take its events for this trial's."""
        self._confirmed += load.finish()
        self._sent += load.sent

    @contextmanager
    def under_load(self, rate_per_s: float = 200, **judged: Any) -> Iterator[Load]:
        """Let a fault begin and end in the block, under load; see work go on after it, and judge.

        Events are done before it too. What is ``judged`` by goes to `judge`.
        """
        with self.load(rate_per_s) as load:
            self.works()
            yield load
            assert load.running
            self.recovers()
            self.works(100)
        self.judge(**judged)

    def poison(self) -> None:
        """Publish a body that is not an event: it is parked, whatever happens meanwhile.

        Raises pika's errors where the broker does not take it.
        """
        body = b"not json: %d" % len(self._poison)
        self.broker.publish_raw(body)
        self._poison.add(body)

    def works(self, events: int = 20, timeout_s: float = RECOVERY_TIMEOUT_S) -> None:
        """Wait until so many more events are done than are now."""
        passes(self.done, self.done() + events - 1, timeout_s)

    def done(self) -> int:
        return len(self.store.done(self.service))

    def fired(self, times: int = 1) -> None:
        """Say that the fault was seen to happen, so many times."""
        self.injected += times

    def recovers(self, timeout_s: float = RECOVERY_TIMEOUT_S) -> None:
        """Wait, from the fault's end (now) on, until an event published from now on is done.

        The longest of a trial is its recovery. Raises AssertionError.
        """
        started_s = time.monotonic()
        self.probed(timeout_s)
        self.recoveries_s.append(time.monotonic() - started_s)

    def probed(self, timeout_s: float = RECOVERY_TIMEOUT_S) -> None:
        """Publish an event, again where the broker does not confirm it, and wait until it is done.

        Raises AssertionError.
        """
        until_s = time.monotonic() + timeout_s
        probe = order(f"probe-{next(self._probes)}")

        def done() -> None:
            assert self.store.is_done(self.service, probe["id"]), "no event is done"

        while not self.publish([probe], timeout_s):
            assert time.monotonic() < until_s, "the broker confirms nothing"
        eventually(done, until_s - time.monotonic(), also=(OSError,))

    def judge(
        self,
        *,
        at_least: int = 100,
        parked: Iterable[str] = (),
        lost_is_waived: bool = False,
        first_revision: int | None = None,
        drained_within_s: float = 60.0,
    ) -> Result:
        """Drain, retries too, and judge; raises AssertionError on any fault of the service.

        ``parked`` are the ids taken from the dead-letter queue, which must hold nothing but all of
        the poison by now. A second copy of that is none of the service's faults where it was
        killed, or a confirm was lost, between the parking and the ack.
        """
        retries = (q for q in self.broker.queues() if q.startswith(f"{self.service}.retry."))
        # An event may pass from a queue of retries to the service's own between two looks.
        queues = (self.service, *retries, self.service)
        self.rig.drained(*queues, timeout_s=drained_within_s)
        dead = self.broker.drain(f"{self.service}.dead-letter")
        self.parked = Counter(message.body for message in dead)
        assert set(self.parked) == self._poison, "something else is parked"
        assert {message.headers["x-reason"] for message in dead} <= {"invalid"}
        parked, audit = set(parked), self._audit
        verdict = self.rig.verdict(
            self.service, self._sent, self._confirmed, parked=parked, first_revision=first_revision
        )
        early = audit.early() - parked if audit else set()
        closed = [line for each in self._services for line in lines(each, "breaker closed")]
        result = Result(
            self.fault,
            self.injected,
            verdict.confirmed,
            sum(line["held"] for line in closed),
            len(verdict.lost),
            len(verdict.double),
            audit.checked if audit else 0,
            audit.unknown if audit else 0,
            len(early),
            max(self.recoveries_s, default=None),
        )
        self._results.append(result)
        assert self.injected, f"{self.fault}: the fault never happened"
        assert audit is None or audit.checked, "no ack was seen"
        assert not early, f"acked before its record: {sorted(early)[:5]}"
        if lost_is_waived:
            verdict = replace(verdict, lost=frozenset())
        verdict.require(confirmed_at_least=at_least)
        return result


StartTrial = Callable[..., Trial]
"""`trial("broker killed")`, or `trial("killed in mid-call", service="notify")`."""
