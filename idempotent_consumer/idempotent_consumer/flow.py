"""The path of an event, from its arrival to its ack, in the order in which things happen.

A pure event has no coroutine of its own: it is handled on arrival, recorded with its batch, and
acked. A claimed event is one coroutine, ``_see_through``: claim, call, record, settle. So is an
event that cannot be recorded at once. ``decide``, a pure function of what etcd has answered, says
what happens to an event.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .bus import COMMITS_IN_FLIGHT, Delivery
from .calls import Breaker, Handler, Returned, one_line
from .event import NO_EFFECTS, Checked, Event, InvalidEvent, Outgoing
from .metrics import Outcome
from .publisher import event_message
from .records import CLAIMED, DONE, PUBLISHING, RELEASED, Answer, Ask, Kind, Record
from .system import Backoff, claim_wait

if TYPE_CHECKING:
    from .service import Running

TURN_S = 0.05
"""Pure handlers run for this long in one turn. Then what is ready is committed and acked, and the
loop serves heartbeats, leases and replies."""

PAUSE_S = 0.01
"""The longest pause between two turns. A commit takes several passes of the loop; without a pause,
each of them would wait for one more handler, which may take a second."""

SMALL_BATCH = 1 / 4
"""A batch with fewer asks than this part of BATCH_SIZE waits while any commit is under way: each
transaction costs this process and etcd a fixed amount, which a small one spends on few events."""

CATCH_UP_EVERY_S = 0.25
"""How often small batches, and acks past a gap, stop waiting for a commit that may never end."""

SLOW_HANDLER_S = 2 * TURN_S
"""A pure handler that takes this long is logged at WARNING, and again if it takes twice as long."""

WAITS_BEFORE_WARNING = 60
WAITS_FOR_ITS_EVENTS = 10
"""How often, for about 4 s, a process waits for another to publish a record's events, before it
publishes them itself. The other hardly ever needs longer, and sooner they would go out twice."""


@dataclass(slots=True, eq=False)
class InFlight:
    """An event in flight, with all its deliveries, which share its fate.

    ``others`` have the same id and another body, by digest: what is recorded in the end decides
    about them too. ``called``: its call was made, and is not recorded yet. ``published``: a record
    with events to publish was seen. ``failed`` is what its handler raised; ``held``: that was in a
    call, and the handler's circuit breaker is open. ``waits`` is the backoff while the record stays
    in ``state``. ``decided`` brings the event's coroutine, if it has one, the next decision.
    """

    key: bytes
    token: str
    event: Event
    handler: Handler
    deliveries: list[Delivery]
    others: dict[str, InFlight] = field(default_factory=dict)
    called: bool = False
    published: bool = False
    failed: Returned | None = None
    held: bool = False
    state: str = ""
    waits: Backoff | None = None
    decided: asyncio.Future[Action] | None = None

    @property
    def alive(self) -> bool:
        """Whether any of its deliveries can still be settled."""
        return any(delivery.alive for delivery in self.deliveries)

    def join(self, other: InFlight) -> None:
        """Add deliveries of the same id, and drop those that have gone back meanwhile."""
        digest = other.event.digest
        same = self if digest == self.event.digest else self.others.setdefault(digest, other)
        if same is not other:
            if not same.deliveries[0].alive:
                same.deliveries = [delivery for delivery in same.deliveries if delivery.alive]
            same.deliveries += other.deliveries

    def ask(self, kind: Kind, expect: bytes | None = None, effects: Checked = NO_EFFECTS) -> Ask:
        """Return an ask for its record."""
        return Ask(kind, self.key, self.event.digest, self.token, self, expect, effects)


class Consumer:
    """Decodes and handles deliveries, has their events recorded, and settles them."""

    def __init__(self, run: Running) -> None:
        self._own_tokens, self._handlers = f"{run.process}/", run.service.handlers
        self._decoder, self._exchange = run.service.decode, run.service.exchange
        self._calls, self._ledger, self._settler = run.calls, run.ledger, run.settler
        self._intake, self._publisher, self._tasks = run.intake, run.publisher, run.tasks
        self._tally, self._log, self._duplicates = run.tally, run.log, run.duplicates
        self._random = run.system.random
        self._arrived: deque[Delivery] = deque()
        # By record key: an event is in flight once, whatever channels deliver it.
        self._in_flight: dict[bytes, InFlight] = {}
        failures = run.settings.breaker_failures
        self._breakers = {
            event_type: Breaker(event_type, failures, run.health, run.tally, run.log)
            for event_type, handler in self._handlers.items()
            if handler.claimed
        }
        # For handlers with ``at_once``: taken before one of the slots that all handlers share.
        self._own_slots = {
            event_type: asyncio.Semaphore(handler.at_once)
            for event_type, handler in self._handlers.items()
            if handler.at_once is not None
        }
        self._warn_from_s: dict[str, float] = {}
        self._waiting: deque[Ask] = deque()
        self._commits, self._is_due = 0, False
        self._small_batch = int(SMALL_BATCH * run.settings.batch_size)

    @property
    def held(self) -> int:
        """How many events open circuit breakers hold."""
        return sum(len(each.held) for each in self._breakers.values())

    @property
    def busy(self) -> bool:
        """Whether any event is in flight and not held, even one whose deliveries have gone back."""
        arrived = self._intake.arrived or self._arrived
        recording = self._waiting or self._commits
        in_flight = len(self._in_flight) - self.held
        return bool(arrived or recording or in_flight or self._settler.forwarding)

    # 1. Deliveries arrive: as many as the socket had.

    async def consume(self) -> None:
        """Take deliveries, in turns that are bounded in time, until cancelled."""
        now_s = asyncio.get_running_loop().time
        epoch = None
        while True:
            arrived = await self._intake.deliveries()
            if arrived[0].epoch is not epoch:
                epoch = arrived[0].epoch
                self._forget_looks()
            self._arrived.extend(arrived)
            self._tally.count("received", len(self._arrived))
            turn_ends_s = now_s() + TURN_S
            while self._arrived:
                delivery = self._arrived.popleft()
                # If etcd is no longer the same, it stays unacked, and the prefetch ends the intake.
                if delivery.alive and not self._ledger.halted:
                    self._receive(delivery)
                if (overrun_s := now_s() - turn_ends_s) >= 0:
                    self.go_on()
                    await asyncio.sleep(min(overrun_s, PAUSE_S))
                    turn_ends_s = now_s() + TURN_S
            self.go_on()

    def _forget_looks(self) -> None:
        """Drop the looks for deliveries that have gone back, which will be redelivered.

        Events with a handler are in flight once, however often redelivered. Looks would add up.
        """
        waiting = self._waiting
        self._waiting = deque(
            ask for ask in waiting if isinstance(ask.owner, InFlight) or ask.owner[0].alive
        )

    def _receive(self, delivery: Delivery) -> None:
        try:
            event = delivery.event(self._decoder)
        except InvalidEvent as error:
            self._settler.invalid(delivery, one_line(error, named=False))
            return
        except BaseException as error:  # noqa: BLE001 - the service's own decoder may raise anything
            self._settler.undecoded(delivery, error)
            return
        token = f"{self._own_tokens}{delivery.epoch.number}/{delivery.tag}"
        key = self._ledger.key(event, token)
        handler = self._handlers.get(event.type)
        if handler is None:
            self._waiting.append(Ask(Kind.LOOK, key, event.digest, "", (delivery, event)))
            return
        running = self._in_flight.get(key)
        if running is None and self._ledger.is_done(event.digest):
            self._settler.ack(delivery, Outcome.SKIPPED, event)
            self._duplicates.known(key)
            return
        flight = InFlight(key, token, event, handler, [delivery])
        if running is not None:
            running.join(flight)
        else:
            self._begin(flight)

    def _begin(self, flight: InFlight) -> None:
        self._in_flight[flight.key] = flight
        if flight.handler.claimed:
            self._tasks.create_task(self._see_through(flight, flight.ask(Kind.CLAIM)))
        else:
            self._waiting.append(self._handle(flight))

    # 2. A pure handler runs at once. What it returns becomes the event's ask.

    def _handle(self, flight: InFlight) -> Ask:
        returned = self._calls.run(flight.handler, flight.event)
        event_type, elapsed_s = flight.event.type, returned.elapsed_s
        if elapsed_s >= self._warn_from_s.get(event_type, SLOW_HANDLER_S):
            self._warn_from_s[event_type] = 2 * elapsed_s
            self._log.warning(
                "a pure handler took long: heartbeats and all other events waited",
                **flight.event.about,
                handler=flight.handler.name,
                seconds=round(elapsed_s, 3),
            )
        return self._next_ask(flight, returned)

    def _next_ask(self, flight: InFlight, returned: Returned, claim: bytes | None = None) -> Ask:
        """Return the ask that records a handler's effects, or that follows its failure."""
        self._tally.timing("handle", returned.elapsed_s)
        flight.failed, effects = returned if returned.error else None, returned.effects
        if returned.error:
            return flight.ask(Kind.LOOK if claim is None else Kind.RELEASE, claim)
        return flight.ask(Kind.PUBLISH if effects.events else Kind.RECORD, claim, effects)

    # 3. Waiting asks are recorded in one transaction. Several are under way at a time: while they
    #    wait for etcd's disk, more deliveries arrive, and their asks are the next batch.

    def go_on(self) -> None:
        """Commit waiting asks and ack settled deliveries. Called after every change to either.

        If no commit is under way, the batch is sent at once. Otherwise it is sent in the next pass
        of the loop, which may add to it, or if it is small, at the end of a commit.
        """
        if self._waiting:
            if not self._commits:
                self._send_batches()
            elif not self._is_due:
                self._is_due = True
                # A task ends with the run. A callback could outlive it, and start a task too late.
                self._tasks.create_task(self._send_due_batches())
        if not self._ledger.halted:
            self._intake.flush()
        # Under load, several commits share a log line: a line costs as much as some ten events.
        self._tally.flush(log=not self._commits)

    async def _send_due_batches(self) -> None:
        self._send_batches()

    def _send_batches(self, *, small: bool = False) -> None:
        self._is_due = False
        while self._waiting and self._commits < COMMITS_IN_FLIGHT:
            if self._commits and len(self._waiting) < self._small_batch and not small:
                return
            batch = self._ledger.batch()
            while self._waiting and batch.take(self._waiting[0]):
                self._waiting.popleft()
            for asks in batch.commits:
                self._commits += 1
                self._tasks.create_task(self._commit(asks))

    async def _commit(self, asks: Sequence[Ask]) -> None:
        now_s = asyncio.get_running_loop().time
        started_s = now_s()
        answers, again = await self._ledger.commit(asks)
        self._commits -= 1
        self._waiting.extendleft(reversed(again))
        self._tally.timing("commit", now_s() - started_s)
        for answer in answers:
            owner = answer.ask.owner
            if isinstance(owner, InFlight):
                self._decide(owner, answer)
            else:
                delivery, event = owner
                self._ignore(delivery, event, answer.found)
        self.go_on()

    def _ignore(self, delivery: Delivery, event: Event, found: Record | None) -> None:
        """Ack an event without a handler here, unless a replica that has one has begun it.

        That replica may have died, and its record may hold events that are not published yet.
        """
        if found is None or found.state == DONE or found.digest != event.digest:
            self._settler.ack(delivery, Outcome.IGNORED, event)
        else:
            self._settler.postpone(delivery, event)

    def _decide(self, flight: InFlight, answer: Answer) -> None:
        """Decide what happens to an event, in the step of the loop that has etcd's answer.

        If the event ends, it ends in this step: in a later one, a delivery may have joined it that
        arrived after etcd was read. Everything else is left to its coroutine.
        """
        found = answer.found
        if flight.called and not answer.landed and (found is None or found.token != flight.token):
            flight.called = False
            self._tally.count("claim_lost")
            self._log.warning(
                "the claim was lost during the call: the outside may see it twice",
                **flight.event.about,
            )
        if found is not None and found.state != flight.state:
            flight.state, flight.waits = found.state, None
        waits = flight.waits.waits if flight.waits is not None else 0
        published, held = flight.published, flight.held
        action = decide(answer, flight.token, self._own_tokens, published, waits, held)
        if isinstance(action, Again):
            answer.ask.expect = action.expect
            self._waiting.append(answer.ask)
            return
        if isinstance(action, Ending):
            self._end(flight, action)
        elif flight.decided is None:
            self._tasks.create_task(self._see_through(flight, answer.ask, action))
        # It may have been cancelled: the process ends.
        if flight.decided is not None and not flight.decided.done():
            flight.decided.set_result(action)

    # 4. The coroutine of an event that is claimed, or that cannot be recorded at once.

    async def _see_through(self, flight: InFlight, ask: Ask, action: Action | None = None) -> None:
        """Do what has been decided, and ask for the next decision, until the event has ended."""
        while not isinstance(action, Ending):
            match action:
                case Wait():
                    await self._wait(flight)
                case PublishEvents():
                    ask = await self._publish(flight, action)
                case StartOver():
                    # Decoded again: its handler may have changed the args. A decoder may fail now.
                    with suppress(BaseException):
                        event = flight.deliveries[0].event(self._decoder)
                        if event.digest == flight.event.digest:
                            flight.event = event
                    flight.published, flight.failed, flight.held = False, None, False
                    claimed = flight.handler.claimed
                    ask = flight.ask(Kind.CLAIM) if claimed else self._handle(flight)
            if ask.kind is Kind.CLAIM:
                ask, action = await self._claim_and_call(flight, ask)
            else:
                action = await self._decided(flight, ask)

    async def _decided(self, flight: InFlight, ask: Ask) -> Action:
        """Have an ask committed, and return what its answer decides."""
        flight.decided = asyncio.get_running_loop().create_future()
        self._waiting.append(ask)
        self.go_on()
        return await flight.decided

    async def _claim_and_call(self, flight: InFlight, ask: Ask) -> tuple[Ask, Action]:
        """Claim an event, make its call, and record or release it, all under one slot.

        While its handler's circuit breaker is open, it waits for its turn without a slot. Returns
        the last ask, and what its answer decided.
        """
        breaker = self._breakers[flight.event.type]
        own_slot = self._own_slots.get(flight.event.type, nullcontext())
        while True:
            async with own_slot, self._calls.slot:
                if breaker.admits(flight):
                    asked = await self._claim_and_call_now(flight, ask, breaker)
                    breaker.passed(flight)
                    return asked
            await breaker.turn(flight)
            if not flight.alive:
                self._end(flight, Fail())
                breaker.passed(flight)
                return ask, Fail()

    async def _claim_and_call_now(
        self, flight: InFlight, ask: Ask, breaker: Breaker
    ) -> tuple[Ask, Action]:
        if not self._calls.has_time(flight.handler):
            # This process is stopping: its deliveries stay unacked, and go back.
            self._end(flight, Fail())
            return ask, Fail()
        while True:
            # Even when no time is left: a claim that has landed has to be released.
            action = await self._decided(flight, ask)
            if not isinstance(action, Call):
                return ask, action
            ask = await self._call(flight, action, breaker)
            if ask.kind is not Kind.CLAIM:
                return ask, await self._decided(flight, ask)

    async def _wait(self, flight: InFlight) -> None:
        """Wait before asking for an event's record again, longer each time."""
        if flight.waits is None:
            flight.waits = claim_wait(self._random)
        if flight.waits.waits == WAITS_BEFORE_WARNING:
            self._log.warning(
                "an event waits for another process that does not end it", **flight.event.about
            )
        await asyncio.sleep(flight.waits.next_s())

    async def _call(self, flight: InFlight, claim: Call, breaker: Breaker) -> Ask:
        """Make the call that a claim has landed for, and return the next ask."""
        returned = await self._calls.call(flight.handler, flight.event, claim.lease)
        if returned is None:
            if not self._calls.has_time(flight.handler):
                # This process is stopping. Unreleased, the claim would hold until its lease ends.
                return flight.ask(Kind.RELEASE, claim.value)
            await self._wait(flight)
            return flight.ask(Kind.CLAIM, claim.value)
        if not returned.error:
            breaker.succeeded()
            flight.called = True
            self._tally.count("sent")
        elif returned.outcome is Outcome.FAILED:
            flight.held = breaker.failed(flight, returned.error)
        return self._next_ask(flight, returned, claim.value)

    async def _publish(self, flight: InFlight, held: PublishEvents) -> Ask:
        """Publish the events that a record holds, and return the ask that makes it *done*.

        Until it is done the event's deliveries stay unacked. If this process dies, they are
        redelivered, and whoever takes them finds the record and publishes its events. The record
        keeps its token: its writer may still wait for the answer, and recognises the record by it.
        """
        flight.called, flight.published = False, True
        sent = [self._publisher.send(event_message(event, self._exchange)) for event in held.events]
        if not all(await asyncio.gather(*sent)):
            # This process is stopping: whoever takes the event next publishes them again.
            await asyncio.get_running_loop().create_future()
        done = flight.ask(Kind.RECORD, held.value)
        done.token = held.token
        return done

    # 5. The event ends: each of its deliveries is settled, and acked with those before it.

    def _end(self, flight: InFlight, action: Ending) -> None:
        """Settle an event's deliveries, and those of its id's other bodies, which had to wait."""
        del self._in_flight[flight.key]
        deliveries, event = flight.deliveries, flight.event
        recorded = ""
        match action:
            case Done():
                recorded = event.digest
                if action.record is not None:
                    self._duplicates.met(action.record)
                self._settler.recorded(deliveries, event, ours=action.token == flight.token)
            case Conflict():
                recorded = action.recorded
                self._settler.conflicted(deliveries, event, recorded)
            case Fail() if flight.failed:
                self._settler.retry_or_park(deliveries, event, flight.handler, flight.failed)
        # The recorded digest decides about the other bodies. Without one, the next body is tried.
        others = flight.others
        while others:
            other = others.pop(next(iter(others)))
            if recorded not in ("", other.event.digest):
                self._settler.conflicted(other.deliveries, other.event, recorded)
            elif other.alive:
                other.others = others
                self._begin(other)
                return

    def ack_past_gaps(self) -> None:
        """Ack and log all settled deliveries, including those past one that is still unacked."""
        if not self._ledger.halted:
            self._intake.flush(past_gap=True)
        self._tally.flush()

    async def catch_up_now_and_then(self) -> None:
        """Send small batches and ack past gaps, at intervals, until cancelled.

        Commits end out of order, so most gaps close within a moment, and one ack then covers all
        deliveries. Past a gap that stays, such as a claim that is waited for, each delivery needs
        an ack of its own. A small batch does not wait for a commit that etcd refuses again and
        again.
        """
        while True:
            await asyncio.sleep(CATCH_UP_EVERY_S)
            self._send_batches(small=True)
            self.ack_past_gaps()


