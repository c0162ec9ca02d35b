"""An etcd in memory, behind gRPC's interface. The test decides what the network does.

``tests/integration/test_etcd_contract.py`` compares it with a real etcd.
"""

from __future__ import annotations

import asyncio
import operator
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from copy import copy, deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, NamedTuple

from etcd3 import etcdrpc as pb
from etcd3.etcdrpc import kv_pb2
from google.protobuf.unknown_fields import UnknownFieldSet
from grpc import StatusCode
from grpc.aio import AioRpcError, UsageError

from ..settings import Settings
from .loop import Agenda, Wire


def refusal(code: StatusCode, text: str) -> AioRpcError:
    """Return the error with which etcd refuses a request."""
    return AioRpcError(code, (), (), f"etcdserver: {text}")


TIMED_OUT = AioRpcError(StatusCode.DEADLINE_EXCEEDED, (), (), "Deadline Exceeded")
CLOSED = AioRpcError(StatusCode.UNAVAILABLE, (), (), "Socket closed")
TOO_LARGE = AioRpcError(
    StatusCode.RESOURCE_EXHAUSTED, (), (), "Received message larger than max (2 vs. 1)"
)
MAX_LEASE_TTL_S = 9_000_000_000

_COMPARISONS = {
    pb.Compare.EQUAL: operator.eq,
    pb.Compare.NOT_EQUAL: operator.ne,
    pb.Compare.GREATER: operator.gt,
    pb.Compare.LESS: operator.lt,
}
_MORE_FOLLOWS = b"\x38\x01"
"""``WatchResponse.fragment``, field 7."""


class Change(NamedTuple):
    """One step of a key's history: what it holds from then on, or None if it was deleted."""

    at_s: float
    revision: int
    key: bytes
    kv: Any

    @property
    def value(self) -> bytes | None:
        return None if self.kv is None else self.kv.value


class Data:
    """The data of an etcd, from one wipe or restore to the next.

    ``leases`` has when each ends and the seconds it was granted. ``wiped`` is whether a wipe ended
    this data.
    """

    def __init__(self, revision: int = 1) -> None:
        self.revision, self.compacted_revision, self.wiped = revision, 0, False
        self.leases: dict[int, tuple[float, int]] = {}
        self.changes: list[Change] = []
        self.by_key: dict[bytes, list[Change]] = {}

    def at(self, key: bytes, revision: int | None = None) -> Any:
        """Return what a key holds, or held at a revision, or None."""
        for change in reversed(self.by_key.get(key, ())):
            if revision is None or change.revision <= revision:
                return change.kv
        return None

    def within(self, key: bytes, range_end: bytes, revision: int | None = None) -> list[bytes]:
        """Return the keys of a range, sorted: those that exist, or existed at a revision."""
        keys = [k for k in self.by_key if _is_in(k, key, range_end)] if range_end else [key]
        return sorted(each for each in keys if self.at(each, revision) is not None)


def _is_in(key: bytes, start: bytes, range_end: bytes) -> bool:
    if not range_end:
        return key == start
    return start <= key and (range_end == b"\0" or key < range_end)


