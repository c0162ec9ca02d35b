"""The loop: from a delivery's arrival to its being settled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from structlog.typing import FilteringBoundLogger

from .bus.bus import Bus
from .bus.delivery import Delivery
from .caller import Caller
from .duplicates import DuplicateAges
from .effects import NO_EFFECTS, Checked
from .event import InvalidEvent, decode
from .handlers import Handler, Pool, Returned, run_handler
from .ledger.ledger import Ledger
from .ledger.records import CLAIMED, DONE, PUBLISHING, RELEASED, Answer, Ask, Kind, Record
from .loop import Loop
from .pipeline import Pipeline
from .settler import Settler
from .tally import Outcome, Tally
from .task import Task

ACK_ALL_EVERY_S = 0.25
SLOW_HANDLER_S = 1.0
WAITS_BEFORE_WARNING = 60
WAITS_FOR_ITS_EVENTS = 10
"""So often, over about 4 s, a record whose events another process publishes is left to that one:
it hardly ever takes so long, and else a duplicate that comes meanwhile would publish them again."""


class Consumer:
    """Decodes, handles, has recorded and settles what arrives, all on the loop's thread."""

    def __init__(
        self,
        service: str,
        process: str,
        handlers: Mapping[str, Handler],
        retry_delays: tuple[tuple[str, int], ...],
        ledger: Ledger,
        bus: Bus,
        loop: Loop,
        pool: Pool,
        tally: Tally,
        log: FilteringBoundLogger,
    ) -> None:
        self._service, self._own_tokens, self._handlers = service, f"{process}/", handlers
        self._ledger, self._bus, self._loop = ledger, bus, loop
        self._caller = Caller(service, ledger, loop, pool)
        self._settler = Settler(service, retry_delays, ledger, bus, tally, self._go_on)
        self._tally, self._log = tally, log
        self.duplicates = DuplicateAges(ledger, loop, partial(tally.timing, "duplicate_age"))
        # By its record's key: an event is never in hand twice, whatever channel it comes by.
        self._tasks: dict[bytes, Task] = {}
        self._pipeline = Pipeline(ledger, tally, self._answered)
        self._ack_all_later()

    @property
    def busy(self) -> bool:
        """Whether an event is in hand, be it that its delivery has gone back meanwhile."""
        return bool(self._tasks)

    def overdue_calls(self) -> int:
        """Return how many calls of claimed handlers seem not to return."""
        return self._caller.overdue()

    def end_by(self, now_s: float) -> None:
        """Start nothing any more that might not have ended by then."""
        self._caller.end_by(now_s)

    # From arrival to an ask.

    def take(self, deliveries: list[Delivery]) -> None:
        """Take what has arrived."""
        self._tally.count("received", len(deliveries))
        if self._ledger.halted:
            return  # All of it stays in hand, and so the prefetch ends the intake.
        for delivery in deliveries:
            if delivery.alive:
                self._receive(delivery)
        self._go_on()

    def _receive(self, delivery: Delivery) -> None:
        try:
            event = decode(delivery.body)
        except InvalidEvent as error:
            self._settler.invalid(delivery, str(error))
            return
        handler = self._handlers.get(event.type)
        if handler is None:
            self._settler.settle(delivery, Outcome.IGNORED, event)
            return
        token = f"{self._own_tokens}{delivery.epoch.number}/{delivery.tag}"
        key = self._ledger.key(event, token)
        running = self._tasks.get(key)
        if running is not None:
            running.join(delivery, event.digest)
        elif self._ledger.is_done(event.digest):
            self._settler.settle(delivery, Outcome.SKIPPED, event)
            self.duplicates.known(key)
        else:
            self._tasks[key] = Task(key, token, event, handler, delivery)
            self._begin(self._tasks[key])

    def _begin(self, task: Task) -> None:
        if task.handler.claimed:
            self._ask(task, Kind.CLAIM)
        else:
            self._handle(task)

    def _handle(self, task: Task) -> None:
        returned = run_handler(task.handler, task.event, self._service, self._ledger.why_never)
        self._tally.timing("handle", returned.elapsed_s)
        task.error = returned.error
        if returned.error:
            self._ask(task, Kind.LOOK)
        else:
            self._record(task, 0, returned.effects)
        if returned.elapsed_s > SLOW_HANDLER_S:
            self._log.warning(
                "a pure handler took long: heartbeats and all other events waited",
                **task.event.about,
                seconds=returned.elapsed_s,
            )

    # From an ask to its answer.

    def _record(self, task: Task, expect: int, effects: Checked) -> None:
        self._ask(task, Kind.PUBLISH if effects.events else Kind.RECORD, expect, effects)

    def _ask(
        self,
        task: Task,
        kind: Kind,
        expect: int = 0,
        effects: Checked = NO_EFFECTS,
        token: str = "",
    ) -> None:
        self._pipeline.add(
            Ask(kind, task.key, task.event.digest, token or task.token, task, expect, effects)
        )

    def _ask_again(self, ask: Ask, expect: int) -> None:
        ask.expect = expect
        self._pipeline.add(ask)

    def _go_on(self) -> None:
        """Commit what is ready, ack what is settled. The end of everything the loop calls."""
        self._pipeline.commit()
        self._bus.flush()
        self._tally.flush()

    def _answered(self, answers: list[Answer]) -> None:
        for answer in answers:
            self._decide(answer)
        self._go_on()

    def ack_all(self) -> None:
        """Ack all that is settled, also past a gap.

        Commits end out of order, so most gaps close within a moment, and one ack then covers all.
        Past one that stays, such as a held claim, it is one for each delivery.
        """
        if not self._ledger.halted:
            self._bus.flush_past_gap()

    def _ack_all_later(self) -> None:
        def ack_all() -> None:
            self.ack_all()
            self._ack_all_later()

        self._loop.call_later(ACK_ALL_EVERY_S, ack_all)

    # The decision.

    def _decide(self, answer: Answer) -> None:
        """Decide what happens to an event, and so to each delivery of it, by what etcd answered.

        No other task of this process has this record's key, so a claim that is ours and that did
        not land just now is nobody's: it is taken over. A claim of another process is waited for,
        whatever its digest: that process may die. Only what is recorded decides, since an attempt
        of ours that is still on its way can land where a claim has ended.
        """
        ask, found = answer.ask, answer.found
        task: Task = ask.owner
        if answer.landed:
            self._landed(task, answer)
            return
        if found is None or found.token != task.token:
            self._note_lost_claim(task)
        if task.published and (found is None or found.state in (CLAIMED, RELEASED)):
            self._start_over(task)
        elif found is None or found.state == RELEASED:
            if ask.kind in (Kind.LOOK, Kind.RELEASE):
                self._end(task, self._settler.failed)
            else:
                self._ask_again(ask, found.mod_revision if found else 0)
        elif found.state in (DONE, PUBLISHING) and found.digest != ask.digest:
            self._end(task, self._settler.conflicted)
        elif found.state == DONE:
            self._found_done(task, found)
        elif (
            found.state == PUBLISHING and task.waits_in(PUBLISHING).failures >= WAITS_FOR_ITS_EVENTS
        ):
            self._publish(task, found.mod_revision, found.events, found.token)
        elif (
            found.state == CLAIMED
            and found.token.startswith(self._own_tokens)
            and ask.kind is not Kind.LOOK
        ):
            self._ask_again(ask, found.mod_revision)
        else:
            self._wait(task, ask, found.state)

    def _landed(self, task: Task, answer: Answer) -> None:
        """Go on to what an ask that applied was for."""
        kind = answer.ask.kind
        if kind is Kind.RECORD:
            self._done(task, answer.ask.token)
        elif kind is Kind.CLAIM:
            self._call(task, answer.revision, answer.lease)
        elif kind is Kind.PUBLISH:
            self._publish(task, answer.revision, answer.ask.effects.events, task.token)
        else:
            self._end(task, self._settler.failed)

    def _wait(self, task: Task, ask: Ask, state: str) -> None:
        waits = task.waits_in(state)
        if waits.failures == WAITS_BEFORE_WARNING:
            self._log.warning(
                "an event waits for another process that does not end it", **task.event.about
            )

        def again() -> None:
            self._ask_again(ask, ask.expect)
            self._go_on()

        self._loop.call_later(waits.next_s(), again)

    def _note_lost_claim(self, task: Task) -> None:
        """Count a claim that was gone when its finished call was to be recorded."""
        if task.called:
            task.called = False
            self._tally.count("claim_lost")
            self._log.warning(
                "the claim was lost during the call: the outside may see it twice",
                **task.event.about,
            )

    # The call of a claimed handler.

    def _call(self, task: Task, revision: int, lease: int) -> None:
        done = partial(self._called, task, revision)
        self._caller.call(task.handler, task.event, lease, done)

    def _called(self, task: Task, revision: int, returned: Returned | None) -> None:
        """Record what a call has done, release its claim, or claim anew where it was not made."""
        if returned is None:
            self._not_called(task, revision)
        else:
            self._tally.timing("handle", returned.elapsed_s)
            task.error = returned.error
            if returned.error:
                self._ask(task, Kind.RELEASE, revision)
            else:
                task.called = True
                self._tally.count("sent")
                self._record(task, revision, returned.effects)
        self._go_on()

    def _not_called(self, task: Task, revision: int) -> None:
        """Claim anew; or, at the end, let go: another replica would wait for the lease's end."""
        if self._caller.ending:
            self._ask(task, Kind.RELEASE, revision)
        else:
            digest, token = task.event.digest, task.token
            self._wait(task, Ask(Kind.CLAIM, task.key, digest, token, task, revision), CLAIMED)

    # The events of a handler.

    def _publish(self, task: Task, revision: int, events: Sequence[bytes], token: str) -> None:
        """Publish the events that a record holds, and then say in it that it is done.

        Until then its deliveries stay in hand. When this process dies they come again, and
        whoever takes them finds the record and goes on here. The record keeps its token: its
        writer may not have had the answer yet, and tells by it that the record is its own.
        """
        task.called, task.published = False, True
        missing = len(events)

        def confirmed() -> None:
            nonlocal missing
            missing -= 1
            if not missing:
                self._ask(task, Kind.RECORD, revision, token=token)
                self._go_on()

        for body in events:
            self._bus.publish(body, confirmed)

    def _start_over(self, task: Task) -> None:
        """Handle an event anew whose record has gone before its last step, with its effects."""
        task.published = False
        self._begin(task)

    def _found_done(self, task: Task, found: Record) -> None:
        """End an event whose record was there, be it from an attempt whose reply was lost."""
        if found.token != task.token:
            self.duplicates.met(found)
        self._done(task, found.token)

    def _done(self, task: Task, token: str) -> None:
        """End an event that is done: processed by whoever's token its record has."""
        self._end(task, partial(self._settler.recorded, ours=token == task.token))

    def _end(self, task: Task, settle: Callable[[Task], None]) -> None:
        """Settle a task's deliveries, and judge those that had to wait for its end."""
        del self._tasks[task.key]
        settle(task)
        for delivery in task.others:
            if delivery.alive:
                self._receive(delivery)
