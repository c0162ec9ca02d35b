"""The connection to etcd: calls that end in a reply or a failure, to the endpoint that answers.

The only module with gRPC in it; etcd3's generated messages stand in ``messages.py``.
"""

from __future__ import annotations

import enum
import random
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, Protocol

import etcd3
import grpc
from etcd3.client import MultiEndpointEtcd3Client

from ..settings import Settings
from . import messages as m

CALL_TIMEOUT_S = 5.0
"""The deadline of a call where there is one endpoint."""

FAILOVER_TIMEOUT_S = 3.0
"""The deadline where there are several. A leader that vanishes without a word can cost two calls:
one by a member that waits for it, then one by itself."""

MAX_REQUEST_BYTES = 1536 * 1024
"""etcd's default --max-request-bytes."""

_MAX_REPLY_BYTES = 64 * 1024 * 1024
"""gRPC receives 4 MiB unless told otherwise; a page of records can be larger."""

_CHANNEL_OPTIONS = {
    "grpc.max_receive_message_length": _MAX_REPLY_BYTES,
    "grpc.max_send_message_length": -1,
    "grpc.enable_retries": 0,
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.min_reconnect_backoff_ms": 1000,
    "grpc.max_reconnect_backoff_ms": 2000,
    "grpc.dns_min_time_between_resolutions_ms": 1000,
    # Finds a peer that vanished without closing; etcd allows a ping every 5 s at most.
    "grpc.keepalive_time_ms": 10_000,
    "grpc.keepalive_timeout_ms": 5_000,
    # A watch may send nothing for hours, and has to be pinged all the same.
    "grpc.http2.max_pings_without_data": 0,
}

_REQUIRE_LEADER = ("hasleader", "true")
"""A member that is cut off from the others refuses at once what it would else let wait, and ends
its watches (clientv3.WithRequireLeader in etcd's Go client)."""

_METHODS: dict[str, tuple[str, Any]] = {
    "Txn": ("KV", m.TxnResponse),
    "Range": ("KV", m.RangeResponse),
    "LeaseGrant": ("Lease", m.LeaseGrantResponse),
    # A stream in etcd's interface; one request and one reply are a unary call on the wire.
    "LeaseKeepAlive": ("Lease", m.LeaseKeepAliveResponse),
    "LeaseTimeToLive": ("Lease", m.LeaseTimeToLiveResponse),
    "Authenticate": ("Auth", m.AuthenticateResponse),
    "Status": ("Maintenance", m.StatusResponse),
    "Alarm": ("Maintenance", m.AlarmResponse),
}


class Failure(enum.Enum):
    """How a call can fail. None of them says that the request did not, or will not, apply."""

    LEASE_NOT_FOUND = enum.auto()
    AUTHENTICATION = enum.auto()
    COMPACTED = enum.auto()
    UNKNOWN = enum.auto()


_TEXTS = {
    "lease not found": Failure.LEASE_NOT_FOUND,
    "has been compacted": Failure.COMPACTED,
    "invalid auth token": Failure.AUTHENTICATION,
    "revision of auth store is old": Failure.AUTHENTICATION,
    "user name is empty": Failure.AUTHENTICATION,
    "user name not found": Failure.AUTHENTICATION,
    "authentication failed": Failure.AUTHENTICATION,
    "authentication is not enabled": Failure.AUTHENTICATION,
    "permission denied": Failure.AUTHENTICATION,
}
"""From etcd's own list of errors (api/v3rpc/rpctypes)."""


_HINTS = {
    "certificate_verify_failed": "etcd's certificate is not from the authority in ETCD_CA_CERT",
    "hostname verification": "etcd's certificate is for other names than ETCD_ENDPOINTS has",
    "tsi_data_corrupted": "etcd has refused the certificate of ETCD_CERT, or wants one",
    "too many operations": "ETCD_MAX_TXN_OPS is more than etcd's --max-txn-ops",
    "socket closed": "etcd has closed the connection (one that wants TLS, and ETCD_CA_CERT, does)",
}
"""What to say ahead of etcd's or gRPC's own words, by a part of them."""


class EtcdError(Exception):
    """A call to etcd failed; the message is etcd's or gRPC's, in one line."""

    def __init__(self, failure: Failure, why: str) -> None:
        super().__init__(why)
        self.failure = failure


Answered = Callable[[Any, EtcdError | None], None]
"""What a call ends with: its reply, or None and the error. Called on any thread."""


class Client(Protocol):
    """The part of etcd that the ledger needs; the tests' in-memory etcd has it too."""

    def call(self, method: str, request: Any, answered: Answered) -> None:
        """Send a request and return at once."""
        ...

    def close(self) -> None:
        """End what is under way."""
        ...