class Store:
    """An etcd of one member. ``apply`` does one request; the other methods are for tests.

    ``now_s`` is its clock. ``lives`` ends with the current data, after the data that each wipe or
    restore has replaced; ``history`` has every change in all of them. ``committed`` gets the
    changes of each revision. ``out_of_space`` is the NOSPACE alarm. ``events_a_reply`` bounds the
    events in a watch's reply, unless it is 0: more come in fragments if the watch asked for them,
    and end it otherwise.
    """

    def __init__(self, now_s: Callable[[], float], max_txn_ops: int = 128) -> None:
        self._now_s, self.max_txn_ops = now_s, max_txn_ops
        self.lives, self.history = [Data()], list[Change]()
        self._data = self.lives[0]
        self.watches: list[Watch] = []
        self.committed: Callable[[list[Change]], None] = lambda _: None
        self._lease_ids = count(1001)
        self.out_of_space, self.events_a_reply, self.version = False, 0, "3.5.30"

    # What the test does.

    def put(self, key: str, value: bytes, lease: int = 0) -> int:
        """Write a key, as an operator might; return its revision."""
        put = pb.PutRequest(key=key.encode(), value=value, lease=lease)
        return int(self._do_alone(pb.RequestOp(request_put=put)).header.revision)

    def delete(self, key: str) -> None:
        delete = pb.DeleteRangeRequest(key=key.encode())
        self._do_alone(pb.RequestOp(request_delete_range=delete))

    def revoke(self, lease: int) -> None:
        self.expire()
        self._end_lease(lease)

    def compact(self) -> None:
        self._data.compacted_revision = self.revision

    def get(self, key: str) -> Any:
        return self.data.at(key.encode())

    def keys(self, prefix: str = "") -> list[str]:
        found = (key.decode() for key in self.data.within(b"\0", b"\0"))
        return [key for key in found if key.startswith(prefix)]

    def puts(self, prefix: str) -> list[Change]:
        """Return every put of keys with this prefix, in all lives."""
        start = prefix.encode()
        return [c for c in self.history if c.value is not None and c.key.startswith(start)]

    @property
    def leases(self) -> dict[int, float]:
        return {lease: ends_s for lease, (ends_s, _) in self.data.leases.items()}

    @property
    def revision(self) -> int:
        return self.data.revision

    @property
    def data(self) -> Data:
        """Return the current data, without leases that have run out."""
        self.expire()
        return self._data

    def snapshot(self) -> Data:
        return deepcopy(self.data)

    def restore(self, snapshot: Data) -> None:
        """Go back to a snapshot, as an operator does with a backup. Watches end."""
        self._data = deepcopy(snapshot)
        self.lives.append(self._data)
        self.end_watches()

    def wipe(self, revision: int = 1) -> None:
        """Start with an empty data directory, at a revision that others have written up to."""
        self._data.wiped = True
        self.restore(Data(revision))

    def end_watches(self, error: AioRpcError = CLOSED) -> None:
        for watch in self.watches:
            watch.deliver(error)

    def progress(self) -> None:
        """Send a progress notification to the watches that want it."""
        for watch in self.watches:
            if watch.request.progress_notify:
                watch.deliver(pb.WatchResponse(header=self._header()))

    # What etcd does. A request is done by the method that has its name in lower case.

    def apply(self, method: str, request: Any) -> Any:
        """Do a request and return the reply, or raise AioRpcError and change nothing."""
        self.expire()
        reply = getattr(self, f"_{method.lower()}")(request)
        reply.header.revision = self._data.revision
        return reply

    def watch(self, watch: Watch) -> None:
        self.expire()
        start, compacted = watch.request.start_revision, self._data.compacted_revision
        watch.deliver(pb.WatchResponse(created=True, header=self._header()))
        if 0 < start < compacted:
            watch.deliver(pb.WatchResponse(canceled=True, compact_revision=compacted))
            return
        self.watches.append(watch)
        if start:
            self._tell(watch, [c for c in self._data.changes if c.revision >= start])

    def expire(self) -> None:
        """End the leases that have run out, as happens before every access to the data."""
        now_s, leases = self._now_s(), self._data.leases
        ended = [(ends_s, lease) for lease, (ends_s, _) in leases.items() if ends_s <= now_s]
        for _, lease in sorted(ended):
            self._end_lease(lease)

    def _header(self) -> Any:
        return pb.ResponseHeader(revision=self._data.revision)

    def _do_alone(self, operation: Any) -> Any:
        return self.apply("Txn", pb.TxnRequest(success=[operation]))

    def _committed(self, changes: list[Change]) -> None:
        if changes:
            self._data.revision = changes[0].revision
            self.watches = [watch for watch in self.watches if not watch.ended]
            for watch in self.watches:
                self._tell(watch, changes)
            self.committed(changes)

    def _tell(self, watch: Watch, changes: list[Change]) -> None:
        events = [self._event(change, watch.request) for change in changes if watch.wants(change)]
        room = self.events_a_reply or len(events)
        while events:
            reply = pb.WatchResponse(header=self._header(), events=events[:room])
            events = events[room:]
            if events and not watch.takes_fragments:
                watch.deliver(TOO_LARGE)
                return
            if events:
                reply.MergeFromString(_MORE_FOLLOWS)
            watch.deliver(reply)

    def _event(self, change: Change, watched: Any) -> Any:
        before = None
        if watched.prev_kv and change.revision > self._data.compacted_revision:
            before = self._data.at(change.key, change.revision - 1)
        kind = kv_pb2.Event.PUT if change.kv else kv_pb2.Event.DELETE
        kv = change.kv or kv_pb2.KeyValue(key=change.key, mod_revision=change.revision)
        return kv_pb2.Event(type=kind, kv=kv, prev_kv=before)

    def _authenticate(self, _request: Any) -> Any:
        raise refusal(StatusCode.FAILED_PRECONDITION, "authentication is not enabled")

    def _status(self, _request: Any) -> Any:
        return pb.StatusResponse(version=self.version, dbSize=2048, leader=1)

    def _alarm(self, _request: Any) -> Any:
        alarm = pb.AlarmMember(alarm=pb.AlarmType.Value("NOSPACE"))
        return pb.AlarmResponse(alarms=[alarm] if self.out_of_space else [])

    def _txn(self, request: Any) -> Any:
        self._check(request)
        succeeded = all(self._holds(compare) for compare in request.compare)
        operations = request.success if succeeded else request.failure
        for operation in operations:
            lease = operation.request_put.lease
            if lease and lease not in self._data.leases:
                raise refusal(StatusCode.NOT_FOUND, "requested lease not found")
        before = len(self._data.changes)
        responses = [self._do(operation) for operation in operations]
        self._committed(self._data.changes[before:])
        return pb.TxnResponse(succeeded=succeeded, responses=responses)

    def _check(self, request: Any) -> None:
        parts = (request.compare, request.success, request.failure)
        if max(map(len, parts)) > self.max_txn_ops:
            raise refusal(StatusCode.INVALID_ARGUMENT, "too many operations in txn request")
        for branch in parts[1:]:
            puts = [op.request_put.key for op in branch if op.HasField("request_put")]
            if not all(puts):
                raise refusal(StatusCode.INVALID_ARGUMENT, "key is not provided")
            if len(set(puts)) < len(puts):
                raise refusal(StatusCode.INVALID_ARGUMENT, "duplicate key given in txn request")
            if puts:
                self._check_space()

    def _check_space(self) -> None:
        if self.out_of_space:
            raise refusal(StatusCode.RESOURCE_EXHAUSTED, "mvcc: database space exceeded")

    def _holds(self, compare: Any) -> bool:
        kv, member = self._data.at(compare.key), compare.WhichOneof("target_union")
        if compare.range_end or not member:
            raise NotImplementedError(compare)
        if kv is None and member == "value":
            return False
        found = getattr(kv or kv_pb2.KeyValue(), member)
        return bool(_COMPARISONS[compare.result](found, getattr(compare, member)))

    def _do(self, operation: Any) -> Any:
        kind = operation.WhichOneof("request")
        if kind == "request_range":
            return pb.ResponseOp(response_range=self._range(operation.request_range))
        if kind == "request_put":
            put, revision = operation.request_put, self._data.revision + 1
            old = self._data.at(put.key) or kv_pb2.KeyValue(create_revision=revision)
            kv = kv_pb2.KeyValue(key=put.key, value=put.value, lease=put.lease)
            kv.create_revision, kv.mod_revision = old.create_revision, revision
            kv.version = old.version + 1
            self._change(put.key, kv)
            return pb.ResponseOp(response_put=pb.PutResponse())
        if kind == "request_delete_range":
            delete = operation.request_delete_range
            gone = self._data.within(delete.key, delete.range_end)
            for key in gone:
                self._change(key, None)
            return pb.ResponseOp(response_delete_range=pb.DeleteRangeResponse(deleted=len(gone)))
        raise NotImplementedError(kind)

    def _change(self, key: bytes, kv: Any) -> None:
        change = Change(self._now_s(), self._data.revision + 1, key, kv)
        self._data.changes.append(change)
        self._data.by_key.setdefault(key, []).append(change)
        self.history.append(change)

    def _range(self, request: Any) -> Any:
        data, revision = self._data, request.revision
        if not request.key:
            raise refusal(StatusCode.INVALID_ARGUMENT, "key is not provided")
        if revision > data.revision:
            raise refusal(StatusCode.OUT_OF_RANGE, "mvcc: required revision is a future revision")
        if 0 < revision < data.compacted_revision:
            raise refusal(StatusCode.OUT_OF_RANGE, "mvcc: required revision has been compacted")
        if request.sort_order or request.sort_target or request.keys_only:
            raise NotImplementedError(request)
        keys = data.within(request.key, request.range_end, revision or None)
        if request.count_only:
            return pb.RangeResponse(count=len(keys))
        kvs = [data.at(key, revision or None) for key in keys[: request.limit or None]]
        return pb.RangeResponse(count=len(keys), more=len(kvs) < len(keys), kvs=kvs)

    def _leasegrant(self, request: Any) -> Any:
        if request.TTL > MAX_LEASE_TTL_S:
            raise refusal(StatusCode.OUT_OF_RANGE, "too large lease TTL")
        if request.ID in self._data.leases:
            raise refusal(StatusCode.FAILED_PRECONDITION, "lease already exists")
        self._check_space()
        lease, ttl_s = request.ID or next(self._lease_ids), max(2, request.TTL)
        self._data.leases[lease] = (self._now_s() + ttl_s, ttl_s)
        return pb.LeaseGrantResponse(ID=lease, TTL=ttl_s)

    def _leasekeepalive(self, request: Any) -> Any:
        _, ttl_s = self._data.leases.get(request.ID, (0.0, 0))
        if ttl_s:
            self._data.leases[request.ID] = (self._now_s() + ttl_s, ttl_s)
        return pb.LeaseKeepAliveResponse(ID=request.ID, TTL=ttl_s)

    def _leasetimetolive(self, request: Any) -> Any:
        if request.ID not in self._data.leases:
            return pb.LeaseTimeToLiveResponse(ID=request.ID, TTL=-1)
        ends_s, ttl_s = self._data.leases[request.ID]
        left_s = int(ends_s - self._now_s())
        return pb.LeaseTimeToLiveResponse(ID=request.ID, TTL=left_s, grantedTTL=ttl_s)

    def _end_lease(self, lease: int) -> None:
        del self._data.leases[lease]
        before = len(self._data.changes)
        for key in self._data.within(b"\0", b"\0"):
            if self._data.at(key).lease == lease:
                self._change(key, None)
        self._committed(self._data.changes[before:])


