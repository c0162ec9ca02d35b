"""etcd's client: ``reply = await client.call("Txn", request)``, or EtcdError. gRPC ends here.

The messages are etcd3's generated ones. They have no type information, so they are ``Any`` here.
"""

from __future__ import annotations

import asyncio
import enum
import re
from collections.abc import AsyncIterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from etcd3 import etcdrpc
from etcd3.etcdrpc import AuthenticateRequest, Compare, WatchRequest, WatchResponse

from .settings import Settings
from .system import System

CALL_TIMEOUT_S = 5.0  # The deadline of a call with one endpoint.

FAILOVER_TIMEOUT_S = 3.0
"""The deadline of a call with several endpoints. A leader that vanishes can cost two calls: one to
a member that waits for the leader, and one to the leader itself."""

MAX_REQUEST_BYTES = 1536 * 1024  # etcd's default --max-request-bytes.

_CHANNEL_OPTIONS = (
    # gRPC's default is 4 MiB; a page of records can be larger.
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_retries", 0),
    # A proxy that is configured for containers would get every call, logins included.
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
    # Detects a peer that vanished without closing; etcd allows a ping every 5 s at most.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # A watch may send nothing for hours, and needs pings all the same.
    ("grpc.http2.max_pings_without_data", 0),
)

_REQUIRE_LEADER = ("hasleader", "true")
"""A member without a leader then refuses calls at once instead of letting them wait, and ends its
watches (clientv3.WithRequireLeader in etcd's Go client)."""

_SERVICES = {
    "Txn": "KV",
    "Range": "KV",
    "LeaseGrant": "Lease",
    # A stream in etcd's interface; one request and one reply are a unary call on the wire.
    "LeaseKeepAlive": "Lease",
    "LeaseTimeToLive": "Lease",
    "Authenticate": "Auth",
    "Status": "Maintenance",
    "Alarm": "Maintenance",
}
"""etcd's gRPC service for each method."""


class Failure(enum.Enum):
    """How a call can fail. Whatever the failure, the request may have applied, or may yet.

    The values are patterns of etcd's error texts (api/v3rpc/rpctypes in its source), and of gRPC's
    for a message that is too large. The last one matches any other text.
    """

    LEASE_NOT_FOUND = "lease not found"
    COMPACTED = "has been compacted"
    TOO_LARGE = "received message larger than max"
    AUTHENTICATION = (
        "invalid auth token|revision of auth store is old|user name is empty|user name not found|"
        "authentication failed|authentication is not enabled|permission denied"
    )
    UNKNOWN = ""


_HINTS = {
    "certificate_verify_failed": "etcd's certificate is not from the authority in ETCD_CA_CERT",
    "hostname verification": "etcd's certificate is for other names than ETCD_ENDPOINTS has",
    "tsi_data_corrupted": "etcd has refused the certificate of ETCD_CERT, or wants one",
    "wrong_version_number": "etcd speaks no TLS, and ETCD_CA_CERT is set",
    "user name is empty": "etcd wants a login, and ETCD_USER is unset",
    "authentication is not enabled": "etcd has no logins, and ETCD_USER is set",
    "grpc: received message larger than max": "etcd's --max-request-bytes is less than its default",
    "request is too large": "etcd's --max-request-bytes is less than its default",
    "too many operations": "ETCD_MAX_TXN_OPS is more than etcd's --max-txn-ops",
    "socket closed": "etcd has closed the connection (one that wants TLS, and ETCD_CA_CERT, does)",
}
"""What to say before etcd's or gRPC's own message, by a part of that message."""


class EtcdError(Exception):
    """A call to etcd failed; the message is etcd's or gRPC's, in one line."""

    def __init__(self, failure: Failure, why: str) -> None:
        super().__init__(why)
        self.failure = failure


