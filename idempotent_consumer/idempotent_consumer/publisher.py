"""RabbitMQ's publishing side: each message is sent until the broker has confirmed it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
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
_SUSPECT_AFTER_LOSSES = 3
_MAX_ROUTING_KEY_BYTES = 255


@dataclass(slots=True, eq=False)
class Message:
    """What is sent to an exchange, as long as it is ``wanted``.

    A header that makes the broker close the connection does so each time. So after a few channels
    lost with it unconfirmed a message is sent alone, and after a few lost with it alone with its
    ``bare`` properties. A nack is no such sign, nor is a channel that is given up on this side.
    ``returned`` says that no queue has taken it, so the ack that follows is void.
    """

    exchange: str
    routing_key: str
    body: bytes
    properties: Any
    bare: Any
    wanted: Callable[[], bool]
    losses: int = 0
    losses_alone: int = 0
    returned: bool = False
    confirmed: asyncio.Future[bool] = field(init=False)

    @property
    def suspect(self) -> bool:
        """Whether it has to be alone in flight, to tell whether channels are lost for it."""
        return self.losses >= _SUSPECT_AFTER_LOSSES

    @property
    def is_bare(self) -> bool:
        """Whether it goes with its bare properties."""
        return self.losses_alone >= _SUSPECT_AFTER_LOSSES

    def resolve(self, *, confirmed: bool) -> None:
        """Tell whoever waits for it, who may have been cancelled."""
        if not self.confirmed.done():
            self.confirmed.set_result(confirmed)


_EVENT_PROPERTIES = pika.BasicProperties(content_type="application/json", delivery_mode=2)


def event_message(
    event: Outgoing, exchange: str = names.EXCHANGE, wanted: Callable[[], bool] = lambda: True
) -> Message:
    """Return the message that publishes an event.

    Its routing key is the event's type, as far as AMQP's short strings can hold it. Raises
    InvalidEvent where every service would park it, and TypeError for a body that is not bytes.
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

    It is wanted while the delivery can still be settled.
    """
    properties = forwarded_properties(delivery.properties, headers)
    bare, body = bare_properties(headers), delivery.body
    return Message(names.DEFAULT_EXCHANGE, queue, body, properties, bare, lambda: delivery.alive)


class Publisher:
    """Publishes on a connection of its own, whose channels are set up by ``declare``.

    An alarm makes the broker stop reading from connections that publish: acks on this one would
    stall. A message whose confirm is unknown is sent again, so it may arrive twice, unless it is
    no longer wanted. ``trouble`` is what keeps the broker from confirming, where it has said so.
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
        self._deadline_s = 0.0  # For the confirm of the first of them.
        self._waiting: list[Message] = []
        self._refused: list[Message] = []
        self._refused_until_s = 0.0
        self._blocked = self._alone = False
        self._backoff = reconnect_wait(system.random)
        self._connection = RecoveringConnection(
            "rabbitmq-publishing", urls, KEEPALIVE, system, health, log
        )

    async def run(self) -> None:
        """Connect and send what waits, and again whenever the channel is lost, until closed."""
        async with asyncio.TaskGroup() as tasks:
            checking = tasks.create_task(self._check_every_second())
            await self._connection.run(self._publish)
            checking.cancel()

    def send(self, message: Message) -> asyncio.Future[bool]:
        """Send a message until it is confirmed: True; or is no longer wanted: False."""
        message.confirmed = asyncio.get_running_loop().create_future()
        self._send(message)
        return message.confirmed

    async def close(self) -> None:
        """Close the connection, and give up what is not confirmed."""
        await self._connection.close()
        for message in (*self._waiting, *self._refused):
            message.resolve(confirmed=False)

    def _send(self, message: Message) -> None:
        channel = self._open_channel
        if not message.wanted():
            message.resolve(confirmed=False)
        elif channel is None or self._alone or (message.suspect and self._unconfirmed):
            self._waiting.append(message)
        else:
            self._alone, message.returned = message.suspect, False
            properties = message.bare if message.is_bare else message.properties
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
    def _open_channel(self) -> Any:
        """The channel, where the broker takes messages; else None."""
        channel = self._client.channel if self._client is not None else None
        return channel if channel is not None and channel.is_open and not self._blocked else None

    def _renew_deadline(self) -> None:
        self._deadline_s = asyncio.get_running_loop().time() + CONFIRM_TIMEOUT_S

    def _send_waiting(self) -> None:
        """Send what waits, in its order but for what even with bare properties lost channels."""
        waiting = sorted(
            self._waiting, key=lambda message: message.losses_alone > _SUSPECT_AFTER_LOSSES
        )
        self._waiting = []
        for message in waiting:
            self._send(message)

    async def _publish(self, client: ClientChannel) -> None:
        channel = client.channel
        self._sequence, self._blocked = 0, False
        self._declare(channel)
        channel.add_on_return_callback(client.callback(self._on_return))
        block, unblock = client.callback(self._on_blocked), client.callback(self._on_unblocked)
        channel.connection.add_on_connection_blocked_callback(block)
        channel.connection.add_on_connection_unblocked_callback(unblock)
        channel.confirm_delivery(client.callback(self._on_confirm), callback=client.replied)
        await client.reply()
        self._client = client
        try:
            self._connection.ready()
            self._send_waiting()
            await client.reply()  # There is none to come but the loss.
        finally:
            if not self._blocked:  # In an alarm the broker has not read them.
                for message in self._unconfirmed.values():
                    message.losses += 1
                    message.losses_alone += self._alone
            self._take_back()

    def _take_back(self) -> None:
        """Keep what is not confirmed on this channel for the next, in its order."""
        self._client, self._alone, self.trouble = None, False, ""
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
        """Note whose ack is void: the broker returns a message before it confirms it."""
        returned = (method.exchange, method.routing_key, body)
        for each in self._unconfirmed.values():
            if not each.returned and (each.exchange, each.routing_key, each.body) == returned:
                each.returned = True
                return

    def _on_confirm(self, frame: Any) -> None:
        is_ack, last = isinstance(frame.method, pika.spec.Basic.Ack), frame.method.delivery_tag
        # Sent in this order, so the first is the lowest.
        oldest = next(iter(self._unconfirmed), last)
        numbers = range(oldest, min(last, self._sequence) + 1) if frame.method.multiple else [last]
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
            self._alone = False
            self._send_waiting()

    def _refuse(self, message: Message) -> None:
        """Send what the broker has not taken again after a wait, which nothing else shares."""
        message.losses = message.losses_alone = 0
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
        """Send what was refused, forget what is not wanted, and give up where a confirm is late."""
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
