"""The ledger: ``answers, again = await ledger.commit(asks)``, whatever etcd does meanwhile.

One transaction for a batch of asks, guarded by the key that tells a wiped etcd. After each sending
the outcome is unknown until etcd has answered: nothing is concluded from an error, the same values
are sent again, and their tokens tell an earlier attempt that landed from somebody else's write.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from etcd3.etcdrpc import RangeRequest, TxnRequest
from structlog.typing import FilteringBoundLogger
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

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
RELEASED_S = 600  # A released record is kept far longer than an attempt to claim can be late.

T = TypeVar("T")


class EtcdLedger:
    """The ledger on etcd. ``longest_call_s`` is the longest time-out of a claimed handler.

    ``clock`` returns seconds, on any thread, by which leases are counted.
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
        """Whether etcd has turned out to be another than at the start."""
        health.lacks("etcd", "not reached yet")

    async def open(self) -> None:
        """Learn which life of etcd's data this is: the one that is there, or a first one.

        From then on the cache is filled and kept true, and now and then etcd is looked at again.
        """
        drawn: list[bytes] = []

        def make() -> Any:
            # Another each time: an attempt that applied, unseen, must not be repeated after a wipe.
            drawn.append(f"{self._system.random.getrandbits(128):032x}".encode())
            request = TxnRequest()
            etcd.value_is(request.compare, self._guard_key, None)
            etcd.put(request.success, self._guard_key, drawn[-1])
            etcd.get(request.failure, self._guard_key)
            return request

        reply = await self.ask("Txn", make)
        kvs = reply.responses[0].response_range.kvs  # Empty where the key was put.
        self._incarnation = kvs[0].value if kvs else drawn[-1]
        self._log.info(
            "etcd reached: no history of this service, so it is new, or was wiped"
            if self._incarnation in drawn  # Be it by an attempt whose reply was lost.
            else "etcd reached: it holds this service's history",
            incarnation=self._incarnation.decode(errors="replace"),
        )
        follower = Follower(self._cache, self._prefix, self._client, self._system, self._log)
        # As of now: what this process records from here on is in the cache anyway.
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
        """Read a record once, for information. Raises EtcdError."""
        reply = await self._call("Range", RangeRequest(key=key))
        return records.decode(reply.kvs[0].value) if reply.kvs else None

    async def close(self) -> None:
        """End what is under way. Claims are left to end with their lease."""
        await self._client.close()

    # The commit.

    async def commit(self, asks: Sequence[Ask]) -> tuple[list[Answer], list[Ask]]:
        """Send a batch's puts, or its looks, until the outcome is known, and return the answers.

        Puts are one transaction. Where something stands in the way of one, none has applied, and
        their records are read. Those with an answer are returned first, and then those that are
        to be committed again: their records are as they expect them, or have not been read.
        All answers come from one reply: each is decided on in the step that has it.
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
        # Read apart and not in an ELSE branch, which etcd would have to log with each batch.
        judged = await self._read(asks)
        again = [ask for ask, answer in zip(asks, judged, strict=True) if answer is None]
        return [answer for answer in judged if answer is not None], again

    async def _transact(self, asks: Sequence[Ask]) -> list[Answer]:
        """Send the transaction once, under leases that are good for it. Raises EtcdError.

        Returns no answers where something stands in its way.

        An attempt to claim whose outcome is unknown may apply when its event is settled and its
        record gone. Under a lease that is kept alive, such a claim would hold the next delivery
        for ever, so the lease is given up.
        """
        kinds = Counter(ask.kind for ask in asks)
        leases = {Kind.RELEASE: await self._released.take(kinds[Kind.RELEASE])}
        leases[Kind.CLAIM] = await self._claims.take(kinds[Kind.CLAIM])
        # The last: it is to have its whole window left, however late the others were granted.
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
        """Build it: if all is as the asks expect it, put their records and their effects."""
        request = TxnRequest()
        compare, success = request.compare, request.success
        etcd.value_is(compare, self._guard_key, self._incarnation)
        for ask in asks:
            etcd.value_is(compare, ask.key, ask.expect)
            etcd.put(success, ask.key, ask.value, leases[ask.kind])
            for put in ask.effects.puts:
                etcd.put(success, put.key.encode(), put.value)
        return request

    async def _read(self, asks: Sequence[Ask]) -> list[Answer | None]:
        """Read the records of asks that have not applied, and judge the asks by them.

        The key that tells a wiped etcd is read with them. Where the reply would be too large they
        are read by halves, up to the first that has answers: all of these come from one reply.
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
            first = await self._read(asks[:half])
            left = asks[half:]
            return [*first, *([None] * len(left) if any(first) else await self._read(left))]
        guard, *reads = (response.response_range.kvs for response in reply.responses)
        await self._check_guard(guard)
        answers: list[Answer | None] = []
        for ask, kvs in zip(asks, reads, strict=True):
            answer = records.judge(ask, kvs[0] if kvs else None)
            if answer is not None and answer.found is not None and answer.found.state == DONE:
                self._cache.add(answer.found.digest, reply.header.revision)
            answers.append(answer)
        return answers

    # Calls, and whether this is still the same etcd.

    async def ask(self, method: str, make: Callable[[], Any]) -> Any:
        """Make and send a request until etcd has answered it, and return the reply."""
        return await self._until_known(lambda: self._call(method, make()))

    async def _until_known(self, send: Callable[[], Awaitable[T]]) -> T:
        """Send again after each failure, which leaves the outcome unknown, until there is one."""
        try:
            return await send()
        except EtcdError as error:
            # Nearly every first attempt succeeds: only others are worth what tenacity costs.
            first = error
        this, backoff = object(), commit_wait(self._system.random)
        recover = AsyncRetrying(
            retry=retry_if_exception_type(EtcdError),
            wait=lambda _: backoff.next_s(),
            before_sleep=partial(self._fails, this),
        )
        async for attempt in recover:
            with attempt:
                if attempt.retry_state.attempt_number == 1:
                    raise first
                reply = await send()
        self._answers(this)
        return reply

    def _fails(self, request: object, state: RetryCallState) -> None:
        """Note that a request has failed, which will be sent again.

        etcd is away until each of them has an answer: one that is full answers reads, and one that
        refuses a large write takes the others.
        """
        error: Any = state.outcome and state.outcome.exception()
        if error.failure is Failure.LEASE_NOT_FOUND or self.halted:
            return
        self._health.lacks("etcd", str(error))
        if not self._failing:
            self._log.warning(
                "etcd does not answer: deliveries are held, and nothing is settled until it does",
                error=str(error),
            )
        self._failing.add(request)

    def _answers(self, request: object) -> None:
        if request in self._failing:
            self._failing.remove(request)
            if not self._failing:
                self._log.info("etcd answers again")
                self._health.has("etcd")

    async def _call(self, method: str, request: Any) -> Any:
        """Send a request once. Raises EtcdError; never returns once etcd is not the same any more.

        The revision of each linearizable reply is held against the highest that any reply had told
        when its request was sent: a lower one means that etcd was restored from an older snapshot.
        From then on nothing is sent: what this process knows of etcd's data holds no more.
        """
        if self.halted:
            await asyncio.Event().wait()
        # A lease's reply carries the revision of the member asked, which may lag behind another's.
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
        """Never return: whoever waits for this etcd waits for good, so nothing is settled by it."""
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
    """Stands in for the ledger where ``ENABLE_ETCD`` is false: whatever is asked is granted."""

    halted = False

    def __init__(self, settings: Settings, log: FilteringBoundLogger) -> None:
        self._batch_size, self._log = settings.batch_size, log

    async def open(self) -> None:
        """There is nothing to reach."""
        self._log.warning(
            "ENABLE_ETCD is false: every delivery is processed, duplicates too, "
            "and effects are dropped"
        )

    def key(self, event: Event, token: str) -> bytes:
        """Return a key that no other delivery has."""
        return token.encode()

    def is_done(self, digest: str) -> bool:
        """Nothing is known to be done."""
        return False

    def batch(self) -> Batch:
        """Return an empty batch, which no limit of etcd's operations bounds."""
        return Batch(self._batch_size, 1_000_000)

    def why_never(self, effects: Checked) -> str | None:
        """Nothing is written, so everything fits."""
        return None

    async def commit(self, asks: Sequence[Ask]) -> tuple[list[Answer], list[Ask]]:
        """Grant every ask; a look finds nothing."""
        for ask in asks:
            for put in ask.effects.puts:
                about = {**ask.owner.event.about, "key": put.key, "bytes": len(put.value)}
                self._log.info("effect dropped", **about)
        return [Answer(ask, ask.kind is not Kind.LOOK) for ask in asks], []

    async def read(self, key: bytes) -> Record | None:
        """There are no records."""
        return None

    def claim_remaining_s(self, lease: int) -> float:
        """Return that a claim which does not exist never ends."""
        return float("inf")

    async def close(self) -> None:
        """There is nothing to end."""


Ledger = EtcdLedger | NoLedger
"""What a service's consumer asks, with etcd behind it or without."""