class Client:
    """Calls to etcd's members, on one channel each. After a failure it asks the next member.

    This is not etcd3's client, whose failover marks an endpoint as failed for minutes and raises
    meanwhile.
    """

    def __init__(self, settings: Settings, system: System) -> None:
        self._settings, self._open = settings, system.open_channel
        self._channels: list[Any] = [None] * len(settings.etcd_endpoints)
        # A random one, so that the replicas of a service do not all ask the same member.
        self._current = system.random.randrange(len(self._channels))
        self._timeout_s = FAILOVER_TIMEOUT_S if len(self._channels) > 1 else CALL_TIMEOUT_S
        self._token: str | None = None
        self.revision = 0
        """The highest revision in any reply to a call."""

    async def call(self, method: str, request: Any, timeout_s: float | None = None) -> Any:
        """Send a request, after a login if there is a user, and return the reply.

        ``timeout_s`` replaces the default deadline. Raises EtcdError; the request may still have
        applied, or apply later.
        """
        user, password = self._settings.etcd_user, self._settings.etcd_password
        if user is not None and self._token is None:
            login = AuthenticateRequest(name=user, password=password)
            self._token = (await self._send("Authenticate", login, self._timeout_s)).token
        return await self._send(method, request, timeout_s or self._timeout_s)

    async def watch(self, request: Any) -> AsyncIterator[Any]:
        """Open a watch and yield its replies. Raises EtcdError when the watch ends."""
        at = self._current
        channel, ended = self._channel(at), asyncio.Event()

        async def requests() -> AsyncIterator[Any]:
            yield request
            await ended.wait()  # etcd ends the watch when the stream of requests ends.

        watch = channel.stream_stream(
            "/etcdserverpb.Watch/Watch",
            request_serializer=WatchRequest.SerializeToString,
            response_deserializer=WatchResponse.FromString,
        )
        try:
            async for reply in watch(requests(), metadata=self._metadata()):
                if reply.canceled:
                    compacted = reply.compact_revision > 0
                    why = "has been compacted" if compacted else reply.cancel_reason
                    raise EtcdError(*_classify(why))
                yield reply
            raise EtcdError(Failure.UNKNOWN, "the watch ended")
        except (grpc.RpcError, grpc.aio.UsageError) as error:
            raise self._failed(at, channel, error) from None
        finally:
            ended.set()

    async def close(self) -> None:
        """Cancel every call and watch under way."""
        for channel in self._channels:
            if channel is not None:
                await channel.close()

    def _channel(self, at: int) -> Any:
        # Opened on first use: gRPC binds a channel to the loop that is running then.
        channel = self._channels[at]
        if channel is None:
            host, port = self._settings.etcd_endpoints[at]
            channel = self._channels[at] = self._open(self._settings, host, port)
        return channel

    async def _send(self, method: str, request: Any, timeout_s: float) -> Any:
        at = self._current
        channel = self._channel(at)
        send = channel.unary_unary(
            f"/etcdserverpb.{_SERVICES[method]}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=getattr(etcdrpc, f"{method}Response").FromString,
        )
        try:
            reply = await send(request, timeout=timeout_s, metadata=self._metadata())
        except (grpc.RpcError, grpc.aio.UsageError) as error:
            raise self._failed(at, channel, error) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # gRPC cancels the calls of a closed channel. This task is not cancelled, and the
            # call's outcome is unknown.
            raise EtcdError(Failure.UNKNOWN, "the channel was closed") from None
        self.revision = max(self.revision, reply.header.revision)
        return reply

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (_REQUIRE_LEADER, *((("token", self._token),) if self._token else ()))

    def _failed(self, at: int, channel: Any, error: Exception) -> EtcdError:
        """Go on to the next member, or to a new login; return the failure as an EtcdError.

        A channel whose name did not resolve is replaced: it would wait up to two minutes before it
        looks the name up again.
        """
        details = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
        failure, why = _classify(details or str(error))
        host, port = self._settings.etcd_endpoints[at]
        if failure is Failure.AUTHENTICATION:
            self._token = None
        elif at == self._current and channel is self._channels[at]:
            if "resol" in str(details).lower():  # "DNS resolution failed", "errors resolving"
                self._channels[at] = None
            self._current = (at + 1) % len(self._channels)
        return EtcdError(failure, f"etcd at {host}:{port}: {why}")


def open_channel(settings: Settings, host: str, port: int) -> Any:
    """Open a gRPC channel to one member of a real etcd, with TLS if ETCD_CA_CERT is set."""
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if settings.etcd_ca_cert is None:
        return grpc.aio.insecure_channel(target, _CHANNEL_OPTIONS)
    credentials = _credentials(settings.etcd_ca_cert, settings.etcd_key, settings.etcd_cert)
    return grpc.aio.secure_channel(target, credentials, _CHANNEL_OPTIONS)


@lru_cache
def _credentials(*files: str | None) -> Any:
    contents = [Path(file).read_bytes() if file else None for file in files]
    return grpc.ssl_channel_credentials(*contents)


def _classify(text: str) -> tuple[Failure, str]:
    """Classify a failure by its text, which says more than the status code; add a hint."""
    line = " ".join(text.split())
    lowered = line.lower()
    failure = next(failure for failure in Failure if re.search(failure.value, lowered))
    hints = [hint for part, hint in _HINTS.items() if part in lowered]
    return failure, ": ".join([*hints, line]) if line else "no reason given"


# Messages.


def put(operations: Any, key: bytes, value: bytes, lease: int = 0) -> None:
    """Add a put to a transaction's operations.

    This function and the next two build a transaction in place. Making a message first and copying
    it into the transaction costs three times as much.
    """
    request = operations.add().request_put
    request.key, request.value, request.lease = key, value, lease


def get(operations: Any, key: bytes) -> None:
    """Add the read of a key to a transaction's operations."""
    operations.add().request_range.key = key


def value_is(compares: Any, key: bytes, value: bytes | None) -> None:
    """Add the comparison that the key has this value, or that it is absent if that is None."""
    compare = compares.add()  # Its default operator is EQUAL.
    compare.key = key
    if value is None:  # An absent key has revision 0, and is not equal to any value.
        compare.mod_revision, compare.target = 0, Compare.MOD
    else:
        compare.value, compare.target = value, Compare.VALUE


def prefix_end(prefix: bytes) -> bytes:
    """Return the end of the range of all keys with a prefix (one that does not end in 0xff)."""
    return prefix[:-1] + bytes([prefix[-1] + 1])
