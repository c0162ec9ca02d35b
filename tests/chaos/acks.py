"""The audit of acks: a proxy in front of the broker that looks up each ack's record in etcd.

It reads AMQP 0-9-1 from the wire, and uses only pika's decoding of frames.
"""

import asyncio
import json
import socket
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from pika import frame, spec
from pika.channel import ContentFrameAssembler

from chaos.proxy import Onlooker, Proxy
from servers.etcd import EtcdClient, record_prefix
from servers.servers import Etcd, RabbitMQ
from servers.wait import stands_still

_ETCD_TIMEOUT_S = 2.0


class Seen(NamedTuple):
    """A method as pika decodes it, with its body if it carries content."""

    channel: int
    method: Any
    body: bytes = b""


class AckAudit(Proxy):
    """Relays AMQP, and holds each ack until its record has been looked up in etcd.

    An ack is early unless, at that moment, the event's record is done, or the broker has
    confirmed the same body in a retry or dead-letter queue. While etcd does not answer, acks
    pass, and are counted as ``unknown``.
    """

    def __init__(self, rabbitmq: RabbitMQ, etcd: Etcd) -> None:
        self._etcd = EtcdClient(etcd.endpoint, _ETCD_TIMEOUT_S, lambda: etcd.login)
        self._silent_until_s = 0.0
        self.unhandled: set[str] = set()
        """The types without a handler in any service: their acks need no record."""
        # Written only on the loop's thread.
        self._early: set[str] = set()
        self._forwarded: set[bytes] = set()
        self.checked = self.unknown = 0
        super().__init__(rabbitmq.amqp_port, socket.create_server(("127.0.0.1", 0)))
        self.url = f"amqp://{rabbitmq.user}:{rabbitmq.password}@{self.address}/"

    def early(self) -> set[str]:
        """Return the ids of the events that were acked too early, or the bodies without an id."""
        return set(self._early)

    @contextmanager
    def none_pass(self) -> Iterator[None]:
        """Let the last acks pass; then raise AssertionError if any ack passes in the block."""
        seen = stands_still(lambda: (self.checked, self.unknown))
        yield
        now = self.checked, self.unknown
        assert now == seen, f"something was acked: {seen} to {now}"

    def onlookers(self) -> tuple[Onlooker, Onlooker]:
        """Return what reads the two directions of a connection."""
        queue = ""
        delivered: dict[tuple[int, int], bytes] = {}
        published: dict[tuple[int, int], bytes] = {}
        tags: defaultdict[int, int] = defaultdict(int)

        async def from_client(seen: Seen) -> None:
            """Note what the service sends. An ack waits here, and so does everything behind it."""
            nonlocal queue
            match seen.method:
                case spec.Basic.Consume():
                    queue = seen.method.queue
                case spec.Basic.Publish():
                    tags[seen.channel] += 1
                    published[seen.channel, tags[seen.channel]] = seen.body
                case spec.Basic.Ack():
                    await self._acked(queue, _take(delivered, seen))

        async def from_server(seen: Seen) -> None:
            match seen.method:
                case spec.Basic.Deliver():
                    delivered[seen.channel, seen.method.delivery_tag] = seen.body
                case spec.Basic.Ack():
                    self._forwarded.update(_take(published, seen))

        return _reading(from_client), _reading(from_server)

    async def _acked(self, service: str, bodies: list[bytes]) -> None:
        """Judge an ack of these bodies, before the broker sees it."""
        to_record = [
            body
            for body in bodies
            if body not in self._forwarded and _member(body, "type") not in self.unhandled
        ]
        ids = {event_id for body in to_record if (event_id := _member(body, "id"))}
        done = await asyncio.to_thread(self._done, service, ids)
        if done is None:
            self.unknown += len(bodies)
        else:
            self.checked += len(bodies)
            self._early |= {_member(body, "id") or repr(body[:100]) for body in to_record} - done

    def _done(self, service: str, ids: set[str]) -> set[str] | None:
        """Return which of these are done, or None if etcd does not answer.

        It is then not asked again for a while: many acks would wait, and heartbeats behind them.
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


def _take(waiting: dict[tuple[int, int], bytes], ack: Seen) -> list[bytes]:
    last, multiple = ack.method.delivery_tag, ack.method.multiple
    keys = [
        (channel, tag)
        for channel, tag in waiting
        if channel == ack.channel and (tag == last or (multiple and tag < last))
    ]
    return [waiting.pop(key) for key in keys]


def _reading(note: Callable[[Seen], Awaitable[None]]) -> Onlooker:
    """Return an onlooker that decodes the frames of one direction and notes each method."""
    contents: defaultdict[int, ContentFrameAssembler] = defaultdict(ContentFrameAssembler)
    left = b""

    def completed(found: Any) -> Seen | None:
        if isinstance(found, frame.ProtocolHeader | frame.Heartbeat):
            return None
        if isinstance(found, frame.Method) and not spec.has_content(found.method.INDEX):
            return Seen(found.channel_number, found.method)
        content = contents[found.channel_number].process(found)
        return Seen(found.channel_number, content[0].method, content[2]) if content else None

    async def look(data: bytes) -> bytes:
        nonlocal left
        left += data
        passing = []
        while (decoded := frame.decode_frame(left))[0]:
            size, found = decoded
            if (seen := completed(found)) is not None:
                await note(seen)
            passing.append(left[:size])
            left = left[size:]
        return b"".join(passing)

    return look


def _member(body: bytes, name: str) -> str:
    """Return a member of an event; the empty string if a body is not an event."""
    try:
        event = json.loads(body)
        return str(event[name]) if isinstance(event, dict) and name in event else ""
    except ValueError:
        return ""
