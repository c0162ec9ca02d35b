"""etcd's messages, as etcd3 generates them, and short ways to write the ones used here.

``etcd3`` has no type information, so its messages are ``Any`` from here on.
"""

from __future__ import annotations

from typing import Any

from etcd3.etcdrpc import (
    AuthenticateRequest,
    AuthenticateResponse,
    Compare,
    LeaseGrantRequest,
    LeaseGrantResponse,
    LeaseKeepAliveRequest,
    LeaseKeepAliveResponse,
    PutRequest,
    RangeRequest,
    RangeResponse,
    RequestOp,
    TxnRequest,
    TxnResponse,
    WatchCreateRequest,
    WatchRequest,
    WatchResponse,
)

__all__ = [
    "AuthenticateRequest",
    "AuthenticateResponse",
    "LeaseGrantRequest",
    "LeaseGrantResponse",
    "LeaseKeepAliveRequest",
    "LeaseKeepAliveResponse",
    "RangeRequest",
    "RangeResponse",
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
]


def put(key: bytes, value: bytes, lease: int = 0) -> Any:
    """Return the operation that writes a key."""
    return RequestOp(request_put=PutRequest(key=key, value=value, lease=lease))


def get(key: bytes) -> Any:
    """Return the operation that reads a key."""
    return RequestOp(request_range=RangeRequest(key=key))


def unchanged(key: bytes, mod_revision: int) -> Any:
    """Return the comparison that holds while the key is at this revision.

    An absent key compares as revision 0, so 0 is: absent.
    """
    return Compare(
        result=Compare.EQUAL, target=Compare.MOD, key=key, mod_revision=mod_revision
    )


def value_is(key: bytes, value: bytes) -> Any:
    """Return the comparison that holds while the key has this value."""
    return Compare(result=Compare.EQUAL, target=Compare.VALUE, key=key, value=value)


def prefix_end(prefix: bytes) -> bytes:
    """Return the end of the range of all keys with a prefix (one that does not end in 0xff)."""
    return prefix[:-1] + bytes([prefix[-1] + 1])
