"""The audit of acks: a proxy before the broker that asks etcd about each ack as it passes."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from chaos import amqp
from servers.etcd import EtcdClient
from servers.server import Etcd, RabbitMQ
from servers.store import record_prefix

T = TypeVar("T")

_ETCD_TIMEOUT_S = 2.0


class AckAudit:
    """Passes AMQP on as it comes, and holds each ack until etcd has been asked about its record.

    An ack is early unless, at that moment, the event's record is done, or the broker has
    confirmed the same body in a retry or dead-letter queue. Acks during which etcd does not
    answer are passed on, counted as ``unknown``. Made by `audit_acks`.
    """

    def __init__(self, rabbitmq: RabbitMQ, etcd: Etcd) -> None:
        self._upstream = ("127.0.0.1", rabbitmq.amqp_port)
        self._etcd = EtcdClient(etcd.endpoint, _ETCD_TIMEOUT_S, lambda: etcd.login)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._early: set[str] = set()
        self._forwarded: set[bytes] = set()
        self._silent_until_s = 0.0
        self.unhandled: set[str] = set()
        """The types for which no service has a handler: their acks need no record."""
        self.checked = self.unknown = 0
        port = self._listener.getsockname()[1]
        self.url = f"amqp://{rabbitmq.user}:{rabbitmq.password}@127.0.0.1:{port}/"
        threading.Thread(target=self._accept, name="ack audit", daemon=True).start()

    def early(self) -> set[str]:
        """Return the ids (or the body, where it holds none) of what was acked too early."""
        with self._lock:
            return set(self._early)

    def close(self) -> None:
        """Take no more connections; those there are end with their peers."""
        self._listener.shutdown(socket.SHUT_RDWR)  # A close alone does not wake its thread.
        self._listener.close()

    def forwarded(self, body: bytes) -> None:
        """Note that the broker has confirmed a body in another queue of the service."""
        with self._lock:
            self._forwarded.add(body)

    def acked(self, service: str, bodies: list[bytes]) -> None:
        """Judge an ack of these bodies, before the broker sees it."""
        with self._lock:
            open_bodies = [body for body in bodies if body not in self._forwarded]
        if self.unhandled:
            open_bodies = [
                body for body in open_bodies if _member(body, "type") not in self.unhandled
            ]
        ids = {event_id: body for body in open_bodies if (event_id := _member(body, "id"))}
        done = self._done(service, list(ids))
        with self._lock:
            if done is None:
                self.unknown += len(bodies)
                return
            self.checked += len(bodies)
            self._early |= {_member(body, "id") or repr(body[:100]) for body in open_bodies} - done

    def _done(self, service: str, ids: list[str]) -> set[str] | None:
        """Return which of these are done, None where etcd does not answer.

        It is left alone for a while then: each ack of many would wait, and heartbeats behind them.
        """
        if time.monotonic() < self._silent_until_s:
            return None
        keys = {record_prefix(service) + event_id: event_id for event_id in ids}
        try:
            records = self._etcd.get_all(list(keys))
        except OSError:
            self._silent_until_s = time.monotonic() + _ETCD_TIMEOUT_S
            return None
        return {keys[one.key] for one in records if json.loads(one.value)["state"] == "done"}

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                with suppress(OSError):  # The broker is down: the client sees its socket close.
                    server = socket.create_connection(self._upstream, timeout=5)
                    server.settimeout(None)
                    connection = _Connection(self)
                    _pump(client, server, connection.from_client)
                    _pump(server, client, connection.from_server)
                    continue
                client.close()


class _Connection:
    """What has been seen of one connection: what was delivered, and what was published."""

    def __init__(self, audit: AckAudit) -> None:
        self._audit = audit
        self._queue = ""
        self._delivered: dict[tuple[int, int], bytes] = {}
        self._published: dict[tuple[int, int], bytes] = {}
        self._published_tags: dict[int, int] = {}

    def from_client(self, method: amqp.Method) -> None:
        """Take note of what the service sends."""
        if method.name == amqp.CONSUME:
            self._queue = amqp.consumed_queue(method)
        elif method.name == amqp.PUBLISH:
            tag = self._published_tags.get(method.channel, 0) + 1
            self._published_tags[method.channel] = tag
            self._published[method.channel, tag] = method.body
        elif method.name == amqp.ACK:
            self._audit.acked(self._queue, _take(self._delivered, method))

    def from_server(self, method: amqp.Method) -> None:
        """Take note of what the broker sends."""
        if method.name == amqp.DELIVER:
            self._delivered[method.channel, amqp.delivered_tag(method)] = method.body
        elif method.name == amqp.ACK:
            for body in _take(self._published, method):
                self._audit.forwarded(body)


def _take(waiting: dict[tuple[int, int], T], ack: amqp.Method) -> list[T]:
    tag, multiple = amqp.acked(ack)
    keys = [
        key
        for key in list(waiting)  # The other direction's thread adds to it meanwhile.
        if key[0] == ack.channel and (key[1] == tag or (multiple and key[1] < tag))
    ]
    return [waiting.pop(key) for key in keys]


def _pump(source: socket.socket, sink: socket.socket, seen: Callable[[amqp.Method], None]) -> None:
    """Pass on what comes, frame by frame, on a thread; the end of one side is that of the other."""

    def run() -> None:
        reader = amqp.Reader()
        with suppress(OSError):
            while data := source.recv(65536):
                passing = []
                for frame, method in reader.frames(data):
                    if method is not None:
                        seen(method)
                    passing.append(frame)
                sink.sendall(b"".join(passing))
        for side in (source, sink):
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
        source.close()  # The other one is the source of the other direction.

    threading.Thread(target=run, name="ack audit", daemon=True).start()


def _member(body: bytes, name: str) -> str:
    """Return the id or the type of an event, empty where a body is none."""
    try:
        event = json.loads(body)
        return str(event[name]) if isinstance(event, dict) and name in event else ""
    except ValueError:
        return ""


@contextmanager
def audit_acks(rabbitmq: RabbitMQ, etcd: Etcd) -> Iterator[AckAudit]:
    """Audit acks for as long as the block runs."""
    audit = AckAudit(rabbitmq, etcd)
    try:
        yield audit
    finally:
        audit.close()
