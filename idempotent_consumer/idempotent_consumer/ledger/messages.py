"""etcd's messages, as etcd3 generates them, and short ways to write the ones used here.

``etcd3`` has no type information, so its messages are ``Any`` from here on.
"""

from __future__ import annotations

from typing import Any

from etcd3.etcdrpc import (
    AlarmRequest,
    AlarmResponse,
    AlarmType,
    AuthenticateRequest,
    AuthenticateResponse,
    Compare,
    LeaseGrantRequest,
    LeaseGrantResponse,
    LeaseKeepAliveRequest,
    LeaseKeepAliveResponse,
    LeaseTimeToLiveRequest,
    LeaseTimeToLiveResponse,
    RangeRequest,
    RangeResponse,
    StatusRequest,
    StatusResponse,
    TxnRequest,
    TxnResponse,
    WatchCreateRequest,
    WatchRequest,
    WatchResponse,
)

__all__ = [
    "AlarmRequest",
    "AlarmResponse",
    "AlarmType",
    "AuthenticateRequest",
    "AuthenticateResponse",
    "LeaseGrantRequest",
    "LeaseGrantResponse",
    "LeaseKeepAliveRequest",
    "LeaseKeepAliveResponse",
    "LeaseTimeToLiveRequest",
    "LeaseTimeToLiveResponse",
    "RangeRequest",
    "RangeResponse",
    "StatusRequest",
    "StatusResponse",
    "TxnRequest",
    "TxnResponse",
    "WatchCreateRequest",
    "WatchRequest",
    "WatchResponse",
    "get",
    "prefix_end",
    "put",
    "unchanged",
    "value_is",
    "writes",
]


def put(operations: Any, key: bytes, value: bytes, lease: int = 0) -> None:
    """Add the operation that writes a key.

    These build a transaction in place: a message made apart would be copied into it, which
    costs three times as much.
    """
    request = operations.add().request_put
    request.key, request.value, request.lease = key, value, lease


def get(operations: Any, key: bytes) -> None:
    """Add the operation that reads a key."""
    operations.add().request_range.key = key


def writes(request: Any) -> bool:
    """Return whether a transaction puts anything."""
    return any(operation.HasField("request_put") for operation in request.success)


def unchanged(compares: Any, key: bytes, mod_revision: int) -> None:
    """Add the comparison that holds while the key is at this revision.

    An absent key compares as revision 0, so 0 is: absent.
    """
    compares.add(key=key, mod_revision=mod_revision, result=Compare.EQUAL, target=Compare.MOD)


def value_is(compares: Any, key: bytes, value: bytes) -> None:
    """Add the comparison that holds while the key has this value."""
    compares.add(key=key, value=value, result=Compare.EQUAL, target=Compare.VALUE)


def prefix_end(prefix: bytes) -> bytes:
    """Return the end of the range of all keys with a prefix (one that does not end in 0xff)."""
    return prefix[:-1] + bytes([prefix[-1] + 1])
