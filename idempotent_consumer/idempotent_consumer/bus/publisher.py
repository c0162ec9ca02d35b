"""The publishing side: each message is sent until the broker has confirmed it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pika
from structlog.typing import FilteringBoundLogger

from ..health import Health
from ..policies import RECONNECT, Backoff
from .connection import KEEPALIVE, Connection
from .loop import PikaLoop

CONFIRM_TIMEOUT_S = 10.0
_CHECK_EVERY_S = 1.0
_BARE_AFTER_LOSSES = 3


@dataclass(slots=True, eq=False)
class Message:
    """What is sent to an exchange; ``confirmed`` is called once the broker has it safely.

    After a few channels lost with it unconfirmed the ``bare`` properties are tried: a header that
    made the broker close the connection would do so each time. A nack is no such sign.
    """

    exchange: str
    routing_key: str
    body: bytes
    properties: Any
    bare: Any
    wanted: Callable[[], bool]
    confirmed: Callable[[], None]
    losses: int = 0
    deadline_s: float = 0.0


class Publisher:
    """Publishes on a connection of its own, whose channels are set up by ``declare``.

    An alarm makes the broker stop reading from connections that publish: acks on this one would
    stall. A message whose confirm is unknown is sent again, so it may arrive twice, unless it is
    no longer ``wanted``.
    """

    def __init__(
        self,
        urls: Sequence[str],
        declare: Callable[[Any], None],
        loop: PikaLoop,
        health: Health,
        log: FilteringBoundLogger,
    ) -> None:
        self._declare, self._loop, self._log = declare, loop, log
        self._channel: Any = None
        self._sequence = 0
        self._unconfirmed: dict[int, Message] = {}
        self._waiting: list[Message] = []
        self._blocked = False
        self.trouble = ""
        """What keeps the broker from confirming, where it has said so; empty after a confirm."""
        self._backoff = Backoff(RECONNECT)
        self._connection = Connection(
            "rabbitmq-publishing", urls, loop, health, log, self._opened, self._lost, KEEPALIVE
        )

    def open(self) -> None:
        """Connect, and send what waits from then on."""
        self._connection.open()
        self._loop.call_later(_CHECK_EVERY_S, self._check)

    def publish(self, message: Message) -> None:
        """Send a message until it is confirmed, as long as it is wanted."""
        if not message.wanted():
            return
        if self._channel is None or self._blocked or not self._channel.is_open:
            self._waiting.append(message)
            return
        message.deadline_s = self._loop.now_s() + CONFIRM_TIMEOUT_S
        self._sequence += 1
        self._unconfirmed[self._sequence] = message
        self._channel.basic_publish(
            message.exchange,
            message.routing_key,
            message.body,
            message.bare if message.losses >= _BARE_AFTER_LOSSES else message.properties,
            mandatory=True,
        )

    def close(self) -> None:
        """Close the connection; what is not confirmed is not confirmed."""
        self._connection.close()

    @property
    def closed(self) -> bool:
        """Whether the connection has been closed, or was not there."""
        return self._connection.closed

    def _opened(self, channel: Any) -> None:
        self._declare(channel)
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
        for message in self._unconfirmed.values():
            message.losses += 1
        self._waiting = [*self._unconfirmed.values(), *self._waiting]
        self._unconfirmed = {}

    def _block(self, blocked: bool) -> None:
        self._blocked = blocked
        if blocked:
            self.trouble = "RabbitMQ has an alarm and takes no messages"
            self._log.warning(f"{self.trouble}: retries and dead letters wait, consuming goes on")
        else:
            for message in self._unconfirmed.values():
                message.deadline_s = self._loop.now_s() + CONFIRM_TIMEOUT_S
            self._send_waiting()

    def _send_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for message in waiting:
            self.publish(message)

    def _on_confirm(self, frame: Any) -> None:
        if self._channel is None:
            return
        method = frame.method
        answered = self._answered(method.delivery_tag, method.multiple)
        if isinstance(method, pika.spec.Basic.Ack):
            self._backoff.reset()
            self.trouble = ""
            for message in answered:
                message.confirmed()
        else:
            for message in answered:
                self._log.warning(
                    "RabbitMQ did not take a message, sending it again",
                    exchange=message.exchange,
                    routing_key=message.routing_key,
                )
                self._again_later(message)

    def _answered(self, last: int, multiple: bool) -> list[Message]:
        """Take out the message that a confirm is for, or all up to it."""
        # Sent in this order, so the first is the lowest.
        first = next(iter(self._unconfirmed), last) if multiple else last
        numbers = range(first, last + 1)
        return [self._unconfirmed.pop(n) for n in numbers if n in self._unconfirmed]

    def _again_later(self, message: Message) -> None:
        self._loop.call_later(self._backoff.next_s(), lambda: self.publish(message))

    def _on_return(self, _channel: Any, method: Any, _properties: Any, _body: bytes) -> None:
        """Open a new channel: what is missing is declared anew, and the ack to come is void."""
        self._lost()
        self.trouble = (
            f"no queue takes what is sent to {method.exchange!r} as {method.routing_key!r}"
            if method.exchange
            else f"queue {method.routing_key} is missing, it is declared anew"
        )
        self._connection.drop(self.trouble)

    def _check(self) -> None:
        now_s = self._loop.now_s()
        # Where no connection comes they would be kept for ever, with their bodies.
        self._waiting = [message for message in self._waiting if message.wanted()]
        if not self._blocked and any(m.deadline_s < now_s for m in self._unconfirmed.values()):
            self._connection.drop(f"no confirm within {CONFIRM_TIMEOUT_S:.0f} s")
        self._loop.call_later(_CHECK_EVERY_S, self._check)