# What a process reaches.


@dataclass(frozen=True)
class Fate:
    """What happens to one request.

    It applies after ``applies_s``, or never if that is None. The reply, or the ``error`` instead,
    comes after ``answers_s``; a reply never comes before the request has applied. A request
    without a reply at its time-out ends with ``TIMED_OUT``.
    """

    applies_s: float | None = 0.0
    answers_s: float = 0.0
    error: AioRpcError | None = None


FINE = Fate()
REQUEST_LOST = Fate(None, error=TIMED_OUT)
ANSWER_LOST = Fate(error=TIMED_OUT)


def refused(text: str, code: StatusCode = StatusCode.UNKNOWN, answers_s: float = 0.0) -> Fate:
    """Return the fate of a request that etcd answers with an error."""
    return Fate(None, answers_s, refusal(code, text))


@dataclass(eq=False)
class Call:
    """A request of a process. ``life`` is the number of etcd's lives when it was sent.

    ``outcome`` is the reply or the error, once it has applied; ``answer`` is what the process
    waits for. ``number`` counts the requests of all processes.
    """

    method: str
    request: Any
    loop: Any
    metadata: tuple[tuple[str, str], ...]
    answer: asyncio.Future[Any] = field(repr=False)
    outcome: Any = field(default=None, repr=False)
    number: int = 0
    life: int = 0


