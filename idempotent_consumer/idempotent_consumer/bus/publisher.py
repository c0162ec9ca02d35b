"""The publishing side: each message is sent until the broker has confirmed it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pika
from structlog.typing import FilteringBoundLogger

from .. import names
from ..health import Health
from ..policies import RECONNECT, Backoff
from . import topology
from .connection import Connection
from .loop import PikaLoop

CONFIRM_TIMEOUT_S = 10.0
_CHECK_EVERY_S = 1.0
_MAX_HEADER_BYTES = 64 * 1024
_BARE_AFTER_SENDINGS = 3


@dataclass(slots=True, eq=False)
class _Message:
    queue: str
    body: bytes
    properties: Any
    headers: dict[str, object]
    wanted: Callable[[], bool]
    confirmed: Callable[[], None]
    sendings: int = 0
    deadline_s: float = 0.0


class Publisher:
    """Publishes to queues by name, on a connection of its own.

    An alarm makes the broker stop reading from connections that publish: acks on this one would
    stall. A message whose confirm is unknown is sent again, so it may arrive twice, unless it is
    no longer ``wanted``: its delivery went back, and will come again.
    """

    def __init__(
        self,
        service: str,
        urls: Sequence[str],
        retry_delays: Sequence[tuple[str, int]],
        loop: PikaLoop,
        health: Health,
        log: FilteringBoundLogger,
    ) -> None:
        self._service, self._retry_delays, self._loop, self._log = service, retry_delays, loop, log
        self._channel: Any = None
        self._sequence = 0
        self._unconfirmed: dict[int, _Message] = {}
        self._waiting: list[_Message] = []
        self._blocked = False
        self._backoff = Backoff(RECONNECT)
        self._connection = Connection(
            "rabbitmq-publishing", urls, loop, health, log, self._opened, self._lost
        )

    def open(self) -> None:
        """Connect, and send what waits from then on."""
        self._connection.open()
        self._loop.call_later(_CHECK_EVERY_S, self._check)

    def publish(
        self,
        queue: str,
        body: bytes,
        properties: Any,
        headers: dict[str, object],
        wanted: Callable[[], bool],
        confirmed: Callable[[], None],
    ) -> None:
        """Send a message to a queue; ``confirmed`` is called once the broker has it safely.

        ``properties`` are those it arrived with, ``headers`` are added to them.
        """
        self._send(_Message(queue, body, properties, headers, wanted, confirmed))

    def close(self) -> None:
        """Close the connection; what is not confirmed is not confirmed."""
        self._connection.close()

    @property
    def closed(self) -> bool:
        """Whether the connection has been closed, or was not there."""
        return self._connection.closed

    def _send(self, message: _Message) -> None:
        if not message.wanted():
            return
        if self._channel is None or self._blocked or not self._channel.is_open:
            self._waiting.append(message)
            return
        message.sendings += 1
        message.deadline_s = self._loop.now_s() + CONFIRM_TIMEOUT_S
        self._sequence += 1
        self._unconfirmed[self._sequence] = message
        bare = message.sendings > _BARE_AFTER_SENDINGS
        self._channel.basic_publish(
            names.DEFAULT_EXCHANGE, message.queue, message.body,
            _forwarded(None if bare else message.properties, message.headers), mandatory=True,
        )

    def _opened(self, channel: Any) -> None:
        topology.declare(channel, self._service, self._retry_delays)
        channel.add_on_return_callback(self._on_return)
        channel.connection.add_on_connection_blocked_callback(lambda *_: self._block(True))
        channel.connection.add_on_connection_unblocked_callback(lambda *_: self._block(False))
        channel.confirm_delivery(self._on_confirm, callback=lambda _: self._start(channel))

    def _start(self, channel: Any) -> None:
        self._channel, self._sequence, self._blocked = channel, 0, False
        self._connection.ready()
        self._send_waiting()

    def _lost(self) -> None:
        self._channel = None
        unsent = (*self._unconfirmed.values(), *self._waiting)
        self._waiting = [message for message in unsent if message.wanted()]
        self._unconfirmed = {}

    def _block(self, blocked: bool) -> None:
        self._blocked = blocked
        if blocked:
            self._log.warning("RabbitMQ has an alarm and takes no messages: retries and dead "
                              "letters wait, consuming goes on")
        else:
            for message in self._unconfirmed.values():
                message.deadline_s = self._loop.now_s() + CONFIRM_TIMEOUT_S
            self._send_waiting()

    def _send_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for message in waiting:
            self._send(message)

    def _on_confirm(self, frame: Any) -> None:
        if self._channel is None:
            return
        method = frame.method
        tags = [method.delivery_tag]
        if method.multiple:
            tags = [tag for tag in self._unconfirmed if tag <= method.delivery_tag]
        for message in [self._unconfirmed.pop(tag) for tag in tags if tag in self._unconfirmed]:
            if isinstance(method, pika.spec.Basic.Ack):
                self._backoff.reset()
                message.confirmed()
            else:
                self._log.warning("RabbitMQ did not take a message, sending it again",
                                  queue=message.queue)
                self._again_later(message)

    def _again_later(self, message: _Message) -> None:
        self._loop.call_later(self._backoff.next_s(), lambda: self._send(message))

    def _on_return(self, _channel: Any, method: Any, _properties: Any, _body: bytes) -> None:
        """Open a new channel, which declares the queue anew; the ack to come means nothing."""
        self._lost()
        self._connection.drop(f"queue {method.routing_key} is missing, it is declared anew")

    def _check(self) -> None:
        now_s = self._loop.now_s()
        if not self._blocked and any(m.deadline_s < now_s for m in self._unconfirmed.values()):
            self._connection.drop(f"no confirm within {CONFIRM_TIMEOUT_S:.0f} s")
        self._loop.call_later(_CHECK_EVERY_S, self._check)


_KEPT = ("content_type", "content_encoding", "priority", "correlation_id", "reply_to",
         "message_id", "timestamp", "type", "app_id")
"""Not: expiration (it would end the wait, or the dead letter, early), user_id (the broker checks
it against the sender, who is another now), delivery_mode (always persistent)."""

_DROPPED_HEADERS = {"CC", "BCC", "x-death", "x-delivery-count", "x-acquired-count",
                    *(f"x-{which}-death-{what}" for which in ("first", "last")
                      for what in ("exchange", "queue", "reason"))}
"""CC and BCC are addresses: the message would go there as well. The others are the broker's."""


def _forwarded(properties: Any, headers: dict[str, object]) -> Any:
    """Return the properties for sending a message on: its own where they can be, and ours."""
    kept = {name: getattr(properties, name) for name in _KEPT} if properties is not None else {}
    theirs = {
        name: value
        for name, value in ((properties.headers if properties is not None else None) or {}).items()
        if name not in _DROPPED_HEADERS
    }
    forwarded = pika.BasicProperties(**kept, delivery_mode=2, headers={**theirs, **headers})
    return forwarded if _fits(forwarded) else pika.BasicProperties(delivery_mode=2, headers=headers)


def _fits(properties: Any) -> bool:
    """Return whether pika can write them into one frame; a header can be of any size and type."""
    try:
        return sum(map(len, properties.encode())) <= _MAX_HEADER_BYTES
    except Exception:  # noqa: BLE001 - pika raises what the failing conversion happens to raise.
        return False
