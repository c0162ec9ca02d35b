"""RabbitMQ's publishing side: each message is sent until the broker has confirmed it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import pika
from structlog.typing import FilteringBoundLogger

from . import names
from .amqp import KEEPALIVE, bare_properties, forwarded_properties
from .bus import ClientChannel, Delivery, RecoveringConnection
from .event import Outgoing, decode
from .health import Health
from .system import System, reconnect_wait

CONFIRM_TIMEOUT_S = 10.0
_ALONE_AFTER_LOSSES, _BARE_AFTER_LOSSES = 3, 6
_MAX_ROUTING_KEY_BYTES = 255


@dataclass(slots=True, eq=False)
class Message:
    """A message to publish, for as long as it is ``wanted``.

    A header may make the broker close the connection, and would do so each time. So ``losses``
    counts the channels that were lost with the message unconfirmed. After three it is sent alone,
    which shows whether it is to blame; after three more it is sent with its ``bare`` properties.
    A nack sets the count to zero, and a channel that is given up on this side does not count.
    """

    exchange: str
    routing_key: str
    body: bytes
    properties: Any
    bare: Any
    wanted: Callable[[], bool]
    losses: int = 0
    returned: bool = False
    """Whether the broker has returned it, as no queue took it: the ack that follows is void."""
    confirmed: asyncio.Future[bool] = field(init=False)

    @property
    def goes_alone(self) -> bool:
        """Whether it is sent only while nothing else is unconfirmed."""
        return self.losses >= _ALONE_AFTER_LOSSES

    def resolve(self, *, confirmed: bool) -> None:
        """Set the result, unless whoever waits for it has been cancelled."""
        if not self.confirmed.done():
            self.confirmed.set_result(confirmed)


_EVENT_PROPERTIES = pika.BasicProperties(content_type="application/json", delivery_mode=2)


def event_message(
    event: Outgoing, exchange: str = names.EXCHANGE, wanted: Callable[[], bool] = lambda: True
) -> Message:
    """Return the message that publishes an event.

    The routing key is the event's type, cut to the 255 bytes that AMQP allows. Raises InvalidEvent
    for an event that every service would park, and TypeError for a body that is not bytes.
    """
    if not isinstance(event.body, bytes):
        got = type(event.body).__name__
        raise TypeError(f"a body is bytes, not {got}: write json.dumps(event).encode()")
    key, properties = decode(event.body).type, _EVENT_PROPERTIES
    if len(key) > _MAX_ROUTING_KEY_BYTES // 4:
        key = key.encode()[:_MAX_ROUTING_KEY_BYTES].decode(errors="ignore")
    if event.headers:
        properties = copy(properties)
        properties.headers = dict(event.headers)
    return Message(exchange, key, event.body, properties, _EVENT_PROPERTIES, wanted)


def forwarded_message(delivery: Delivery, queue: str, headers: dict[str, object]) -> Message:
    """Return the message that sends a delivery on to a queue, with more headers.

    It is wanted for as long as the delivery can be settled.
    """
    properties = forwarded_properties(delivery.properties, headers)
    bare, body = bare_properties(headers), delivery.body
    return Message(names.DEFAULT_EXCHANGE, queue, body, properties, bare, lambda: delivery.alive)


class Publisher:
    """Publishes on a connection of its own, whose channels are set up by ``declare``.

    Acks need another connection: during an alarm the broker stops reading from those that publish.
    A message without a confirm is sent again while it is wanted, so it may arrive twice.
    ``trouble`` says why the broker does not confirm, if it has given a reason.
    """

    def __init__(
        self,
        urls: Sequence[str],
        declare: Callable[[Any], None],
        system: System,
        health: Health,
        log: FilteringBoundLogger,
    ) -> None:
        self._declare, self._log = declare, log
        self.trouble = ""
        self._client: ClientChannel | None = None
        self._sequence = 0
        self._unconfirmed: dict[int, Message] = {}  # In the order in which they were sent.
        self._deadline_s = 0.0  # For the first of them.
        self._waiting: list[Message] = []
        self._refused: list[Message] = []
        self._refused_until_s = 0.0
        self._blocked = False
        self._backoff = reconnect_wait(system.random)
        self._connection = RecoveringConnection(
            "rabbitmq-publishing", urls, KEEPALIVE, system, health, log
        )

    async def run(self) -> None:
        """Stay connected and send what waits, until ``close``."""
        async with asyncio.TaskGroup() as tasks:
            checking = tasks.create_task(self._check_every_second())
            await self._connection.run(self._publish)
            checking.cancel()

    def send(self, message: Message) -> asyncio.Future[bool]:
        """Send a message. The result is True once it is confirmed, False if it is not wanted."""
        message.confirmed = asyncio.get_running_loop().create_future()
        self._send(message)
        return message.confirmed

    async def close(self) -> None:
        """Close the connection; the result of what is unconfirmed is False."""
        await self._connection.close()
        for message in (*self._waiting, *self._refused):
            message.resolve(confirmed=False)

    def _send(self, message: Message) -> None:
        channel = self._open_channel
        if not message.wanted():
            message.resolve(confirmed=False)
        elif channel is None or self._is_taken or (message.goes_alone and self._unconfirmed):
            self._waiting.append(message)
        else:
            message.returned = False
            is_bare = message.losses >= _BARE_AFTER_LOSSES
            properties = message.bare if is_bare else message.properties
            if properties is not message.properties:
                self._log.warning(
                    "RabbitMQ closes the connection for a message, sending it without its headers",
                    **_where(message),
                )
            if not self._unconfirmed:
                self._renew_deadline()
            self._sequence += 1
            self._unconfirmed[self._sequence] = message
            channel.basic_publish(
                message.exchange,
                message.routing_key,
                message.body,
                properties,
                mandatory=True,
            )

    @property
    def _is_taken(self) -> bool:
        """Whether the only message in flight is one that goes alone."""
        return len(self._unconfirmed) == 1 and next(iter(self._unconfirmed.values())).goes_alone

    @property
    def _open_channel(self) -> Any:
        """The channel, or None while the broker takes no messages."""
        channel = self._client.channel if self._client is not None else None
        return channel if channel is not None and channel.is_open and not self._blocked else None

    def _renew_deadline(self) -> None:
        self._deadline_s = asyncio.get_running_loop().time() + CONFIRM_TIMEOUT_S

    def _send_waiting(self) -> None:
        """Send what waits, in order, but last what has lost a channel even when sent bare."""
        waiting = sorted(self._waiting, key=lambda message: message.losses > _BARE_AFTER_LOSSES)
        self._waiting = []
        for message in waiting:
            self._send(message)

    async def _publish(self, client: ClientChannel) -> None:
        channel = client.channel
        self._sequence, self._blocked = 0, False
        self._declare(channel)
        connection = channel.connection
        connection.add_on_connection_blocked_callback(client.callback(self._on_blocked))
        connection.add_on_connection_unblocked_callback(client.callback(self._on_unblocked))
        channel.add_on_return_callback(client.callback(self._on_return))
        channel.confirm_delivery(client.callback(self._on_confirm), callback=client.replied)
        await client.reply()
        self._client = client
        try:
            self._connection.ready()
            self._send_waiting()
            await client.reply()  # Nothing comes but the loss of the channel.
        finally:
            if not self._blocked:  # During an alarm the broker has not read them.
                for message in self._unconfirmed.values():
                    message.losses += 1
            self._take_back()

    def _take_back(self) -> None:
        """Keep what is unconfirmed on this channel for the next one, in order."""
        self._client, self.trouble = None, ""
        self._waiting = [*self._unconfirmed.values(), *self._waiting]
        self._unconfirmed = {}

    def _on_blocked(self, *_: Any) -> None:
        self._blocked = True
        self.trouble = "RabbitMQ has an alarm and takes no messages"
        self._log.warning(f"{self.trouble}: retries and dead letters wait, consuming goes on")

    def _on_unblocked(self, *_: Any) -> None:
        self._blocked, self.trouble = False, ""
        self._renew_deadline()
        self._send_waiting()

    def _on_return(self, _channel: Any, method: Any, _properties: Any, body: bytes) -> None:
        """Mark a message as returned. The broker confirms it afterwards."""
        returned = (method.exchange, method.routing_key, body)
        for each in self._unconfirmed.values():
            if not each.returned and (each.exchange, each.routing_key, each.body) == returned:
                each.returned = True
                return

    def _on_confirm(self, frame: Any) -> None:
        is_ack, last = isinstance(frame.method, pika.spec.Basic.Ack), frame.method.delivery_tag
        oldest, numbers = next(iter(self._unconfirmed), last), [last]
        if frame.method.multiple:
            numbers = list(takewhile(lambda number: number <= last, self._unconfirmed))
        messages = [self._unconfirmed.pop(n) for n in numbers if n in self._unconfirmed]
        if oldest not in self._unconfirmed:
            self._renew_deadline()
        for message in messages:
            if is_ack and not message.returned:
                self.trouble = ""
                self._backoff.waits = 0
                message.resolve(confirmed=True)
            else:
                self._refuse(message)
        if not self._unconfirmed:
            self._send_waiting()

    def _refuse(self, message: Message) -> None:
        """Keep a message that the broker has not taken, to send it again after a wait."""
        message.losses = 0
        if not message.returned:
            self.trouble = "a queue does not take it now: it may be full, or without a leader"
        elif message.exchange:
            where = f"{message.exchange!r} as {message.routing_key!r}"
            self.trouble = f"no queue takes what is sent to {where}"
        else:
            self.trouble = f"queue {message.routing_key} is missing, it is declared again"
        if not self._refused:
            now_s = asyncio.get_running_loop().time()
            self._refused_until_s = now_s + self._backoff.next_s()
        if not any(_where(each) == _where(message) for each in self._refused):
            self._log.warning(
                "RabbitMQ did not take a message, sending it again",
                **_where(message),
                error=self.trouble,
            )
        self._refused.append(message)

    async def _check_every_second(self) -> None:
        """Send what was refused, drop what is not wanted, and reconnect if a confirm is late."""
        while True:
            await asyncio.sleep(1)
            now_s = asyncio.get_running_loop().time()
            if self._refused and self._refused_until_s <= now_s:
                if (channel := self._open_channel) is not None:
                    self._declare(channel)
                self._waiting += self._refused
                self._refused = []
            self._send_waiting()
            is_late = self._unconfirmed and self._deadline_s < now_s and not self._blocked
            if is_late and self._client is not None:
                self._client.lose(f"no confirm within {CONFIRM_TIMEOUT_S:.0f} s")
                self._take_back()


def _where(message: Message) -> dict[str, str]:
    return {"exchange": message.exchange, "routing_key": message.routing_key}
