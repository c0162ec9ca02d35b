"""How an event ends: each delivery of it is acked, sent to a retry queue, or parked."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from . import names
from .bus import Delivery, Intake
from .calls import Handler, Returned
from .event import Event
from .ledger import Ledger
from .metrics import Outcome, Tally
from .publisher import Publisher, forwarded_message
from .records import UNREADABLE
from .system import System

_USED_BEFORE = "was used before with another body"


class Settler:
    """Does to deliveries what has been decided, and counts them once it is done.

    A delivery that is sent on is acked when the broker has confirmed it, and not at all once etcd
    has turned out to be another.
    """

    def __init__(
        self,
        service: str,
        retry_delays: Sequence[tuple[str, int]],
        ledger: Ledger,
        intake: Intake,
        publisher: Publisher,
        system: System,
        tally: Tally,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._service, self._retry_delays = service, retry_delays
        self._ledger, self._intake, self._publisher = ledger, intake, publisher
        self._system, self._tally, self._tasks = system, tally, tasks
        self.forwarding = 0
        """How many deliveries are being sent on."""

    def ack(self, delivery: Delivery, outcome: Outcome, event: Event) -> bool:
        """Have a delivery acked; False where it has gone back to the broker already."""
        live = delivery.settle()
        if live:
            self._tally.settled(outcome, event)
        return live

    def recorded(self, deliveries: Sequence[Delivery], event: Event, ours: bool) -> None:
        """Ack an event that is recorded: at most one delivery did it, the others repeat it."""
        outcome = Outcome.PROCESSED if ours else Outcome.SKIPPED
        for delivery in deliveries:
            if self.ack(delivery, outcome, event):
                outcome = Outcome.SKIPPED

    def conflicted(self, deliveries: Sequence[Delivery], event: Event, recorded: str) -> None:
        """Park an event whose id was recorded with another body, which has this digest."""
        why = "has a record that cannot be read" if recorded == UNREADABLE else _USED_BEFORE
        error = f"{event.id!r:.200} {why}"
        for delivery in deliveries:
            self._park(delivery, Outcome.CONFLICTED, names.CONFLICT, error, event)

    def retry_or_park(
        self, deliveries: Sequence[Delivery], event: Event, handler: Handler, failed: Returned
    ) -> None:
        """Publish a retry of each delivery, or park what is rejected or has had its retries."""
        delays = self._retry_delays if handler.retry_delays is None else handler.retry_delays
        error = failed.error
        for delivery in deliveries:
            if failed.rejected:
                self._park(delivery, Outcome.REJECTED, names.REJECTED, error, event)
                continue
            attempt = delivery.attempts + 1
            headers: dict[str, object] = {names.ATTEMPTS_HEADER: attempt}
            if attempt > len(delays):
                self._park(delivery, Outcome.FAILED, names.FAILED, error, event, headers)
                continue
            delay, _ = delays[attempt - 1]
            if failed.after_s:
                by_time = sorted(delays, key=lambda each: each[1])
                long_enough = [each for each in by_time if each[1] >= failed.after_s]
                delay, _ = (long_enough or by_time[-1:])[0]
            about: dict[str, object] = {
                **event.about,
                "error": error,
                "attempt": attempt,
                "again_in": delay,
            }
            headers[names.ERROR_HEADER] = error
            queue = names.retry_queue(self._service, delay)
            self._forward(delivery, queue, headers, Outcome.RETRIED, about)

    def postpone(self, delivery: Delivery, event: Event) -> None:
        """Publish a retry that counts as no attempt, for a replica that has a handler."""
        delay, _ = self._retry_delays[-1]
        error = "another replica has begun it, and this one has no handler for its type"
        about: dict[str, object] = {**event.about, "error": error, "again_in": delay}
        headers: dict[str, object] = {names.ATTEMPTS_HEADER: delivery.attempts}
        queue = names.retry_queue(self._service, delay)
        self._forward(delivery, queue, headers, Outcome.RETRIED, about)

    def invalid(self, delivery: Delivery, error: str) -> None:
        """Park what is no event."""
        self._park(delivery, Outcome.INVALID, names.INVALID, error)

    def _park(
        self,
        delivery: Delivery,
        outcome: Outcome,
        reason: str,
        error: str,
        event: Event | None = None,
        headers: Mapping[str, object] | None = None,
    ) -> None:
        now = datetime.fromtimestamp(self._system.now_s(), UTC).isoformat(timespec="seconds")
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
        """Send a delivery's message on to a queue, and have it acked once that is confirmed."""
        sent = self._publisher.send(forwarded_message(delivery, queue, headers))

        async def ack_when_confirmed() -> None:
            confirmed = await sent
            self.forwarding -= 1
            if confirmed and not self._ledger.halted and delivery.settle():
                self._tally.settled(outcome, about)
                self._intake.flush()
                self._tally.flush()

        self.forwarding += 1
        self._tasks.create_task(ack_when_confirmed())
