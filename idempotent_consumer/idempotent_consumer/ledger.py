"""The ledger: ``answers, again = await ledger.commit(asks)``, whatever etcd does meanwhile.

A batch of asks is one transaction, guarded by the key that reveals a wiped etcd. Nothing is
concluded from an error, because the transaction may have applied: the same values are sent again
until etcd answers, and their tokens tell an earlier attempt from somebody else's write.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from etcd3.etcdrpc import RangeRequest, TxnRequest
from structlog.typing import FilteringBoundLogger
from tenacity import AsyncRetrying, retry_if_exception_type

from . import etcd, names, records
from .cache import Cache, Follower
from .etcd import Client, EtcdError, Failure
from .event import Checked, Event
from .health import Health
from .leases import ClaimLease, WindowLease
from .records import DONE, Answer, Ask, Batch, Kind, Record
from .settings import Settings
from .system import System, commit_wait

GUARD_EVERY_S = 5.0
RELEASED_S = 600  # Far longer than an attempt to claim can be late.

T = TypeVar("T")


class EtcdLedger:
    """The ledger on etcd.

    ``longest_call_s`` is the longest time-out of a claimed handler. ``clock`` returns the seconds
    by which leases are counted; it can be called on any thread.
    """

    def __init__(
        self,
        service: str,
        settings: Settings,
        system: System,
        health: Health,
        log: FilteringBoundLogger,
        cache: Cache,
        longest_call_s: float,
        tasks: asyncio.TaskGroup,
        clock: Callable[[], float],
    ) -> None:
        self._settings, self._system = settings, system
        self._health, self._log, self._cache, self._tasks = health, log, cache, tasks
        self._client = Client(settings, system)
        self._window = WindowLease(self.ask, clock, settings.dedup_window_s)
        self._released = WindowLease(self.ask, clock, RELEASED_S)
        self._claims = ClaimLease(self.ask, clock, longest_call_s, tasks)
        self._guard_key, self._incarnation = names.incarnation_key(service).encode(), b""
        self._prefix = names.record_prefix(service).encode()
        self._failing: set[object] = set()
        self.halted = False
        """Whether etcd has been wiped or restored since the start."""
        health.lacks("etcd", "not reached yet")

    async def open(self) -> None:
        """Read the incarnation of etcd's data, or write one if there is none.

        Then fill the cache and keep it up to date, and check the incarnation every few seconds.
        """
        drawn: list[bytes] = []

        def make() -> Any:
            # A new one for each attempt. The old data may hold that of an attempt whose reply was
            # lost; after a wipe it would make the new data look like the old.
            drawn.append(f"{self._system.random.getrandbits(128):032x}".encode())
            request = TxnRequest()
            etcd.value_is(request.compare, self._guard_key, None)
            etcd.put(request.success, self._guard_key, drawn[-1])
            etcd.get(request.failure, self._guard_key)
            return request

        reply = await self.ask("Txn", make)
        kvs = reply.responses[0].response_range.kvs  # Empty if the key was put.
        self._incarnation = kvs[0].value if kvs else drawn[-1]
        self._log.info(
            "etcd reached: no history of this service, so it is new, or was wiped"
            if self._incarnation in drawn  # An attempt whose reply was lost may have put it.
            else "etcd reached: it holds this service's history",
            incarnation=self._incarnation.decode(errors="replace"),
        )
        follower = Follower(self._cache, self._prefix, self._client, self._system, self._log)
        # From this revision on, this process adds what it records to the cache itself.
        self._tasks.create_task(follower.run(self._client.revision))
        self._tasks.create_task(self._watch_guard())

    async def _watch_guard(self) -> None:
        while True:
            await asyncio.sleep(GUARD_EVERY_S)
            reply = await self.ask("Range", lambda: RangeRequest(key=self._guard_key))
            await self._check_guard(reply.kvs)

    def key(self, event: Event, token: str) -> bytes:
        """Return the key of an event's record."""
        return self._prefix + names.encode_id(event.id).encode()

    def is_done(self, digest: str) -> bool:
        """Return whether the cache knows this event as done."""
        return self._cache.holds(digest) and not self.halted

    def batch(self) -> Batch:
        """Return an empty batch within the settings' limits."""
        return Batch(self._settings.batch_size, self._settings.etcd_max_txn_ops)

    def why_never(self, effects: Checked) -> str | None:
        """Return why these effects fit into no transaction, or None."""
        return records.why_never(effects, self._settings.etcd_max_txn_ops)

    def claim_remaining_s(self, lease: int) -> float:
        """Return for how long a claim under this lease holds at the least. Any thread."""
        return self._claims.remaining_s(lease)

    async def read(self, key: bytes) -> Record | None:
        """Read a record, without retries. Raises EtcdError."""
        reply = await self._call("Range", RangeRequest(key=key))
        return records.decode(reply.kvs[0].value) if reply.kvs else None

    async def close(self) -> None:
        """Cancel the calls under way. Claims end with their lease."""
        await self._client.close()

    # The commit.

    async def commit(self, asks: Sequence[Ask]) -> tuple[list[Answer], list[Ask]]:
        """Send a batch's puts, or its looks, until the outcome is known.

        Puts are one transaction. If one of them cannot apply, none does, and their records are
        read. Returns the answers, and the asks to commit again: those whose records are as they
        expect them, or have not been read. All answers come from one reply of etcd, so the caller
        can act on each before it awaits anything.
        """
        if asks[0].kind is not Kind.LOOK:
            now = datetime.fromtimestamp(self._system.now_s(), UTC)
            written = now.isoformat(timespec="milliseconds")
            for ask in asks:
                ask.value = ask.value or records.encode(
                    ask.kind, ask.digest, ask.token, written, ask.effects.events
                )
            if landed := await self._until_known(lambda: self._transact(asks)):
                return landed, []
        # Not in an ELSE branch, which etcd would write to its log with every batch.
        return await self._read(asks)

    async def _transact(self, asks: Sequence[Ask]) -> list[Answer]:
        """Send the transaction once; return no answers if it did not apply. Raises EtcdError.

        An attempt to claim whose outcome is unknown may still apply after its event has been
        settled and its record is gone. Under a lease that is kept alive, such a claim would hold
        the next delivery for ever, so the lease is given up.
        """
        kinds = Counter(ask.kind for ask in asks)
        leases = {Kind.RELEASE: await self._released.take(kinds[Kind.RELEASE])}
        leases[Kind.CLAIM] = await self._claims.take(kinds[Kind.CLAIM])
        # Taken last: its records need the whole window, however late the others were granted.
        recorded = kinds[Kind.RECORD] + kinds[Kind.PUBLISH]
        leases[Kind.RECORD] = leases[Kind.PUBLISH] = await self._window.take(recorded)
        try:
            reply = await self._call("Txn", self._transaction(asks, leases))
        except EtcdError as error:
            if error.failure is Failure.LEASE_NOT_FOUND:
                self._window.give_up()
                self._released.give_up()
            if leases[Kind.CLAIM]:
                self._claims.give_up()
            raise
        if not reply.succeeded:
            return []
        for ask in asks:
            if ask.kind is Kind.RECORD:
                self._cache.add(ask.digest, reply.header.revision)
        return [Answer(ask, True, leases[ask.kind]) for ask in asks]

    def _transaction(self, asks: Sequence[Ask], leases: Mapping[Kind, int]) -> Any:
        """Build the transaction: if all is as the asks expect, put their records and effects."""
        request = TxnRequest()
        compare, success = request.compare, request.success
        etcd.value_is(compare, self._guard_key, self._incarnation)
        for ask in asks:
            etcd.value_is(compare, ask.key, ask.expect)
            etcd.put(success, ask.key, ask.value, leases[ask.kind])
            for put in ask.effects.puts:
                etcd.put(success, put.key.encode(), put.value)
        return request

    async def _read(self, asks: Sequence[Ask]) -> tuple[list[Answer], list[Ask]]:
        """Judge asks that did not apply by their records, read together with the incarnation key.

        If the reply would be too large, the records are read in halves, until one has answers.
        """
        request = TxnRequest()
        for key in (self._guard_key, *(ask.key for ask in asks)):
            etcd.get(request.success, key)

        async def send() -> Any:
            try:
                return await self._call("Txn", request)
            except EtcdError as error:
                if error.failure is Failure.TOO_LARGE and len(asks) > 1:
                    return None
                raise

        reply = await self._until_known(send)
        if reply is None:
            half = len(asks) // 2
            answers, again = await self._read(asks[:half])
            if answers:
                return answers, [*again, *asks[half:]]
            answers, others = await self._read(asks[half:])
            return answers, [*again, *others]
        guard, *reads = (response.response_range.kvs for response in reply.responses)
        await self._check_guard(guard)
        answers, again = [], []
        for ask, kvs in zip(asks, reads, strict=True):
            answer = records.judge(ask, kvs[0] if kvs else None)
            if answer is None:
                again.append(ask)
                continue
            if answer.found is not None and answer.found.state == DONE:
                self._cache.add(answer.found.digest, reply.header.revision)
            answers.append(answer)
        return answers, again

    # Calls, and whether this is still the same etcd.

    async def ask(self, method: str, make: Callable[[], Any]) -> Any:
        """Make and send a request until etcd has answered it, and return the reply."""
        return await self._until_known(lambda: self._call(method, make()))

    async def _until_known(self, send: Callable[[], Awaitable[T]]) -> T:
        """Send until there is a reply: after a failure the outcome is unknown."""
        try:
            return await send()
        except EtcdError as error:
            # Nearly every first attempt succeeds, so only the others pay for tenacity.
            first = error
        this, backoff = object(), commit_wait(self._system.random)
        self._failed(this, first)
        await asyncio.sleep(backoff.next_s())
        recover = AsyncRetrying(
            retry=retry_if_exception_type(EtcdError),
            wait=lambda _: backoff.next_s(),
            before_sleep=lambda state: self._failed(
                this, state.outcome and state.outcome.exception()
            ),
        )
        async for attempt in recover:
            with attempt:
                reply = await send()
        self._answered(this)
        return reply

    def _failed(self, request: object, error: Any) -> None:
        """Note that a request has failed and will be sent again.

        etcd counts as absent until each of these has its answer: a full etcd still answers reads,
        and one that refuses a large write accepts the others.
        """
        if error.failure is Failure.LEASE_NOT_FOUND or self.halted:
            return
        self._health.lacks("etcd", str(error))
        if not self._failing:
            self._log.warning(
                "etcd does not answer: deliveries are held, and nothing is settled until it does",
                error=str(error),
            )
        self._failing.add(request)

    def _answered(self, request: object) -> None:
        if request in self._failing:
            self._failing.remove(request)
            if not self._failing:
                self._log.info("etcd answers again")
                self._health.has("etcd")

    async def _call(self, method: str, request: Any) -> Any:
        """Send a request once. Raises EtcdError; never returns once etcd is not the same any more.

        A linearizable reply whose revision is below one seen before its request was sent means
        that etcd was restored from an older snapshot. From then on nothing is sent, because what
        this process knows of etcd's data is no longer true.
        """
        if self.halted:
            await asyncio.Event().wait()
        # A reply about a lease has the revision of the member asked, which may lag behind another.
        floor = self._client.revision if method in ("Txn", "Range") else 0
        reply = await self._client.call(method, request)
        revision = reply.header.revision
        if revision < floor or self.halted:
            await self._halt(
                f"wiped, or restored from an older state: revision {revision}, {floor} seen before"
            )
        if not self._failing:
            self._health.has("etcd")
        return reply

    async def _check_guard(self, kvs: Any) -> None:
        if not kvs or kvs[0].value != self._incarnation:
            await self._halt("wiped: its incarnation key is not the one seen at the start")

    async def _halt(self, why: str) -> None:
        """Never return: callers wait for ever, so nothing is settled by what this etcd says."""
        if not self.halted:
            self.halted = True
            self._health.lacks("etcd", why)
            self._log.critical(
                "etcd is not the one seen before: nothing is settled until this "
                "service is restarted, which accepts it as it is",
                reason=why,
            )
        await asyncio.Event().wait()


