"""etcd's data in memory: revisions, transactions, leases and watches, as its API has them.

``tests/integration/test_etcd_contract.py`` holds it against a real etcd.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from etcd3 import etcdrpc as pb
from etcd3.etcdrpc import kv_pb2
from google.protobuf.unknown_fields import UnknownFieldSet
from grpc import StatusCode
from grpc.aio import AioRpcError

MAX_LEASE_TTL_S = 9_000_000_000
MIN_LEASE_TTL_S = 2
FIRST_LEASE = 1000

COMPACTED = "mvcc: required revision has been compacted"
TOO_LARGE = AioRpcError(
    StatusCode.RESOURCE_EXHAUSTED, (), (), details="Received message larger than max (2 vs. 1)"
)


class Change(NamedTuple):
    """One step of a key's history. A deletion has no value."""

    revision: int
    key: bytes
    value: bytes | None
    lease: int


def refusal(code: StatusCode, text: str) -> AioRpcError:
    """Return the error with which etcd refuses a request."""
    return AioRpcError(code, (), (), details=f"etcdserver: {text}")


class Data:
    """What a wipe loses and a snapshot keeps."""

    def __init__(self) -> None:
        self.revision = 1
        self.compacted_revision = 0
        self.versions: dict[bytes, list[tuple[int, Any]]] = {}
        self.changes: list[Change] = []
        self.lease_ends_s: dict[int, float] = {}
        self.lease_ttls_s: dict[int, int] = {}
        self.keys_sorted: list[bytes] | None = []

    def copy(self) -> Data:
        """Return a copy; what a key held at a revision never changes, and is shared."""
        other = Data()
        other.revision, other.compacted_revision = self.revision, self.compacted_revision
        other.versions = {key: list(versions) for key, versions in self.versions.items()}
        other.changes, other.keys_sorted = list(self.changes), None
        other.lease_ends_s = dict(self.lease_ends_s)
        other.lease_ttls_s = dict(self.lease_ttls_s)
        return other