class FakeEtcd:
    """An etcd for processes, which may share it.

    Each request meets the next fate in its method's ``script``, or if that is empty, the one that
    ``fate`` returns. ``latency_s`` is the delay of a watch's replies.
    """

    def __init__(self, agenda: Agenda, store: Store | None = None) -> None:
        self.agenda = agenda
        self.store = Store(agenda.time) if store is None else store
        self.fate: Callable[[Call], Fate] = lambda _: FINE
        self.latency_s: Callable[[], float] = lambda: 0.0
        self.calls: list[Call] = []
        self._scripts: dict[str, deque[Fate]] = defaultdict(deque)

    # What the test does.

    def script(self, method: str, *fates: Fate) -> None:
        self._scripts[method].extend(fates)

    def sent(self, method: str) -> list[Any]:
        return [call.request for call in self.calls if call.method == method]

    # What a process reaches.

    def open_channel(self, _settings: Settings, _host: str, _port: int) -> FakeChannel:
        return FakeChannel(self)

    def send(self, call: Call) -> None:
        """Receive a request; its answer is a step of the process."""
        self.calls.append(call)
        call.number, call.life = len(self.calls), len(self.store.lives)
        script, later = self._scripts[call.method], self.agenda.later
        fate = script.popleft() if script else self.fate(call)
        if fate.applies_s is not None:
            later(fate.applies_s, partial(self.apply, call))
        if fate.error is not None:
            later(fate.answers_s, partial(self.answer, call, fate.error), call.loop)
        elif fate.applies_s is not None:
            later(max(fate.answers_s, fate.applies_s), partial(self.answer, call), call.loop)

    def apply(self, call: Call) -> None:
        if call.life != len(self.store.lives):
            return  # Since wiped or restored: the request was lost with its connection.
        try:
            call.outcome = self.store.apply(call.method, call.request)
            if call.method in ("LeaseGrant", "LeaseKeepAlive"):
                # So that watches hear of the lease's end in time, and not at the next request.
                self.agenda.later(call.outcome.TTL, self.store.expire)
        except AioRpcError as error:
            call.outcome = error

    def answer(self, call: Call, error: AioRpcError | None = None) -> None:
        """Give the process a request's outcome, or an error of the network."""
        if not call.answer.done():
            call.answer.set_result(error or call.outcome)

    def watch(self, watch: Watch) -> None:
        self.store.watch(watch)


