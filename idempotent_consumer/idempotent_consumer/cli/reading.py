"""A service's records as an operator sees them: one by one, counted, and deleted by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from .. import names
from . import messages as m
from .keyspace import Pages
from .records import Record, decode


class Asking(Protocol):
    """The part of etcd's client that this needs. Raises EtcdError."""

    def ask(self, method: str, request: Any) -> Any:
        """Send a request and return its reply."""
        ...


class Found(NamedTuple):
    """A record with the lease that it is kept under, 0 where it is kept for good."""

    record: Record
    lease: int


class Records:
    """The records of one service. Raises EtcdError throughout."""

    def __init__(self, etcd: Asking, service: str) -> None:
        self._etcd, self._service = etcd, service
        self._prefix = names.record_prefix(service).encode()

    def get(self, event_id: str) -> Found | None:
        """Return an event's record, or None."""
        key = names.record_key(self._service, event_id)
        kvs = self._etcd.ask("Range", m.RangeRequest(key=key)).kvs
        return Found(decode(kvs[0].value, kvs[0].mod_revision), kvs[0].lease) if kvs else None

    def remaining_s(self, lease: int) -> int | None:
        """Return the seconds a lease has left, or None for what is kept for good."""
        if not lease:
            return None
        reply = self._etcd.ask("LeaseTimeToLive", m.LeaseTimeToLiveRequest(ID=lease))
        return max(0, int(reply.TTL))

    def forget(self, event_id: str, mod_revision: int) -> bool:
        """Delete a record if it is still at this revision; return whether it is gone."""
        key, request = names.record_key(self._service, event_id), m.TxnRequest()
        m.unchanged(request.compare, key, mod_revision)
        request.success.add().request_delete_range.key = key
        m.get(request.failure, key)
        reply = self._etcd.ask("Txn", request)
        # Sent twice, the first may have applied: then it is absent.
        return bool(reply.succeeded or not reply.responses[0].response_range.kvs)

    def incarnation(self) -> str | None:
        """Return which life of etcd's data the service knows, or None where it knows none."""
        key = names.incarnation_key(self._service).encode()
        kvs = self._etcd.ask("Range", m.RangeRequest(key=key)).kvs
        return kvs[0].value.decode(errors="replace") if kvs else None

    def count(self) -> int:
        """Return how many there are: etcd counts keys in its index and reads none of them."""
        return int(
            self._etcd.ask(
                "Range",
                m.RangeRequest(
                    key=self._prefix, range_end=m.prefix_end(self._prefix), count_only=True
                ),
            ).count
        )

    def states(self) -> Counter[str]:
        """Return how many there are in each state. It reads them all, at one revision."""
        return Counter(
            decode(kv.value, kv.mod_revision).state for page in self._pages() for kv in page
        )

    def _pages(self) -> Iterator[Any]:
        pages = Pages(self._prefix)
        while pages.request is not None:
            reply = self._etcd.ask("Range", pages.request)
            pages.took(reply)
            yield reply.kvs