class Store:
    """An etcd of one member. ``apply`` is one request; the rest is the test's own hand on it.

    ``now_s`` is its clock. ``history`` is every change since the start, over wipes and restores
    too. ``out_of_space`` is the NOSPACE alarm. ``events_a_reply``, where it is not 0, is how many
    events a watch's reply has room for: the others come in more fragments, where the watch asked
    for fragments, and else it ends.
    """

    def __init__(self, now_s: Callable[[], float], max_txn_ops: int = 128) -> None:
        self._now_s, self.max_txn_ops = now_s, max_txn_ops
        self._data = Data()
        self._leases_granted = 0
        self._watches: list[_Watch] = []
        self.history: list[Change] = []
        self.out_of_space = False
        self.events_a_reply = 0

    # What the test does.

    def put(self, key: str, value: bytes, lease: int = 0) -> int:
        """Write a key as an operator would; return its revision."""
        put = pb.PutRequest(key=key.encode(), value=value, lease=lease)
        return int(self._txn(_always(pb.RequestOp(request_put=put))).header.revision)

    def delete(self, key: str) -> None:
        """Delete a key as an operator would."""
        delete = pb.DeleteRangeRequest(key=key.encode())
        self._txn(_always(pb.RequestOp(request_delete_range=delete)))

    def revoke(self, lease: int) -> None:
        """End a lease as an operator would, or its time."""
        self.expire()
        self._end_lease(lease)

    def compact(self) -> None:
        """Forget the history before the present revision."""
        self._data.compacted_revision = self.revision

    def get(self, key: str) -> Any:
        """Return what a key holds, or None."""
        self.expire()
        return self._at(key.encode(), self._data.revision)

    def keys(self, prefix: str = "") -> list[str]:
        """Return the keys there are."""
        self.expire()
        start = prefix.encode()
        live = self._within(b"\0", b"\0", self._data.revision)
        return [key.decode() for key in live if key.startswith(start)]

    def puts(self, prefix: str) -> list[Change]:
        """Return every put there has ever been of keys with this prefix."""
        start = prefix.encode()
        return [c for c in self.history if c.value is not None and c.key.startswith(start)]

    @property
    def leases(self) -> dict[int, float]:
        """Return the leases there are, with the time at which each ends."""
        self.expire()
        return dict(self._data.lease_ends_s)

    @property
    def revision(self) -> int:
        """Return the revision of the last change."""
        self.expire()
        return self._data.revision

    def snapshot(self) -> Data:
        """Return the present state, for ``restore``."""
        self.expire()
        return self._data.copy()

    def restore(self, snapshot: Data) -> None:
        """Go back to a snapshot, as an operator does with a backup; watches end unheard."""
        self._data, self._watches = snapshot.copy(), []

    def wipe(self) -> None:
        """Start anew with an empty data directory."""
        self.restore(Data())

    # What etcd does.

    def apply(self, method: str, request: Any) -> Any:
        """Do what a request says and return the reply, or raise AioRpcError and change nothing."""
        self.expire()
        known: dict[str, Callable[[Any], Any]] = {
            "Txn": self._txn,
            "Range": self._read_alone,
            "LeaseGrant": self._grant,
            "LeaseKeepAlive": self._keep_alive,
            "LeaseTimeToLive": self._time_to_live,
            "Authenticate": self._authenticate,
            "Status": self._status,
            "Alarm": self._alarms,
        }
        reply = known[method](request)
        if not reply.header.revision:
            reply.header.revision = self._data.revision
        return reply

    def watch(self, request: Any, deliver: Callable[[Any], None]) -> Callable[[], None]:
        """Deliver the replies to a WatchCreateRequest from now on; return what ends the watch."""
        self.expire()
        if request.start_revision and request.start_revision < self._data.compacted_revision:
            deliver(pb.WatchResponse(created=True, header=self._header()))
            compacted = self._data.compacted_revision
            deliver(pb.WatchResponse(canceled=True, compact_revision=compacted))
            return lambda: None
        watch = _Watch(request, deliver)
        self._watches.append(watch)
        deliver(pb.WatchResponse(created=True, header=self._header()))
        if request.start_revision:
            self._tell(watch, [c for c in self._data.changes if c[0] >= request.start_revision])
        return lambda: self._watches.remove(watch) if watch in self._watches else None

    def progress(self) -> None:
        """Tell the watches that want it up to which revision they have had everything."""
        for watch in list(self._watches):
            if watch.request.progress_notify:
                watch.deliver(pb.WatchResponse(header=self._header()))

    @property
    def watched(self) -> bool:
        """Whether there is a watch: somebody to whom the end of a lease is told."""
        return bool(self._watches)

    def expire(self) -> None:
        """End the leases that have run out. Each look at the data does so before."""
        now_s = self._now_s()
        ended = [
            (ends_s, lease) for lease, ends_s in self._data.lease_ends_s.items() if ends_s <= now_s
        ]
        for _, lease in sorted(ended):
            self._end_lease(lease)

    def _header(self) -> Any:
        return pb.ResponseHeader(revision=self._data.revision)

    def _committed(self, changes: list[Change]) -> None:
        """Take in the changes of one revision."""
        if not changes:
            return
        self._data.revision = changes[0].revision
        self._data.changes.extend(changes)
        self.history.extend(changes)
        for watch in list(self._watches):
            self._tell(watch, changes)

    def _tell(self, watch: _Watch, changes: list[Change]) -> None:
        events = [
            self._event(change, watch.request.prev_kv) for change in changes if watch.wants(change)
        ]
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

    def _event(self, change: Change, prev_kv: bool) -> Any:
        kv, before = kv_pb2.KeyValue(key=change.key, mod_revision=change.revision), None
        if change.value is not None:
            kv = self._at(change.key, change.revision)
        if prev_kv and change.revision > self._data.compacted_revision:
            before = self._at(change.key, change.revision - 1)
        kind = kv_pb2.Event.DELETE if change.value is None else kv_pb2.Event.PUT
        return kv_pb2.Event(type=kind, kv=kv, prev_kv=before)

    def _authenticate(self, _request: Any) -> Any:
        raise refusal(StatusCode.FAILED_PRECONDITION, "authentication is not enabled")

    def _status(self, _request: Any) -> Any:
        return pb.StatusResponse(version="3.5.30", dbSize=20480, leader=1)

    def _alarms(self, _request: Any) -> Any:
        alarm = pb.AlarmMember(alarm=pb.AlarmType.Value("NOSPACE"))
        return pb.AlarmResponse(alarms=[alarm] if self.out_of_space else [])

    def _txn(self, request: Any) -> Any:
        self._check(request)
        succeeded = all(self._holds(compare) for compare in request.compare)
        operations = request.success if succeeded else request.failure
        for operation in operations:
            lease = operation.request_put.lease
            if lease and lease not in self._data.lease_ends_s:
                raise refusal(StatusCode.NOT_FOUND, "requested lease not found")
        revision, changes = self._data.revision + 1, list[Change]()
        responses = [self._do(operation, revision, changes) for operation in operations]
        self._committed(changes)
        return pb.TxnResponse(header=self._header(), succeeded=succeeded, responses=responses)

    def _check(self, request: Any) -> None:
        branches = (request.success, request.failure)
        if max(len(request.compare), *map(len, branches)) > self.max_txn_ops:
            raise refusal(StatusCode.INVALID_ARGUMENT, "too many operations in txn request")
        puts = [
            [op.request_put.key for op in branch if op.HasField("request_put")]
            for branch in branches
        ]
        if not all(map(all, puts)):
            raise refusal(StatusCode.INVALID_ARGUMENT, "key is not provided")
        if any(len(set(keys)) < len(keys) for keys in puts):
            raise refusal(StatusCode.INVALID_ARGUMENT, "duplicate key given in txn request")
        if any(puts):
            self._check_space()

    def _check_space(self) -> None:
        if self.out_of_space:
            raise refusal(StatusCode.RESOURCE_EXHAUSTED, "mvcc: database space exceeded")

    def _holds(self, compare: Any) -> bool:
        if compare.range_end:
            raise NotImplementedError("comparisons of ranges")
        kv = self._at(compare.key, self._data.revision)
        if kv is None and compare.target == pb.Compare.VALUE:
            return False
        kv = kv or kv_pb2.KeyValue()
        found, wanted = {
            pb.Compare.MOD: (kv.mod_revision, compare.mod_revision),
            pb.Compare.CREATE: (kv.create_revision, compare.create_revision),
            pb.Compare.VERSION: (kv.version, compare.version),
            pb.Compare.VALUE: (kv.value, compare.value),
        }[compare.target]
        return bool(
            {
                pb.Compare.EQUAL: found == wanted,
                pb.Compare.NOT_EQUAL: found != wanted,
                pb.Compare.GREATER: found > wanted,
                pb.Compare.LESS: found < wanted,
            }[compare.result]
        )

    def _do(self, operation: Any, revision: int, changes: list[Change]) -> Any:
        kind = operation.WhichOneof("request")
        if kind == "request_range":
            at = revision if changes else self._data.revision
            return pb.ResponseOp(response_range=self._read(operation.request_range, at))
        if kind == "request_put":
            put = operation.request_put
            self._write(put.key, put.value, put.lease, revision, changes)
            return pb.ResponseOp(response_put=pb.PutResponse())
        if kind == "request_delete_range":
            delete = operation.request_delete_range
            gone = self._within(delete.key, delete.range_end, revision)
            self._remove(gone, revision, changes)
            return pb.ResponseOp(response_delete_range=pb.DeleteRangeResponse(deleted=len(gone)))
        raise NotImplementedError(kind)

    def _write(
        self, key: bytes, value: bytes, lease: int, revision: int, changes: list[Change]
    ) -> None:
        old = self._at(key, revision)
        kv = kv_pb2.KeyValue(
            key=key,
            value=value,
            lease=lease,
            mod_revision=revision,
            create_revision=old.create_revision if old else revision,
            version=old.version + 1 if old else 1,
        )
        self._append(key, revision, kv)
        changes.append(Change(revision, key, value, lease))

    def _remove(self, keys: Iterable[bytes], revision: int, changes: list[Change]) -> None:
        for key in keys:
            self._append(key, revision, None)
            changes.append(Change(revision, key, None, 0))

    def _append(self, key: bytes, revision: int, kv: Any) -> None:
        if key not in self._data.versions:
            self._data.versions[key] = []
            self._data.keys_sorted = None
        self._data.versions[key].append((revision, kv))

    def _read_alone(self, request: Any) -> Any:
        if not request.key:
            raise refusal(StatusCode.INVALID_ARGUMENT, "key is not provided")
        if request.revision > self._data.revision:
            text = "mvcc: required revision is a future revision"
            raise refusal(StatusCode.OUT_OF_RANGE, text)
        if 0 < request.revision < self._data.compacted_revision:
            raise refusal(StatusCode.OUT_OF_RANGE, COMPACTED)
        return self._read(request, request.revision or self._data.revision)

    def _read(self, request: Any, revision: int) -> Any:
        if request.sort_order or request.sort_target:
            raise NotImplementedError("orders other than by key")
        keys = self._within(request.key, request.range_end, revision)
        shown = keys[: request.limit] if request.limit else keys
        reply = pb.RangeResponse(count=len(keys))
        if not request.count_only:
            reply.more = len(shown) < len(keys)
            reply.kvs.extend(self._at(key, revision) for key in shown)
        if request.keys_only:
            for kv in reply.kvs:
                kv.ClearField("value")
        return reply

    def _at(self, key: bytes, revision: int) -> Any:
        for written, kv in reversed(self._data.versions.get(key, ())):
            if written <= revision:
                return kv
        return None

    def _within(self, key: bytes, range_end: bytes, revision: int) -> list[bytes]:
        if not range_end:
            return [key] if self._at(key, revision) is not None else []
        ordered = self._data.keys_sorted
        if ordered is None:
            ordered = self._data.keys_sorted = sorted(self._data.versions)
        start = bisect_left(ordered, key)
        stop = len(ordered) if range_end == b"\0" else bisect_left(ordered, range_end)
        return [each for each in ordered[start:stop] if self._at(each, revision) is not None]

    # Leases.

    def _grant(self, request: Any) -> Any:
        if request.TTL > MAX_LEASE_TTL_S:
            raise refusal(StatusCode.OUT_OF_RANGE, "too large lease TTL")
        if request.ID in self._data.lease_ends_s:
            raise refusal(StatusCode.FAILED_PRECONDITION, "lease already exists")
        self._check_space()
        self._leases_granted += 1
        lease = request.ID or FIRST_LEASE + self._leases_granted
        ttl_s = max(MIN_LEASE_TTL_S, request.TTL)
        self._data.lease_ttls_s[lease] = ttl_s
        self._data.lease_ends_s[lease] = self._now_s() + ttl_s
        return pb.LeaseGrantResponse(ID=lease, TTL=ttl_s)

    def _keep_alive(self, request: Any) -> Any:
        ttl_s = 0
        if request.ID in self._data.lease_ends_s:
            ttl_s = self._data.lease_ttls_s[request.ID]
            self._data.lease_ends_s[request.ID] = self._now_s() + ttl_s
        return pb.LeaseKeepAliveResponse(ID=request.ID, TTL=ttl_s)

    def _time_to_live(self, request: Any) -> Any:
        ends_s = self._data.lease_ends_s.get(request.ID)
        if ends_s is None:
            return pb.LeaseTimeToLiveResponse(ID=request.ID, TTL=-1)
        granted_s = self._data.lease_ttls_s[request.ID]
        left_s = int(ends_s - self._now_s())
        return pb.LeaseTimeToLiveResponse(ID=request.ID, TTL=left_s, grantedTTL=granted_s)

    def _end_lease(self, lease: int) -> None:
        del self._data.lease_ends_s[lease]
        now, changes = self._data.revision, list[Change]()
        live = self._within(b"\0", b"\0", now)
        self._remove([k for k in live if self._at(k, now).lease == lease], now + 1, changes)
        self._committed(changes)


_MORE_FOLLOWS = b"\x38\x01"
"""``WatchResponse.fragment``, field 7."""


class _Watch:
    """A watch on a range of keys."""

    def __init__(self, request: Any, deliver: Callable[[Any], None]) -> None:
        self.request, self.deliver = request, deliver
        self._keys = range_of(request.key, request.range_end)
        self._filters = set(request.filters)
        # The messages of etcd3 lack this field, and the one that says that more follows.
        unknown: Any = UnknownFieldSet(request)
        self.takes_fragments = any((field.field_number, field.data) == (8, 1) for field in unknown)

    def wants(self, change: Change) -> bool:
        """Return whether it is told of a change."""
        first, end = self._keys
        kind = (
            pb.WatchCreateRequest.NODELETE if change.value is None else pb.WatchCreateRequest.NOPUT
        )
        return kind not in self._filters and first <= change.key and (not end or change.key < end)


def range_of(key: bytes, range_end: bytes) -> tuple[bytes, bytes]:
    """Return the first key of a range, and the first behind it, empty where there is none."""
    return key, b"" if range_end == b"\0" else range_end or key + b"\0"


def _always(operation: Any) -> Any:
    return pb.TxnRequest(success=[operation])
