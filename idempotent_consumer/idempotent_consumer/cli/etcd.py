"""etcd as an operator sees it: its members, and the services' records."""

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


class Found(NamedTuple):
    """A record with its mod_revision and its lease, which is 0 if it is kept for good."""

    record: Record
    mod_revision: int
    lease: int


class Etcd:
    """A client of etcd that sends one request at a time. Every request can raise EtcdError."""

    def __init__(self, settings: Settings) -> None:
        self._runner = asyncio.Runner()
        self._client = Client(settings, real_system())
        self._members = len(settings.etcd_endpoints)

    def ask(self, method: str, request: Any) -> Any:
        """Send a request to one member after another until one replies.

        A request that failed may have been applied, so it must be safe to send it twice.
        """
        left = self._members
        while True:
            try:
                return self._runner.run(self._client.call(method, request))
            except EtcdError as error:
                left -= 1
                if left and error.failure is Failure.UNKNOWN:
                    continue
                hint = "ETCD_ENDPOINTS says where it is"
                if error.failure is Failure.AUTHENTICATION:
                    hint = "ETCD_USER and ETCD_PASSWORD say who asks"
                raise EtcdError(error.failure, f"{error} ({hint})") from None

    def status(self) -> Any:
        """Return the status of the member that answers: version, size and leader."""
        return self.ask("Status", StatusRequest())

    def count(self, prefix: str) -> int:
        """Return the number of keys with a prefix: etcd counts them in its index, reading none."""
        key = prefix.encode()
        request = RangeRequest(key=key, range_end=prefix_end(key), count_only=True)
        return int(self.ask("Range", request).count)

    def record(self, service: str, event_id: str) -> Found | None:
        """Return an event's record, or None."""
        kv = self._get(names.record_key(service, event_id))
        return Found(decode(kv.value), kv.mod_revision, kv.lease) if kv is not None else None

    def remaining_s(self, lease: int) -> int | None:
        """Return the seconds a lease has left, or None without a lease."""
        if not lease:
            return None
        reply = self.ask("LeaseTimeToLive", LeaseTimeToLiveRequest(ID=lease))
        return max(0, int(reply.TTL))

    def forget(self, service: str, event_id: str, record: Record) -> bool:
        """Delete a record if it is still this one; return whether it is gone."""
        key, request = names.record_key(service, event_id), TxnRequest()
        value_is(request.compare, key, record.value)
        request.success.add().request_delete_range.key = key
        get(request.failure, key)
        reply = self.ask("Txn", request)
        # An earlier attempt whose reply was lost may have deleted it.
        return bool(reply.succeeded or not reply.responses[0].response_range.kvs)

    def incarnation(self, service: str) -> str | None:
        """Return the incarnation of etcd's data that the service has seen, or None."""
        kv = self._get(names.incarnation_key(service).encode())
        return kv.value.decode(errors="replace") if kv is not None else None

    def states(self, service: str) -> Counter[str]:
        """Count a service's records by state. This reads them all, at one revision."""
        found, pages = Counter[str](), Pages(names.record_prefix(service).encode())
        while pages.request is not None:
            try:
                reply = self.ask("Range", pages.request)
            except EtcdError as error:
                pages.failed(error)
                continue
            pages.took(reply)
            found.update(decode(kv.value).state for kv in reply.kvs)
        return found

    def close(self) -> None:
        """Close the connections."""
        self._runner.run(self._client.close())
        self._runner.close()

    def _get(self, key: bytes) -> Any:
        return next(iter(self.ask("Range", RangeRequest(key=key)).kvs), None)
