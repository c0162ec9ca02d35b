"""RabbitMQ's publishing side: each message is sent until the broker has confirmed it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pika
from structlog.typing import FilteringBoundLogger

from . import names
from .amqp import KEEPALIVE, bare_properties, forwarded_properties
from .bus import Delivery, RecoveringConnection, Session
from .event import decode
from .health import Health
from .system import Backoff, System, reconnect_wait

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


_EVENT_PROPERTIES = pika.BasicProperties(content_type="application/json", delivery_mode=2)


def _always() -> bool:
    return True


def event_message(body: bytes, wanted: Callable[[], bool] = _always) -> Message:
    """Return the message that publishes an event to the exchange of every service's queue.

    Its routing key is the event's type, as far as AMQP's short strings can hold it. Raises
    InvalidEvent where every service would park it.
    """
    key = decode(body).type
    if len(key) > _MAX_ROUTING_KEY_BYTES // 4:
        key = key.encode()[:_MAX_ROUTING_KEY_BYTES].decode(errors="ignore")
    return Message(names.EXCHANGE, key, body, _EVENT_PROPERTIES, _EVENT_PROPERTIES, wanted)


def forwarded_message(delivery: Delivery, queue: str, headers: dict[str, object]) -> Message:
    """Return the message that sends a delivery on to a queue, with more headers.

    It is wanted while the delivery can still be settled.
    """
    return Message(
        names.DEFAULT_EXCHANGE,
        queue,
        delivery.body,
        forwarded_properties(delivery.properties, headers),
        bare_properties(headers),
        lambda: delivery.alive,
    )


class Publisher:
    """Publishes on a connection of its own, whose channels are set up by ``declare``.

    An alarm makes the broker stop reading from connections that publish: acks on this one would
    stall. A message whose confirm is unknown is sent again, so it may arrive twice, unless it is
    no longer wanted.
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
        """What keeps the broker from confirming, where it has said so; empty after a confirm."""
        self._session: Session | None = None
        self._sequence = 0
        self._unconfirmed: dict[int, Message] = {}  # In the order in which they were sent.
        self._waiting: deque[Message] = deque()
        self._nacked: list[Message] = []
        self._nacked_until_s = 0.0
        self._blocked = False
        self._backoff = Backoff(reconnect_wait(system.random))
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
        self._waiting.append(message)
        self._send_waiting()
        return message.confirmed

    async def close(self) -> None:
        """Close the connection, and give up what is not confirmed."""
        await self._connection.close()
        for message in (*self._waiting, *self._nacked):
            _resolve(message, confirmed=False)

    def _send_waiting(self) -> None:
        """Send what waits, in its order, as far as it can be sent now."""
        while self._waiting:
            message = self._waiting[0]
            if not message.wanted():
                _resolve(self._waiting.popleft(), confirmed=False)
            elif (channel := self._channel_for(message)) is not None:
                self._send(channel, self._waiting.popleft())
            else:
                break

    def _channel_for(self, message: Message) -> Any:
        channel = self._session.channel if self._session is not None else None
        if channel is None or self._blocked or not channel.is_open:
            return None
        in_flight = next(iter(self._unconfirmed.values()), None)
        return channel if in_flight is None or not (in_flight.suspect or message.suspect) else None

    def _send(self, channel: Any, message: Message) -> None:
        message.deadline_s = asyncio.get_running_loop().time() + CONFIRM_TIMEOUT_S
        self._sequence += 1
        self._unconfirmed[self._sequence] = message
        channel.basic_publish(
            message.exchange,
            message.routing_key,
            message.body,
            message.bare if message.losses_alone >= _SUSPECT_AFTER_LOSSES else message.properties,
            mandatory=True,
        )

    async def _publish(self, session: Session) -> None:
        channel = session.channel
        self._sequence, self._blocked = 0, False
        self._declare(channel)
        channel.add_on_return_callback(session.callback(self._on_return))
        block, unblock = session.callback(self._on_blocked), session.callback(self._on_unblocked)
        channel.connection.add_on_connection_blocked_callback(block)
        channel.connection.add_on_connection_unblocked_callback(unblock)
        channel.confirm_delivery(session.callback(self._on_confirm), callback=session.replied)
        await session.reply()
        self._session = session
        try:
            self._connection.ready()
            self._send_waiting()
            await session.reply()  # There is none to come but the loss.
        finally:
            alone = len(self._unconfirmed) == 1
            for message in self._unconfirmed.values():
                message.losses += 1
                message.losses_alone += alone
            self._take_back()

    def _take_back(self) -> None:
        """Send on the next channel what is not confirmed on this one, in its order."""
        self._session = None
        self._waiting.extendleft(reversed(self._unconfirmed.values()))
        self._unconfirmed = {}

    def _give_up(self, session: Session, why: str) -> None:
        self._take_back()
        session.lose(why)

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
        if self._session is None:
            return
        method = frame.method
        confirmed = self._take(method.delivery_tag, method.multiple)
        if isinstance(method, pika.spec.Basic.Ack):
            self._backoff.reset()
            self.trouble = ""
            for message in confirmed:
                _resolve(message, confirmed=True)
        else:
            self._on_nack(confirmed)
        self._send_waiting()

    def _take(self, last: int, multiple: bool) -> Iterable[Message]:
        """Take out the message that a confirm is for, or all up to it."""
        # Sent in this order, so the first is the lowest.
        first = next(iter(self._unconfirmed), last) if multiple else last
        numbers = range(first, last + 1)
        return [self._unconfirmed.pop(n) for n in numbers if n in self._unconfirmed]

    def _on_nack(self, messages: Iterable[Message]) -> None:
        if not self._nacked:
            self._nacked_until_s = asyncio.get_running_loop().time() + self._backoff.next_s()
        for message in messages:
            self._log.warning(
                "RabbitMQ did not take a message, sending it again",
                exchange=message.exchange,
                routing_key=message.routing_key,
            )
            self._nacked.append(message)

    def _on_return(self, _channel: Any, method: Any, _properties: Any, _body: bytes) -> None:
        """Open a new channel: what is missing is declared anew, and the ack to come is void."""
        session = self._session
        if session is None:
            return
        self.trouble = (
            f"no queue takes what is sent to {method.exchange!r} as {method.routing_key!r}"
            if method.exchange
            else f"queue {method.routing_key} is missing, it is declared anew"
        )
        self._give_up(session, self.trouble)

    async def _check_every_second(self) -> None:
        while True:
            await asyncio.sleep(1)
            self._check(asyncio.get_running_loop().time())

    def _check(self, now_s: float) -> None:
        # Where no connection comes they would be kept for ever, with their bodies.
        waiting, self._waiting = self._waiting, deque()
        for message in waiting:
            if message.wanted():
                self._waiting.append(message)
            else:
                _resolve(message, confirmed=False)
        if self._nacked_until_s <= now_s:
            nacked, self._nacked = self._nacked, []
            self._waiting.extend(nacked)
            self._send_waiting()
        oldest = next(iter(self._unconfirmed.values()), None)
        if oldest and oldest.deadline_s < now_s and self._session and not self._blocked:
            self._give_up(self._session, f"no confirm within {CONFIRM_TIMEOUT_S:.0f} s")


def _resolve(message: Message, *, confirmed: bool) -> None:
    # Whoever waited for it may have been cancelled.
    if not message.confirmed.done():
        message.confirmed.set_result(confirmed)
