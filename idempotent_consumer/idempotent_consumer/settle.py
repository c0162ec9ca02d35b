"""How an event ends: each delivery of it is acked, sent to a retry queue, or parked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from . import names
from .bus import Delivery
from .calls import Handler, Returned, in_full
from .event import NOTHING, Event
from .metrics import Outcome
from .publisher import forwarded_message
from .records import UNREADABLE

if TYPE_CHECKING:
    from .service import Running

_USED_BEFORE = "was used before with another body"
_REASONS = {
    Outcome.CONFLICTED: names.CONFLICT,
    Outcome.INVALID: names.INVALID,
    Outcome.REJECTED: names.REJECTED,
    Outcome.FAILED: names.FAILED,
}

_Members = dict[str, object]
"""A message's headers, or the members of its log line."""


class Settler:
    """Acks, retries or parks deliveries, and counts them once that is done.

    A delivery that is sent on is acked once the broker has confirmed its copy, unless etcd has
    turned out not to be the same meanwhile.
    """

    def __init__(self, run: Running) -> None:
        self._service, self._retry_delays = run.service.name, run.settings.retry_delays
        self._ledger, self._intake, self._publisher = run.ledger, run.intake, run.publisher
        self._system, self._tally, self._tasks = run.system, run.tally, run.tasks
        self.forwarding = 0
        """How many deliveries are being sent on."""

    def ack(self, delivery: Delivery, outcome: Outcome, event: Event) -> bool:
        """Have a delivery acked; False if it has gone back to the broker already."""
        live = delivery.settle()
        if live:
            self._tally.settled(outcome, event)
        return live

    def recorded(self, deliveries: Sequence[Delivery], event: Event, ours: bool) -> None:
        """Ack a recorded event's deliveries: all but one at most are duplicates."""
        outcome = Outcome.PROCESSED if ours else Outcome.SKIPPED
        for delivery in deliveries:
            if self.ack(delivery, outcome, event):
                outcome = Outcome.SKIPPED

    def conflicted(self, deliveries: Sequence[Delivery], event: Event, recorded: str) -> None:
        """Park deliveries whose id is recorded with another body, which has this digest."""
        why = "has a record that cannot be read" if recorded == UNREADABLE else _USED_BEFORE
        for delivery in deliveries:
            self._park(delivery, Outcome.CONFLICTED, f"{event.id!r:.200} {why}", event.about)

    def invalid(self, delivery: Delivery, error: str) -> None:
        """Park a message that is no valid event."""
        self._park(delivery, Outcome.INVALID, error, {})

    def retry_or_park(
        self, deliveries: Sequence[Delivery], event: Event, handler: Handler, failed: Returned
    ) -> None:
        """Retry each delivery, or park it if it is rejected or has had its retries."""
        delays = self._retry_delays if handler.retry_delays is None else handler.retry_delays
        error = failed.error
        for delivery in deliveries:
            if failed.outcome is not Outcome.FAILED:
                self._park(delivery, failed.outcome, error, event.about)
                continue
            attempt = delivery.attempts + 1
            headers: _Members = {names.ATTEMPTS_HEADER: attempt, names.ERROR_HEADER: error}
            about: _Members = {**event.about}
            if attempt == 1 and failed.raised is not None:
                about["exc_info"] = failed.raised
            if attempt > len(delays):
                self._park(delivery, Outcome.FAILED, error, about, headers)
            else:
                delay, seconds = delays[attempt - 1]
                if failed.after_s > seconds:
                    by_time = sorted(delays, key=lambda each: each[1])
                    long_enough = [each for each in by_time if each[1] >= failed.after_s]
                    delay, _ = (long_enough or by_time[-1:])[0]
                about |= {"error": error, "attempt": attempt}
                self._retry(delivery, delay, headers, about)

    def postpone(self, delivery: Delivery, event: Event) -> None:
        """Send an event back later, for a replica that has a handler for it."""
        error = "another replica has begun it, and this one has no handler for its type"
        self._hold(delivery, {**event.about, "error": error})

    def undecoded(self, delivery: Delivery, raised: BaseException) -> None:
        """Send a message back later if the service's decoder fails: a new version may decode it."""
        error = f"decode raised {in_full(raised)}: only InvalidEvent parks a message"
        self._hold(delivery, {"error": error, "exc_info": raised})

    def _hold(self, delivery: Delivery, about: _Members) -> None:
        """Publish a retry that does not count as an attempt."""
        delay, _ = max(self._retry_delays, key=lambda each: each[1])
        self._retry(delivery, delay, {names.ATTEMPTS_HEADER: delivery.attempts}, about)

    def _retry(self, delivery: Delivery, delay: str, headers: _Members, about: _Members) -> None:
        queue, about = names.retry_queue(self._service, delay), {**about, "again_in": delay}
        self._forward(delivery, queue, headers, Outcome.RETRIED, about)

    def _park(
        self,
        delivery: Delivery,
        outcome: Outcome,
        error: str,
        about: Mapping[str, object],
        more_headers: Mapping[str, object] = NOTHING,
    ) -> None:
        now, reason = datetime.fromtimestamp(self._system.now_s(), UTC), _REASONS[outcome]
        headers = {
            names.REASON_HEADER: reason,
            names.ERROR_HEADER: error,
            names.PARKED_AT_HEADER: now.isoformat(timespec="seconds"),
            **more_headers,
        }
        queue = names.dead_letter_queue(self._service)
        about = {**about, "reason": reason, "error": error}
        self._forward(delivery, queue, headers, outcome, about)

    def _forward(
        self, delivery: Delivery, queue: str, headers: _Members, outcome: Outcome, about: _Members
    ) -> None:
        """Publish a copy of a delivery's message to a queue, and ack it once that is confirmed."""
        sent = self._publisher.send(forwarded_message(delivery, queue, headers))

        async def ack_when_confirmed() -> None:
            confirmed = await sent
            self.forwarding -= 1
            if confirmed and not self._ledger.halted and delivery.settle():
                self._tally.flush()  # In one line with many others, its error would be missing.
                self._tally.settled(outcome, about)
                self._intake.flush()
                self._tally.flush()

        self.forwarding += 1
        self._tasks.create_task(ack_when_confirmed())