class FakeChannel:
    """The part of ``grpc.aio.Channel`` that etcd's client uses."""

    def __init__(self, etcd: FakeEtcd) -> None:
        self._etcd, self._closed = etcd, False
        self._under_way: list[Callable[[], object]] = []
        """Ends each call."""

    def unary_unary(
        self, method: str, request_serializer: Any, response_deserializer: Any
    ) -> Callable[..., Any]:
        async def send(request: Any, timeout: float, metadata: Any) -> Any:
            call = self._call(method, request_serializer(request), metadata)
            call.loop.act("before", call)
            self._etcd.send(call)
            call.loop.act("after", call)
            timer = call.loop.call_later(timeout, self._etcd.answer, call, TIMED_OUT)
            try:
                outcome = await call.answer
            finally:
                timer.cancel()
            if isinstance(outcome, AioRpcError):
                raise copy(outcome)  # Several may raise it, each with its own traceback.
            return response_deserializer(outcome.SerializeToString())

        return send

    def stream_stream(
        self, method: str, request_serializer: Any, response_deserializer: Any
    ) -> Callable[..., AsyncIterator[Any]]:
        async def replies(requests: AsyncIterator[Any], metadata: Any) -> AsyncIterator[Any]:
            request = request_serializer(await anext(aiter(requests)))
            call = self._call(method, request, metadata)
            self._etcd.calls.append(call)
            watch = Watch(self._etcd, call)
            self._under_way.append(partial(watch.deliver, CLOSED))
            self._etcd.watch(watch)
            try:
                while not isinstance(reply := await watch.replies.get(), AioRpcError):
                    yield response_deserializer(reply.SerializeToString())
                raise copy(reply)
            finally:
                watch.deliver(CLOSED)

        return replies

    async def close(self, grace: float | None = None) -> None:
        """Cancel every call under way, as gRPC does."""
        self._closed = True
        for end in self._under_way:
            end()

    def _call(self, method: str, request: bytes, metadata: Any) -> Call:
        if self._closed:
            raise UsageError("Channel is closed.")
        loop = asyncio.get_running_loop()
        name = method.rpartition("/")[2]
        sent = getattr(pb, f"{name}Request").FromString(request)
        answer = loop.create_future()
        self._under_way.append(answer.cancel)
        return Call(name, sent, loop, tuple(metadata), answer)


class Watch:
    """A watch, from the store over the network to the process that reads its replies."""

    def __init__(self, etcd: FakeEtcd, call: Call) -> None:
        self.request, self.ended = call.request.create_request, False
        # etcd3's messages lack this field, and the one in a reply that says that more follows.
        unknown: Any = UnknownFieldSet(self.request)
        self.takes_fragments = any((field.field_number, field.data) == (8, 1) for field in unknown)
        self.replies = asyncio.Queue[Any]()
        self._wire = Wire(etcd.agenda, call.loop, etcd.latency_s)

    def wants(self, change: Change) -> bool:
        watched = self.request
        ignored = pb.WatchCreateRequest.NOPUT if change.kv else pb.WatchCreateRequest.NODELETE
        return ignored not in watched.filters and _is_in(change.key, watched.key, watched.range_end)

    def deliver(self, reply: Any) -> None:
        """Send a reply, or the error that ends the watch."""
        if not self.ended:
            self.ended = isinstance(reply, AioRpcError)
            self._wire.send(partial(self.replies.put_nowait, reply))