class NoLedger:
    """The ledger if ``ENABLE_ETCD`` is false: it grants whatever is asked."""

    halted = False

    def __init__(self, settings: Settings, log: FilteringBoundLogger) -> None:
        self._batch_size, self._log = settings.batch_size, log

    async def open(self) -> None:
        """Warn that events are not deduplicated."""
        self._log.warning(
            "ENABLE_ETCD is false: every delivery is processed, duplicates too, "
            "and effects are dropped"
        )

    def key(self, event: Event, token: str) -> bytes:
        """Return a key that no other delivery has."""
        return token.encode()

    def is_done(self, digest: str) -> bool:
        """Return False: nothing is known to be done."""
        return False

    def batch(self) -> Batch:
        """Return an empty batch, without a limit on operations."""
        return Batch(self._batch_size, 1_000_000)

    def why_never(self, effects: Checked) -> str | None:
        """Return None: nothing is written, so everything fits."""
        return None

    async def commit(self, asks: Sequence[Ask]) -> tuple[list[Answer], list[Ask]]:
        """Grant every ask; a look finds nothing."""
        for ask in asks:
            for put in ask.effects.puts:
                about = {**ask.owner.event.about, "key": put.key, "bytes": len(put.value)}
                self._log.info("effect dropped", **about)
        return [Answer(ask, ask.kind is not Kind.LOOK) for ask in asks], []

    async def read(self, key: bytes) -> Record | None:
        """Return None: there are no records."""
        return None

    def claim_remaining_s(self, lease: int) -> float:
        """Return infinity: there is no claim that could end."""
        return float("inf")

    async def close(self) -> None:
        """Do nothing."""


Ledger = EtcdLedger | NoLedger
"""The ledger of a service, with etcd or without."""