# The decision.


@dataclass(slots=True)
class Done:
    """The event is recorded, with this token; ``record`` is set if another delivery wrote it."""

    token: str
    record: Record | None = None


@dataclass(slots=True)
class Conflict:
    """Its id is recorded with another body, which has this digest."""

    recorded: str


@dataclass(slots=True)
class Fail:
    """Nothing is recorded: its handler raised, or is not called any more."""


@dataclass(slots=True)
class Call:
    """Its claim has landed, with this value and under this lease."""

    value: bytes
    lease: int


@dataclass(slots=True)
class PublishEvents:
    """Its record holds events that may not all be published."""

    value: bytes
    events: Sequence[Outgoing]
    token: str


@dataclass(slots=True)
class Again:
    """Ask again: the record has this value now, or is absent."""

    expect: bytes | None


@dataclass(slots=True)
class Wait:
    """Ask again later: another process has it in flight."""


@dataclass(slots=True)
class StartOver:
    """Handle the event again: its record vanished before it was done, or a breaker holds it."""


Ending = Done | Conflict | Fail
Action = Ending | Call | PublishEvents | Again | Wait | StartOver


def decide(  # noqa: PLR0911 - one table, read from top to bottom
    answer: Answer, token: str, own_tokens: str, published: bool, waits: int, held: bool
) -> Action:
    """Decide what happens to an event, by what etcd has answered.

    ``token`` is the event's; ``own_tokens`` is what all tokens of this process begin with.
    ``published``: its events have been published already. ``waits``: how often it has waited while
    its record was in the state that was found. ``held``: its call's failure is not an attempt.
    Raises ValueError for an answer that cannot be.

    No other event in flight here has this record's key. So a claim of this process that did not
    land just now has no owner, and is taken over. A claim of another process is waited for,
    whatever its digest: that process may die. Only what is recorded decides, since an earlier
    attempt of ours can still land once a claim has ended.
    """
    ask, found = answer.ask, answer.found
    failed = StartOver if held else Fail
    if answer.landed:
        return _landed(answer, failed)
    if ask.kind is not Kind.LOOK and ask.expect == (found.value if found else None):
        raise ValueError(f"{ask.kind.name} was refused although its record is as it expects it")
    if published and (found is None or found.state in (CLAIMED, RELEASED)):
        return StartOver()
    if found is None or found.state == RELEASED:
        nothing_to_do = ask.kind in (Kind.LOOK, Kind.RELEASE)
        return failed() if nothing_to_do else Again(found.value if found else None)
    if found.state in (DONE, PUBLISHING) and found.digest != ask.digest:
        return Conflict(found.digest)
    if found.state == DONE:
        return Done(found.token, found if found.token != token else None)
    if found.state == PUBLISHING and waits >= WAITS_FOR_ITS_EVENTS:
        return PublishEvents(found.value, found.events, found.token)
    takes_over = found.state == CLAIMED and found.token.startswith(own_tokens)
    if takes_over and ask.kind is not Kind.LOOK:
        return Again(found.value)
    return Wait()


def _landed(answer: Answer, failed: Callable[[], Action]) -> Action:
    ask = answer.ask
    match ask.kind:
        case Kind.RECORD:
            return Done(ask.token)
        case Kind.PUBLISH:
            return PublishEvents(ask.value, ask.effects.events, ask.token)
        case Kind.CLAIM:
            return Call(ask.value, answer.lease)
        case Kind.RELEASE:
            return failed()
        case Kind.LOOK:
            raise ValueError("a look changes nothing, so it cannot land")
