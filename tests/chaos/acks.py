"""The audit of acks: a proxy before the broker that asks etcd about each ack as it passes.

It reads AMQP 0-9-1 as it goes over the wire, as far as an onlooker needs it. Frames and methods are
those of the specification (amqp0-9-1.pdf, 4.2.3 and 4.2.6, and the class "basic"). An onlooker does
not answer, so it needs neither pika's connection nor its states.
"""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple, TypeVar

from servers.etcd import EtcdClient, record_prefix
from servers.servers import Etcd, RabbitMQ
from servers.wait import stands_still

T = TypeVar("T")

_ETCD_TIMEOUT_S = 2.0

_METHOD, _HEADER, _BODY = 1, 2, 3
_PROTOCOL_HEADER = b"AMQP"

CONSUME, PUBLISH, DELIVER, ACK = (60, 20), (60, 40), (60, 60), (60, 80)


class Method(NamedTuple):
    """A method with its arguments as they came, and the body of one that carries content."""

    channel: int
    name: tuple[int, int]
    arguments: bytes
    body: bytes = b""


class Reader:
    """Cuts one direction of a connection into frames, and puts content back together."""

    def __init__(self) -> None:
        self._left = b""
        self._open: dict[int, tuple[Method, int, bytes]] = {}

    def frames(self, data: bytes) -> Iterator[tuple[bytes, Method | None]]:
        """Yield each whole frame as it came, with the method that it completes, if any."""
        data = self._left + data
        at = 0
        while (size := _frame_size(data, at)) and len(data) - at >= size:
            frame = data[at : at + size]
            at += size
            yield frame, None if frame.startswith(_PROTOCOL_HEADER) else self._read(frame)
        self._left = data[at:]

    def _read(self, frame: bytes) -> Method | None:
        kind, channel = struct.unpack_from(">BH", frame)
        payload = frame[7:-1]
        if kind == _METHOD:
            method = Method(channel, struct.unpack_from(">HH", payload), payload[4:])
            if method.name not in (PUBLISH, DELIVER):
                return method
            self._open[channel] = method, 0, b""
        elif kind == _HEADER and channel in self._open:
            method, _, body = self._open[channel]
            return self._grown(method, struct.unpack_from(">Q", payload, 4)[0], body)
        elif kind == _BODY and channel in self._open:
            method, size, body = self._open[channel]
            return self._grown(method, size, body + payload)
        return None

    def _grown(self, method: Method, size: int, body: bytes) -> Method | None:
        if len(body) < size:
            self._open[method.channel] = method, size, body
            return None
        del self._open[method.channel]
        return method._replace(body=body)


def _frame_size(data: bytes, at: int) -> int:
    """Return how long the frame that begins there is, 0 while that cannot be told."""
    if data.startswith(_PROTOCOL_HEADER, at):
        return len(_PROTOCOL_HEADER) + 4
    return int(struct.unpack_from(">I", data, at + 3)[0]) + 8 if len(data) - at >= 7 else 0


def consumed_queue(method: Method) -> str:
    """Return the queue that a consume names."""
    return _short_text(method.arguments, 2)


def delivered_tag(method: Method) -> int:
    """Return the tag of a delivery."""
    consumer_bytes = method.arguments[0]
    return int(struct.unpack_from(">Q", method.arguments, 1 + consumer_bytes)[0])


def acked(method: Method) -> tuple[int, bool]:
    """Return the tag that an ack names, and whether it covers all before it."""
    tag, multiple = struct.unpack_from(">QB", method.arguments)
    return tag, bool(multiple & 1)


def _short_text(data: bytes, at: int) -> str:
    return data[at + 1 : at + 1 + data[at]].decode()


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

    @contextmanager
    def none_pass(self) -> Iterator[None]:
        """Let the last acks pass, then none in the block, be it one that could not be judged."""
        seen = stands_still(self._passed)
        yield
        assert self._passed() == seen, f"something was acked: {seen} to {self._passed()}"

    def _passed(self) -> tuple[int, int]:
        return self.checked, self.unknown

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

    def from_client(self, method: Method) -> None:
        """Take note of what the service sends."""
        if method.name == CONSUME:
            self._queue = consumed_queue(method)
        elif method.name == PUBLISH:
            tag = self._published_tags.get(method.channel, 0) + 1
            self._published_tags[method.channel] = tag
            self._published[method.channel, tag] = method.body
        elif method.name == ACK:
            self._audit.acked(self._queue, _take(self._delivered, method))

    def from_server(self, method: Method) -> None:
        """Take note of what the broker sends."""
        if method.name == DELIVER:
            self._delivered[method.channel, delivered_tag(method)] = method.body
        elif method.name == ACK:
            for body in _take(self._published, method):
                self._audit.forwarded(body)


def _take(waiting: dict[tuple[int, int], T], ack: Method) -> list[T]:
    tag, multiple = acked(ack)
    keys = [
        key
        for key in list(waiting)  # The other direction's thread adds to it meanwhile.
        if key[0] == ack.channel and (key[1] == tag or (multiple and key[1] < tag))
    ]
    return [waiting.pop(key) for key in keys]


def _pump(source: socket.socket, sink: socket.socket, seen: Callable[[Method], None]) -> None:
    """Pass on what comes, frame by frame, on a thread; the end of one side is that of the other."""

    def run() -> None:
        reader = Reader()
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
