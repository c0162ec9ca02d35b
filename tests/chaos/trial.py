"""A trial is a fault under load and the verdict on its consequences; all trials become a table."""

import time
from collections import Counter
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
from servers.checker import Verdict
from servers.services import Service
from servers.wait import eventually

RECOVERY_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Result:
    """How often a trial's fault fired, and what it did to the events.

    ``held`` counts the events that circuit breakers held when they closed.
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


def table(results: Sequence[Result]) -> str:
    """Return a line for each fault and one for all; recovery is the median and the maximum."""
    summed = [field.name for field in fields(Result)][1:-1]
    rows = [["fault", "runs", *(name.replace("_", " ") for name in summed), "recovery"]]
    for fault in [*sorted({result.fault for result in results}), "all"]:
        found = [result for result in results if fault in (result.fault, "all")]
        sums = [str(sum(getattr(result, name) for result in found)) for name in summed]
        times_s = [result.recovery_s for result in found if result.recovery_s is not None]
        recovery = f"{median(times_s):.1f} s, {max(times_s):.1f} s" if times_s else "-"
        rows.append([fault, str(len(found)), *sums, recovery])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )


class Trial:
    """Publishes to one service while a fault happens, and judges by etcd's whole history.

    Only `judge` leaves a result: a trial that ends early passes nothing.
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
        """The audit between its services and the broker, which checks each ack."""
        assert self._audit is not None, "nobody audits the acks"
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
        """Publish new events and duplicates of them throughout the block."""
        with Load(self.broker, rate_per_s, seed) as load:
            yield load
            self.finish(load)

    def finish(self, load: Load) -> None:
        """End a load, and judge its events with the trial's others."""
        self._confirmed += load.finish()
        self._sent += load.sent

    @contextmanager
    def under_load(self, rate_per_s: float = 200, **judged: Any) -> Iterator[Load]:
        """Run a fault, which begins and ends in the block, under load; then judge.

        Events are handled before the block, and again after it. ``judged`` goes to `judge`.
        """
        with self.load(rate_per_s) as load:
            self.works()
            yield load
            assert load.running
            self.recovers()
            self.works(100)
        self.judge(**judged)

    def poison(self) -> None:
        """Publish a body that is not an event: it has to be parked, whatever the fault is.

        Raises pika's errors if the broker does not take it.
        """
        body = b"not json: %d" % len(self._poison)
        self.broker.publish_raw(body)
        self._poison.add(body)

    def works(self, events: int = 20, timeout_s: float = RECOVERY_TIMEOUT_S) -> None:
        """Wait until this many more events are done."""
        passes(self.done, self.done() + events - 1, timeout_s)

    def done(self) -> int:
        return len(self.store.done(self.service))

    def fired(self, times: int = 1) -> None:
        """Count the fault: it was seen to happen."""
        self.injected += times

    def recovers(self, timeout_s: float = RECOVERY_TIMEOUT_S) -> None:
        """At the end of the fault, wait until an event that is published now is done.

        A trial's longest wait is its recovery. Raises AssertionError.
        """
        started_s = time.monotonic()
        self.probed(timeout_s)
        self.recoveries_s.append(time.monotonic() - started_s)

    def probed(self, timeout_s: float = RECOVERY_TIMEOUT_S) -> None:
        """Publish an event until the broker confirms it, and wait until it is done.

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
        """Drain the queues and judge; raises AssertionError for any fault of the service.

        ``parked`` are the ids that were taken from the dead-letter queue before.
        """
        parked = set(parked)
        self._drain(drained_within_s)
        verdict = self.rig.verdict(
            self.service, self._sent, self._confirmed, parked=parked, first_revision=first_revision
        )
        early = self._audit.early() - parked if self._audit else set[str]()
        result = self._result(verdict, len(early))
        self._results.append(result)
        assert self.injected, f"{self.fault}: the fault never happened"
        assert not self._audit or self._audit.checked, "no ack was seen"
        assert not early, f"acked before its record: {sorted(early)[:5]}"
        if lost_is_waived:
            verdict = replace(verdict, lost=frozenset())
        verdict.require(confirmed_at_least=at_least)
        return result

    def _drain(self, timeout_s: float) -> None:
        """Wait until the queues are empty, and take the dead letters: the poison, nothing else.

        A dead letter may be there twice if the service was killed, or a confirm was lost, between
        the parking and the ack.
        """
        retries = (q for q in self.broker.queues() if q.startswith(f"{self.service}.retry."))
        # An event can move from a retry queue to the service's own between two looks.
        self.rig.drained(self.service, *retries, self.service, timeout_s=timeout_s)
        dead = self.broker.drain(f"{self.service}.dead-letter")
        self.parked = Counter(message.body for message in dead)
        assert set(self.parked) == self._poison, "something else is parked"
        assert {message.headers["x-reason"] for message in dead} <= {"invalid"}

    def _result(self, verdict: Verdict, early: int) -> Result:
        closed = [line for each in self._services for line in lines(each, "breaker closed")]
        return Result(
            self.fault,
            self.injected,
            verdict.confirmed,
            held=sum(line["held"] for line in closed),
            lost=len(verdict.lost),
            double=len(verdict.double),
            acks_checked=self._audit.checked if self._audit else 0,
            unchecked=self._audit.unknown if self._audit else 0,
            early=early,
            recovery_s=max(self.recoveries_s, default=None),
        )


StartTrial = Callable[..., Trial]
"""`trial("broker killed")`, or `trial("killed in mid-call", service="notify")`."""
