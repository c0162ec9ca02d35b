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
    """

    exchange: str
    routing_key: str
    body: bytes
    properties: Any
    bare: Any
    wanted: Callable[[], bool]
    losses: int = 0
    losses_alone: int = 0
    deadline_s: float = 0.0
    confirmed: asyncio.Future[bool] = field(init=False)

    @property
    def suspect(self) -> bool:
        """Whether it has to be alone in flight, to tell whether channels are lost for it."""
        return self.losses >= _SUSPECT_AFTER_LOSSES and self.bare is not self.properties

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
        self._waiting: list[Message] = []
        self._nacked_until_s = 0.0
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
        for message in self._waiting:
            message.resolve(confirmed=False)

    def _send(self, message: Message) -> None:
        channel = self._client.channel if self._client is not None else None
        if not message.wanted():
            message.resolve(confirmed=False)
        elif channel is None or self._blocked or self._alone or not channel.is_open:
            self._waiting.append(message)
        else:
            if message.losses:
                self._alone = message.suspect
            is_bare = message.losses_alone >= _SUSPECT_AFTER_LOSSES
            message.deadline_s = asyncio.get_running_loop().time() + CONFIRM_TIMEOUT_S
            self._sequence += 1
            self._unconfirmed[self._sequence] = message
            channel.basic_publish(
                message.exchange,
                message.routing_key,
                message.body,
                message.bare if is_bare else message.properties,
                mandatory=True,
            )

    def _send_waiting(self) -> None:
        """Send what waits: first, one after the other, what channels were lost with."""
        waiting = sorted(self._waiting, key=lambda message: not message.suspect)
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
            alone = len(self._unconfirmed) == 1
            for message in self._unconfirmed.values():
                message.losses += 1
                message.losses_alone += alone
            self._take_back()

    def _take_back(self) -> None:
        """Keep what is not confirmed on this channel for the next, in its order."""
        self._client, self._alone = None, False
        self._waiting = [*self._unconfirmed.values(), *self._waiting]
        self._unconfirmed = {}

    def _give_up(self, why: str) -> None:
        if self._client is not None:
            self._client.lose(why)
            self._take_back()

    def _on_blocked(self, *_: Any) -> None:
        self._blocked = True
        self.trouble = "RabbitMQ has an alarm and takes no messages"
        self._log.warning(f"{self.trouble}: retries and dead letters wait, consuming goes on")

    def _on_unblocked(self, *_: Any) -> None:
        self._blocked = False
        deadline_s = asyncio.get_running_loop().time() + CONFIRM_TIMEOUT_S
        for message in self._unconfirmed.values():
            message.deadline_s = deadline_s
        self._send_waiting()

    def _on_confirm(self, frame: Any) -> None:
        if self._client is None:
            return
        is_ack, last = isinstance(frame.method, pika.spec.Basic.Ack), frame.method.delivery_tag
        # Sent in this order, so the first is the lowest.
        first = next(iter(self._unconfirmed), last) if frame.method.multiple else last
        numbers = range(first, last + 1)
        messages = [self._unconfirmed.pop(n) for n in numbers if n in self._unconfirmed]
        if is_ack:
            self.trouble = ""
            self._backoff.waits = 0
            for message in messages:
                message.resolve(confirmed=True)
        else:
            self._on_nack(messages)
        if self._alone:
            self._alone = False
            self._send_waiting()

    def _on_nack(self, messages: list[Message]) -> None:
        for message in messages:
            message.losses = message.losses_alone = 0
            self._log.warning(
                "RabbitMQ did not take a message, sending it again",
                exchange=message.exchange,
                routing_key=message.routing_key,
            )
        self._waiting += messages
        now_s = asyncio.get_running_loop().time()
        if self._nacked_until_s <= now_s:
            self._nacked_until_s = now_s + self._backoff.next_s()

    def _on_return(self, _channel: Any, method: Any, _properties: Any, _body: bytes) -> None:
        """Open a new channel: what is missing is declared again, and the ack to come is void."""
        self.trouble = (
            f"no queue takes what is sent to {method.exchange!r} as {method.routing_key!r}"
            if method.exchange
            else f"queue {method.routing_key} is missing, it is declared again"
        )
        self._give_up(self.trouble)

    async def _check_every_second(self) -> None:
        """Send what was nacked, forget what is not wanted, and give up where a confirm is late."""
        while True:
            await asyncio.sleep(1)
            now_s = asyncio.get_running_loop().time()
            if self._nacked_until_s <= now_s:
                self._send_waiting()
            oldest = next(iter(self._unconfirmed.values()), None)
            if oldest and oldest.deadline_s < now_s and not self._blocked:
                self._give_up(f"no confirm within {CONFIRM_TIMEOUT_S:.0f} s")
