"""The ends of an event: each delivery of it is acked, sent to a retry queue, or parked."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

from . import names
from .bus.bus import Bus
from .bus.delivery import Delivery
from .event import Event
from .ledger.ledger import Ledger
from .tally import Outcome, Tally
from .task import Task


class Settler:
    """Does what has been decided, and counts it once it is done.

    A delivery that is sent on is acked when the broker has confirmed it, and not at all once
    etcd has turned out to be another. ``acked`` is called when one more can be acked.
    """

    def __init__(
        self,
        service: str,
        retry_delays: Sequence[tuple[str, int]],
        ledger: Ledger,
        bus: Bus,
        tally: Tally,
        acked: Callable[[], None],
    ) -> None:
        self._service, self._retry_delays = service, retry_delays
        self._ledger, self._bus, self._tally, self._acked = ledger, bus, tally, acked

    def recorded(self, task: Task, ours: bool) -> None:
        """Ack an event that is recorded: at most one delivery did it, the others repeat it."""
        outcome = Outcome.PROCESSED if ours else Outcome.SKIPPED
        for delivery in task.deliveries:
            if self.settle(delivery, outcome, task.event):
                outcome = Outcome.SKIPPED

    def conflicted(self, task: Task) -> None:
        """Park an event whose id was recorded with another body."""
        for delivery in task.deliveries:
            self._park(
                delivery,
                Outcome.CONFLICTED,
                names.CONFLICT,
                f"{task.event.id!r:.200} was used before with another body",
                task.event,
            )

    def failed(self, task: Task) -> None:
        """Publish a retry of each delivery, or park what has had its retries.

        What was not even called, as its process ends, has no error: it goes back with its channel.
        """
        if not task.error:
            return
        for delivery in task.deliveries:
            attempt = delivery.attempts + 1
            headers: dict[str, object] = {names.ATTEMPTS_HEADER: attempt}
            if attempt > len(self._retry_delays):
                self._park(delivery, Outcome.FAILED, names.FAILED, task.error, task.event, headers)
                continue
            delay, _ = self._retry_delays[attempt - 1]
            about = {**task.event.about, "error": task.error, "attempt": attempt, "again_in": delay}
            headers[names.ERROR_HEADER] = task.error
            self._forward(
                delivery, names.retry_queue(self._service, delay), headers, Outcome.RETRIED, about
            )

    def invalid(self, delivery: Delivery, error: str) -> None:
        """Park what is no event."""
        self._park(delivery, Outcome.INVALID, names.INVALID, error)

    def settle(self, delivery: Delivery, outcome: Outcome, event: Event) -> bool:
        """Have a delivery acked; False where it has gone back to the broker already."""
        live = delivery.settle()
        if live:
            self._tally.settled(outcome, event)
        return live

    def _park(
        self,
        delivery: Delivery,
        outcome: Outcome,
        reason: str,
        error: str,
        event: Event | None = None,
        headers: Mapping[str, object] | None = None,
    ) -> None:
        now = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds")
        whole: dict[str, object] = {
            names.REASON_HEADER: reason,
            names.ERROR_HEADER: error,
            names.PARKED_AT_HEADER: now,
            **(headers or {}),
        }
        about: dict[str, object] = {
            **(event.about if event else {}),
            "reason": reason,
            "error": error,
        }
        self._forward(delivery, names.dead_letter_queue(self._service), whole, outcome, about)

    def _forward(
        self,
        delivery: Delivery,
        queue: str,
        headers: dict[str, object],
        outcome: Outcome,
        about: dict[str, object],
    ) -> None:
        def confirmed() -> None:
            if not self._ledger.halted and delivery.settle():
                self._tally.settled(outcome, about)
            self._acked()

        self._bus.forward(delivery, queue, headers, confirmed)