class Etcd:
    """A Client on real etcd servers: one channel an endpoint, the next one after a failure.

    etcd3's own failover marks an endpoint as failed for minutes and raises meanwhile, so its
    channels and messages are used here and its client is not.
    """

    def __init__(self, settings: Settings) -> None:
        self._credentials = None
        if settings.etcd_ca_cert:
            self._credentials = MultiEndpointEtcd3Client.get_secure_creds(
                settings.etcd_ca_cert, settings.etcd_key, settings.etcd_cert
            )
        self._addresses = settings.etcd_endpoints
        self._endpoints = [self._endpoint(*address) for address in self._addresses]
        # At random, so that the replicas of a service do not all ask one member.
        self._current = random.randrange(len(self._endpoints))
        self._timeout_s = FAILOVER_TIMEOUT_S if len(self._endpoints) > 1 else CALL_TIMEOUT_S
        self._login = (settings.etcd_user, settings.etcd_password)
        self._token: str | None = None

    def call(self, method: str, request: Any, answered: Answered) -> None:
        """Send a request, with a token where etcd wants one, and return at once."""
        if self._login[0] is not None and self._token is None:
            self._authenticate(method, request, answered)
        else:
            self._send(method, request, answered)

    def watch(self, request: Any) -> Iterator[Any]:
        """Open a watch and iterate over its replies; blocks. Raises EtcdError when it ends."""
        endpoint = self._endpoints[self._current]
        ended = threading.Event()

        def requests() -> Iterator[Any]:
            yield request
            ended.wait()  # etcd ends the watch when its requests end.

        try:
            for reply in endpoint.channel.stream_stream(
                "/etcdserverpb.Watch/Watch",
                request_serializer=m.WatchRequest.SerializeToString,
                response_deserializer=m.WatchResponse.FromString,
            )(requests(), metadata=self._metadata()):
                if reply.canceled:
                    compacted = reply.compact_revision > 0
                    raise EtcdError(
                        *_classify("has been compacted" if compacted else reply.cancel_reason)
                    )
                yield reply
            raise EtcdError(Failure.UNKNOWN, "the watch ended")
        except (grpc.RpcError, ValueError) as error:
            raise self._failed(endpoint, error) from None
        finally:
            ended.set()

    def call_and_wait(self, method: str, request: Any) -> Any:
        """Send a request and wait for its reply, on a thread of the caller's. Raises EtcdError."""
        return begin(self.call, method, request)()

    def close(self) -> None:
        """End every call and stream that is under way."""
        for endpoint in self._endpoints:
            endpoint.close()

    def _endpoint(self, host: str, port: int) -> Any:
        return etcd3.Endpoint(
            host=f"[{host}]" if ":" in host else host,
            port=port,
            secure=self._credentials is not None,
            creds=self._credentials,
            opts=list(_CHANNEL_OPTIONS.items()),
        )

    def _send(self, method: str, request: Any, answered: Answered) -> None:
        endpoint = self._endpoints[self._current]
        group, reply_type = _METHODS[method]
        stub = endpoint.channel.unary_unary(
            f"/etcdserverpb.{group}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=reply_type.FromString,
        )

        def finished(call: Any) -> None:
            try:
                reply = call.result()
            except (grpc.RpcError, grpc.FutureCancelledError) as error:
                answered(None, self._failed(endpoint, error))
            else:
                answered(reply, None)

        try:
            future = stub.future(request, timeout=self._timeout_s, metadata=self._metadata())
        except ValueError as error:  # The channel has been closed.
            answered(None, EtcdError(Failure.UNKNOWN, str(error)))
        else:
            future.add_done_callback(finished)

    def _authenticate(self, method: str, request: Any, answered: Answered) -> None:
        user, password = self._login

        def authenticated(reply: Any, error: EtcdError | None) -> None:
            if error is not None:
                answered(None, error)
            else:
                self._token = reply.token
                self._send(method, request, answered)

        login = m.AuthenticateRequest(name=user, password=password)
        self._send("Authenticate", login, authenticated)

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        token = self._token
        return (_REQUIRE_LEADER, *((("token", token),) if token else ()))

    def _failed(self, endpoint: Any, error: Exception) -> EtcdError:
        """Go to the next endpoint, or log in anew; all by plain stores, safe from any thread.

        A name that does not resolve is looked up again by a new channel alone: an old one waits
        for up to two minutes.
        """
        text = error.details() or str(error.code()) if isinstance(error, grpc.Call) else str(error)
        explained = EtcdError(*_classify(text))
        if explained.failure is Failure.AUTHENTICATION:
            self._token = None
        elif endpoint is self._endpoints[current := self._current]:
            if "resol" in text.lower():  # "DNS resolution failed", "errors resolving"
                self._endpoints[current] = self._endpoint(*self._addresses[current])
                endpoint.close()
            self._current = (current + 1) % len(self._endpoints)
        return explained


def begin(
    call: Callable[[str, Any, Answered], None], method: str, request: Any
) -> Callable[[], Any]:
    """Send a request now. What is returned waits for its reply, and raises EtcdError."""
    replies: SimpleQueue[tuple[Any, EtcdError | None]] = SimpleQueue()
    call(method, request, lambda reply, error: replies.put((reply, error)))

    def wait() -> Any:
        reply, error = replies.get()
        if error is not None:
            raise error
        return reply

    return wait


def _classify(text: str) -> tuple[Failure, str]:
    """Tell what a failure means by etcd's text, which says more than the status code."""
    line = " ".join(text.split())
    lowered = line.lower()
    for part, failure in _TEXTS.items():
        if part in lowered:
            return failure, line
    hints = [hint for part, hint in _HINTS.items() if part in lowered]
    return Failure.UNKNOWN, ": ".join([*hints, line]) if line else "no reason given"
