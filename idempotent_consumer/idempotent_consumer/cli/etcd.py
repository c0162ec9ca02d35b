"""etcd as an operator sees it: its members, and a service's records one by one or counted."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from etcd3.etcdrpc import (
    AlarmRequest,
    AlarmType,
    LeaseTimeToLiveRequest,
    RangeRequest,
    StatusRequest,
    TxnRequest,
)

from .. import names
from ..cache import Pages
from ..etcd import Client, EtcdError, Failure, get, prefix_end, unchanged
from ..records import Record, decode
from ..service import real_system
from ..settings import Settings


class Asking(Protocol):
    """The part of etcd's client that this needs. Raises EtcdError."""

    def ask(self, method: str, request: Any) -> Any:
        """Send a request and return its reply."""
        ...


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
        return self._runner.run(self._ask(method, request))

    async def _ask(self, method: str, request: Any) -> Any:
        for left in reversed(range(self._members)):
            at = self._client.endpoint
            try:
                return await self._client.call(method, request)
            except EtcdError as error:
                if not left or error.failure is not Failure.UNKNOWN:
                    raise EtcdError(error.failure, _explain(at, error)) from None
        raise AssertionError("there is a member at least")

    def close(self) -> None:
        """Close the connections."""
        self._runner.run(self._client.close())
        self._runner.close()


def _explain(at: str, error: EtcdError) -> str:
    refused = error.failure is Failure.AUTHENTICATION
    look_at = (
        "ETCD_USER and ETCD_PASSWORD say who asks" if refused else "ETCD_ENDPOINTS says where it is"
    )
    return f"etcd at {at}: {error} ({look_at})"


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
        kvs = self._etcd.ask("Range", RangeRequest(key=key)).kvs
        return Found(decode(kvs[0].value, kvs[0].mod_revision), kvs[0].lease) if kvs else None

    def remaining_s(self, lease: int) -> int | None:
        """Return the seconds a lease has left, or None for what is kept for good."""
        if not lease:
            return None
        reply = self._etcd.ask("LeaseTimeToLive", LeaseTimeToLiveRequest(ID=lease))
        return max(0, int(reply.TTL))

    def forget(self, event_id: str, mod_revision: int) -> bool:
        """Delete a record if it is still at this revision; return whether it is gone."""
        key, request = names.record_key(self._service, event_id), TxnRequest()
        unchanged(request.compare, key, mod_revision)
        request.success.add().request_delete_range.key = key
        get(request.failure, key)
        reply = self._etcd.ask("Txn", request)
        # Sent twice, the first may have applied: then it is absent.
        return bool(reply.succeeded or not reply.responses[0].response_range.kvs)

    def incarnation(self) -> str | None:
        """Return which life of etcd's data the service knows, or None where it knows none."""
        key = names.incarnation_key(self._service).encode()
        kvs = self._etcd.ask("Range", RangeRequest(key=key)).kvs
        return kvs[0].value.decode(errors="replace") if kvs else None

    def count(self) -> int:
        """Return how many there are: etcd counts keys in its index and reads none of them."""
        return int(
            self._etcd.ask(
                "Range",
                RangeRequest(key=self._prefix, range_end=prefix_end(self._prefix), count_only=True),
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


class Member(NamedTuple):
    """What the member that answers says of itself."""

    version: str
    size_bytes: int
    has_leader: bool


def member(etcd: Asking) -> Member:
    """Ask one member for its status. Raises EtcdError."""
    status = etcd.ask("Status", StatusRequest())
    return Member(status.version, int(status.dbSize), bool(status.leader))


def alarms(etcd: Asking) -> list[str]:
    """Return the names of the alarms that are on: NOSPACE, CORRUPT. Raises EtcdError."""
    raised = etcd.ask("Alarm", AlarmRequest(action=AlarmRequest.GET)).alarms
    return sorted({AlarmType.Name(each.alarm) for each in raised})


def takes_operations(etcd: Asking, operations: int, key: bytes) -> bool:
    """Return whether etcd takes so many operations in a transaction: each reads this key."""
    request = TxnRequest()
    for _ in range(operations):
        get(request.success, key)
    try:
        etcd.ask("Txn", request)
    except EtcdError as error:
        if "too many operations" in str(error):
            return False
        raise
    return True
