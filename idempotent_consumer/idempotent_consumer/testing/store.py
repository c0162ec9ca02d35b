"""etcd's data in memory: revisions, transactions and leases, as its API documentation has them.

``tests/integration/test_etcd_contract.py`` holds it against a real etcd.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from etcd3 import etcdrpc as pb
from etcd3.etcdrpc import kv_pb2

from ..ledger.etcd import EtcdError, Failure

MAX_LEASE_TTL_S = 9_000_000_000
MIN_LEASE_TTL_S = 2
FIRST_LEASE = 1000


class Change(NamedTuple):
    """One step of a key's history. A deletion has no value."""

    revision: int
    key: bytes
    value: bytes | None
    lease: int


def refusal(text: str, failure: Failure = Failure.UNKNOWN) -> EtcdError:
    """Return the error with which etcd refuses a request."""
    return EtcdError(failure, f"etcdserver: {text}")


class Data:
    """What a wipe loses and a snapshot keeps."""

    def __init__(self) -> None:
        self.revision = 1
        self.versions: dict[bytes, list[tuple[int, Any]]] = {}
        self.lease_ends_s: dict[int, float] = {}
        self.lease_ttls_s: dict[int, int] = {}
        self.keys_sorted: list[bytes] | None = []


class Store:
    """An etcd of one member. ``apply`` is one request; the rest is the test's own hand on it.

    ``history`` is every change since the start, over wipes and restores too. ``out_of_space`` is
    the NOSPACE alarm. ``changed`` is told of each change as it applies.
    """

    def __init__(self, now_s: Callable[[], float], max_txn_ops: int = 128) -> None:
        self._now_s, self.max_txn_ops = now_s, max_txn_ops
        self._data = Data()
        self._leases_granted = 0
        self.history: list[Change] = []
        self.out_of_space = False
        self.changed: Callable[[Change], None] = lambda _: None

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
        self._expire()
        self._end_lease(lease)

    def get(self, key: str) -> Any:
        """Return what a key holds, or None."""
        self._expire()
        return self._at(key.encode(), self._data.revision)

    def keys(self, prefix: str = "") -> list[str]:
        """Return the keys there are."""
        self._expire()
        start = prefix.encode()
        return [key.decode() for key in self._live(self._data.revision) if key.startswith(start)]

    def puts(self, prefix: str) -> list[Change]:
        """Return every put there has ever been of keys with this prefix."""
        start = prefix.encode()
        return [c for c in self.history if c.value is not None and c.key.startswith(start)]

    @property
    def leases(self) -> dict[int, float]:
        """Return the leases there are, with the time at which each ends."""
        self._expire()
        return dict(self._data.lease_ends_s)

    @property
    def revision(self) -> int:
        """Return the revision of the last change."""
        self._expire()
        return self._data.revision

    def snapshot(self) -> Data:
        """Return the present state, for ``restore``."""
        self._expire()
        return copy.deepcopy(self._data)

    def restore(self, snapshot: Data) -> None:
        """Go back to a snapshot, as an operator does with a backup."""
        self._data = copy.deepcopy(snapshot)

    def wipe(self) -> None:
        """Start anew with an empty data directory."""
        self._data = Data()

    # What etcd does.

    def apply(self, method: str, request: Any) -> Any:
        """Do what a request says and return the reply, or raise EtcdError and change nothing."""
        self._expire()
        known: dict[str, Callable[[Any], Any]] = {
            "Txn": self._txn,
            "Range": self._read_alone,
            "LeaseGrant": self._grant,
            "LeaseKeepAlive": self._keep_alive,
            "Authenticate": self._authenticate,
        }
        reply = known[method](request)
        if not reply.header.revision:
            reply.header.revision = self._data.revision
        return reply

    def _authenticate(self, _request: Any) -> Any:
        raise refusal("authentication is not enabled", Failure.AUTHENTICATION)

    def _txn(self, request: Any) -> Any:
        self._check(request)
        succeeded = all(self._holds(compare) for compare in request.compare)
        operations = request.success if succeeded else request.failure
        for operation in operations:
            if operation.HasField("request_put"):
                self._check_lease(operation.request_put.lease)
        revision, changes = self._data.revision + 1, list[Change]()
        responses = [self._do(operation, revision, changes) for operation in operations]
        if changes:
            self._data.revision = revision
        header = pb.ResponseHeader(revision=self._data.revision)
        for change in changes:
            self.history.append(change)
            self.changed(change)
        return pb.TxnResponse(header=header, succeeded=succeeded, responses=responses)

    def _check(self, request: Any) -> None:
        branches = (request.success, request.failure)
        if max(len(request.compare), *map(len, branches)) > self.max_txn_ops:
            raise refusal("too many operations in txn request")
        for branch in branches:
            keys = [op.request_put.key for op in branch if op.HasField("request_put")]
            if not all(keys):
                raise refusal("key is not provided")
            if len(set(keys)) < len(keys):
                raise refusal("duplicate key given in txn request")
        if self.out_of_space and any(
            op.HasField("request_put") for branch in branches for op in branch
        ):
            raise refusal("mvcc: database space exceeded")

    def _check_lease(self, lease: int) -> None:
        if lease and lease not in self._data.lease_ends_s:
            raise refusal("requested lease not found", Failure.LEASE_NOT_FOUND)

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
        self._append(
            key,
            revision,
            kv_pb2.KeyValue(
                key=key,
                value=value,
                lease=lease,
                mod_revision=revision,
                create_revision=old.create_revision if old else revision,
                version=old.version + 1 if old else 1,
            ),
        )
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
            raise refusal("key is not provided")
        if request.revision > self._data.revision:
            raise refusal("mvcc: required revision is a future revision")
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

    def _live(self, revision: int) -> list[bytes]:
        return self._within(b"\0", b"\0", revision)

    def _within(self, key: bytes, range_end: bytes, revision: int) -> list[bytes]:
        if not range_end:
            return [key] if self._at(key, revision) is not None else []
        ordered = self._data.keys_sorted
        if ordered is None:
            ordered = self._data.keys_sorted = sorted(self._data.versions)
        start = bisect_right(ordered, key)
        start -= start > 0 and ordered[start - 1] == key
        found = []
        for candidate in ordered[start:]:
            if range_end != b"\0" and candidate >= range_end:
                break
            if self._at(candidate, revision) is not None:
                found.append(candidate)
        return found

    # Leases.

    def _grant(self, request: Any) -> Any:
        if request.TTL > MAX_LEASE_TTL_S:
            raise refusal("too large lease TTL")
        if request.ID in self._data.lease_ends_s:
            raise refusal("lease already exists")
        if self.out_of_space:
            raise refusal("mvcc: database space exceeded")
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

    def _expire(self) -> None:
        """End what has run out; nobody has looked since, so it may as well be now."""
        now_s = self._now_s()
        ended = [
            (ends_s, lease) for lease, ends_s in self._data.lease_ends_s.items() if ends_s <= now_s
        ]
        for _, lease in sorted(ended):
            self._end_lease(lease)

    def _end_lease(self, lease: int) -> None:
        del self._data.lease_ends_s[lease]
        now, changes = self._data.revision, list[Change]()
        attached = [key for key in self._live(now) if self._at(key, now).lease == lease]
        self._remove(attached, now + 1, changes)
        if changes:
            self._data.revision += 1
            self.history.extend(changes)


def _always(operation: Any) -> Any:
    return pb.TxnRequest(success=[operation])
