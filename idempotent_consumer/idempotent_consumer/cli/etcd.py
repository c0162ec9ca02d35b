"""etcd as an operator sees it: its members, and a service's records one by one or counted."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, NamedTuple

from etcd3.etcdrpc import LeaseTimeToLiveRequest, RangeRequest, StatusRequest, TxnRequest

from .. import names
from ..cache import Pages
from ..etcd import Client, EtcdError, Failure, get, prefix_end, value_is
from ..records import Record, decode
from ..service import real_system
from ..settings import Settings


class Etcd:
    """etcd's client for one question at a time, on the caller's thread."""

    def __init__(self, settings: Settings) -> None:
        self._runner = asyncio.Runner()
        self._client = Client(settings, real_system())
        self._members = len(settings.etcd_endpoints)

    def ask(self, method: str, request: Any) -> Any:
        """Send a request to one member after the other until one replies. Raises EtcdError.

        A request that failed may have applied, so it has to be one that can be sent twice.
        """
        for left in reversed(range(self._members)):
            try:
                return self._runner.run(self._client.call(method, request))
            except EtcdError as error:
                if not left or error.failure is not Failure.UNKNOWN:
                    hint = "ETCD_ENDPOINTS says where it is"
                    if error.failure is Failure.AUTHENTICATION:
                        hint = "ETCD_USER and ETCD_PASSWORD say who asks"
                    raise EtcdError(error.failure, f"{error} ({hint})") from None
        raise AssertionError("there is a member at least")

    def count(self, prefix: str) -> int:
        """Return how many keys begin so: etcd counts them in its index and reads none of them."""
        key = prefix.encode()
        request = RangeRequest(key=key, range_end=prefix_end(key), count_only=True)
        return int(self.ask("Range", request).count)

    def status(self) -> Any:
        """Ask the member that answers for its version, its size and whether it has a leader."""
        return self.ask("Status", StatusRequest())

    def close(self) -> None:
        """Close the connections."""
        self._runner.run(self._client.close())
        self._runner.close()


class Found(NamedTuple):
    """A record with its mod_revision and its lease, 0 where it is kept for good."""

    record: Record
    mod_revision: int
    lease: int


class Records:
    """The records of one service. Raises EtcdError throughout."""

    def __init__(self, etcd: Etcd, service: str) -> None:
        self._etcd, self._service = etcd, service
        self._prefix = names.record_prefix(service).encode()

    def get(self, event_id: str) -> Found | None:
        """Return an event's record, or None."""
        kv = self._read(names.record_key(self._service, event_id))
        return Found(decode(kv.value), kv.mod_revision, kv.lease) if kv is not None else None

    def remaining_s(self, lease: int) -> int | None:
        """Return the seconds a lease has left, or None for what is kept for good."""
        if not lease:
            return None
        reply = self._etcd.ask("LeaseTimeToLive", LeaseTimeToLiveRequest(ID=lease))
        return max(0, int(reply.TTL))

    def forget(self, event_id: str, record: Record) -> bool:
        """Delete a record if it is still this one; return whether it is gone."""
        key, request = names.record_key(self._service, event_id), TxnRequest()
        value_is(request.compare, key, record.value)
        request.success.add().request_delete_range.key = key
        get(request.failure, key)
        reply = self._etcd.ask("Txn", request)
        # Sent twice, the first may have applied: then it is absent.
        return bool(reply.succeeded or not reply.responses[0].response_range.kvs)

    def incarnation(self) -> str | None:
        """Return which life of etcd's data the service knows, or None where it knows none."""
        kv = self._read(names.incarnation_key(self._service).encode())
        return kv.value.decode(errors="replace") if kv is not None else None

    def count(self) -> int:
        """Return how many there are."""
        return self._etcd.count(names.record_prefix(self._service))

    def states(self) -> Counter[str]:
        """Return how many there are in each state. It reads them all, at one revision."""
        found, pages = Counter[str](), Pages(self._prefix)
        while pages.request is not None:
            try:
                reply = self._etcd.ask("Range", pages.request)
            except EtcdError as error:
                pages.failed(error)
                continue
            pages.took(reply)
            found.update(decode(kv.value).state for kv in reply.kvs)
        return found

    def _read(self, key: bytes) -> Any:
        """Return a key with its value, or None."""
        return next(iter(self._etcd.ask("Range", RangeRequest(key=key)).kvs), None)
