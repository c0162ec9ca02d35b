"""Consuming from RabbitMQ: a service's queues, connections that recover, deliveries and their acks.

pika's callbacks end here and in ``publisher``. All code above them awaits.
"""

from __future__ import annotations

import asyncio
import math
from bisect import bisect
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import cycle
from types import MappingProxyType
from typing import Any, NamedTuple

from pika import spec
from pika.exceptions import ChannelWrongStateError, ConnectionWrongStateError
from structlog.typing import FilteringBoundLogger
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

from . import amqp, names
from .event import NOTHING, Decoder, Event, Properties, decode, decode_by
from .health import Health
from .system import System, reconnect_wait

COMMITS_IN_FLIGHT = 4
"""Most batches that etcd has not answered yet."""

MAX_BYTES_IN_FLIGHT = 32 * 1024 * 1024
"""When unacked deliveries take more memory than this, a service stops reading until half of it is
settled. The prefetch alone would allow gigabytes."""

GONE_WITHIN_S = 0.25
"""How long after a cancel the queue is looked for. RabbitMQ cancels the consumers of a queue some
milliseconds before it deletes the queue (2 to 6 ms with 4.0.5 and 4.3.6, one node)."""

ASKED_EVERY_S, ANSWERS_WITHIN_S = 2.0, 5.0
"""How often one broker of several is asked whether it has a majority, and how long the answer may
take: longer than the others need to elect a leader after one of them is lost."""

LAST_ACKS_S = 0.5
"""How long a channel stays open after its last ack. RabbitMQ passes acks on to a quorum queue 32 at
a time, and drops those that have not been passed on when the channel closes."""

HELD_S = 10.0
"""After a connection that was ready for longer, the waits begin with the shortest again. One that
ends sooner counts as a failure: each costs every unacked delivery one of its returns."""

SAID_EVERY_S = 10.0
"""How often a failure is logged again while it stays the same."""

CLOSE_TIMEOUT_S = 1.0
"""How long the broker has to confirm that a connection is closed. Then the socket is closed."""


def prefetch(batch_size: int) -> int:
    """Return how many deliveries may be unacked: the batches in flight, and as many to follow."""
    return min(32_767, 2 * COMMITS_IN_FLIGHT * batch_size)


# The exchange and queues of a service, declared on each new channel.

DELIVERY_LIMIT = 1000
"""For events that kill the process again and again. RabbitMQ 4.0 counts every return, also after a
lost connection, so the limit is far above what outages cost all other events."""


class Topology(NamedTuple):
    """What a service declares: an exchange, its queues, and the bindings between them.

    ``retry_delays`` are the delays of all its handlers: the name, as in RETRY_DELAYS, and seconds.
    """

    service: str
    exchange: str = names.EXCHANGE
    bindings: Sequence[str] = (names.BINDING_KEY,)
    retry_delays: Sequence[tuple[str, int]] = ()

    def declare(self, channel: Any) -> None:
        """Declare everything without waiting: on an error the broker closes the channel.

        Bindings that are no longer asked for stay: another version may need them.
        """
        declare_exchange(channel, self.exchange)
        for queue, arguments in queue_arguments(self.service, self.retry_delays).items():
            channel.queue_declare(queue, durable=True, arguments=arguments)
        for key in self.bindings:
            channel.queue_bind(self.service, self.exchange, key)


def declare_exchange(channel: Any, exchange: str) -> None:
    """Declare the exchange that events are published to."""
    channel.exchange_declare(exchange, "topic", durable=True)


def queue_arguments(
    service: str, retry_delays: Iterable[tuple[str, int]]
) -> dict[str, dict[str, object]]:
    """Return the arguments of each queue of a service, by its name. They never change once made.

    At-least-once dead-lettering needs quorum queues and ``reject-publish``. Without both, RabbitMQ
    falls back to at-most-once (RabbitMQ's guide "Quorum Queues", Dead Lettering). Dead letters go
    through the default exchange to one queue: through ``events`` every service would get them.
    """
    dead_letters = names.dead_letter_queue(service)
    found: dict[str, dict[str, object]] = {
        # Unlimited: by default the 21st look at one, in RabbitMQ's UI for instance, drops it.
        dead_letters: {"x-delivery-limit": -1},
        service: {"x-delivery-limit": DELIVERY_LIMIT, **_dead_lettered_to(dead_letters)},
    }
    for delay, seconds in retry_delays:
        # One queue for each delay: in a single queue, messages would wait behind longer delays.
        until_due = {"x-message-ttl": seconds * 1000, **_dead_lettered_to(service)}
        found[names.retry_queue(service, delay)] = until_due
    return {queue: {"x-queue-type": "quorum", **each} for queue, each in found.items()}


def _dead_lettered_to(queue: str) -> dict[str, object]:
    return {
        "x-dead-letter-exchange": names.DEFAULT_EXCHANGE,
        "x-dead-letter-routing-key": queue,
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }


# Deliveries.


def _in_memory_bytes(properties: bytes, body: bytes) -> int:
    """Return an upper bound for the memory that a delivery takes once it is decoded.

    As Python objects, an array of ``{}`` takes 28 times its text and headers up to 15 times theirs.
    """
    return 16 * len(properties) + len(body) + 100 * body.count(b",")


class Epoch:
    """The life of one channel: which of its deliveries are unsettled, and how they are acked.

    A delivery tag has no meaning on another channel, so nothing is settled after the end of this
    one. While more than ``max_bytes`` are unsettled nothing is read; ``pauses`` counts how often.
    """

    def __init__(self, number: int, channel: Any, max_bytes: int = MAX_BYTES_IN_FLIGHT) -> None:
        self.number, self.channel, self.alive = number, channel, True
        self.paused, self.pauses = False, 0
        # By tag, in order: when the delivery arrived, and its size.
        self._unsettled: dict[int, tuple[float, int]] = {}
        self._bytes, self._max_bytes = 0, max_bytes
        self._settled: list[int] = []

    def arrived(self, tag: int, at_s: float = 0.0, size_bytes: int = 0) -> bool:
        """Add a delivery. Return True if it makes this pause reading for the first time."""
        self._unsettled[tag] = (at_s, size_bytes)
        self._bytes += size_bytes
        if self._bytes <= self._max_bytes or self.paused:
            return False
        self.paused, self.pauses = True, self.pauses + 1
        self.channel.connection.pause_reading()
        return self.pauses == 1

    def settle(self, tag: int) -> None:
        """Have a delivery acked by the next `flush`."""
        _, size_bytes = self._unsettled.pop(tag)
        self._bytes -= size_bytes
        self._settled.append(tag)
        if self.paused and self._bytes <= self._max_bytes // 2:
            self.resume()

    def resume(self) -> None:
        """Read again, if reading was paused."""
        if self.paused:
            self.paused = False
            self.channel.connection.resume_reading()

    @property
    def in_hand(self) -> int:
        """How many deliveries are unsettled."""
        return len(self._unsettled)

    @property
    def oldest_s(self) -> float | None:
        """When the oldest unsettled delivery arrived, or None."""
        return next((at_s for at_s, _ in self._unsettled.values()), None)

    def flush(self, *, past_gap: bool = False) -> None:
        """Ack what is settled: all before the first unsettled delivery in one ack.

        With ``past_gap`` each of the others is acked by itself.
        """
        if not self._settled or not self.channel.is_open:
            return
        self._settled.sort()
        first_unsettled = next(iter(self._unsettled), math.inf)
        if number := bisect(self._settled, first_unsettled):
            self.channel.basic_ack(self._settled[number - 1], multiple=True)
            del self._settled[:number]
        if past_gap:
            for tag in self._settled:
                self.channel.basic_ack(tag)
            self._settled.clear()

    def end(self) -> int:
        """Let nothing more be settled. Return how many deliveries the broker requeues."""
        self.alive = False
        self.resume()
        return self.in_hand


class Delivery:
    """One arrival of a message on a channel. Its properties are decoded when first read."""

    __slots__ = ("_properties", "body", "epoch", "tag")

    def __init__(self, epoch: Epoch, tag: int, properties: Any, body: bytes) -> None:
        self.epoch, self.tag, self._properties, self.body = epoch, tag, properties, body

    @property
    def properties(self) -> Any:
        """The message's properties, as pika's BasicProperties."""
        if isinstance(self._properties, bytes):
            self._properties = amqp.Properties().decode(self._properties)
        return self._properties

    @property
    def headers(self) -> Mapping[str, Any]:
        """The message's own headers, without those of this library and of the broker."""
        if isinstance(self._properties, bytes) and not amqp.has_headers(self._properties):
            return NOTHING
        headers = (self.properties.headers or {}).items()
        reserved = names.RESERVED_HEADERS
        return MappingProxyType({name: value for name, value in headers if name not in reserved})

    def event(self, decoder: Decoder | None) -> Event:
        """Decode the message. Raises InvalidEvent, and what a decoder raises."""
        headers = self.headers
        if decoder is None:
            event = decode(self.body)
        else:
            own = self.properties
            seen = Properties(headers, own.message_id, own.type, own.content_type)
            event = decode_by(decoder, self.body, seen)
        return event._replace(headers=headers) if headers else event

    @property
    def attempts(self) -> int:
        """How often its event has failed, by our header; 0 if that makes no sense."""
        value = (self.properties.headers or {}).get(names.ATTEMPTS_HEADER, 0)
        return value if type(value) is int and 0 <= value <= 1000 else 0

    @property
    def alive(self) -> bool:
        """Whether it can still be settled."""
        return self.epoch.alive

    def settle(self) -> bool:
        """Have it acked by the next flush. Return False if the broker has requeued it already."""
        if self.epoch.alive:
            self.epoch.settle(self.tag)
        return self.epoch.alive


# Connections.


class ChannelLost(Exception):
    """The channel or its connection is lost; the message says why, in one line."""


class ClientChannel:
    """One connection with one channel, from when it is opened until it is closed.

    What pika reports goes into a queue, from which ``reply`` takes it in order: first the channel,
    then the answer to each request that had ``replied`` as its callback, and finally the loss.
    """

    channel: Any = None

    def __init__(self, connect: Callable[..., Any], parameters: Any) -> None:
        self._replies: asyncio.Queue[Any] = asyncio.Queue()
        self.replied = self._replies.put_nowait
        self._closed = asyncio.get_running_loop().create_future()
        self._over = False
        self._defect: Exception | None = None
        on_channel = self.callback(self._on_channel)
        on_open = self.callback(lambda opened: opened.channel(on_open_callback=on_channel))
        self._connection = connect(
            parameters,
            on_open_callback=on_open,
            on_open_error_callback=self._on_closed,
            on_close_callback=self._on_closed,
        )

    async def reply(self) -> Any:
        """Return the next reply. Raises ChannelLost, and what a callback has raised."""
        reply = await self._replies.get()
        if isinstance(reply, Exception):
            raise reply
        return reply

    def lose(self, why: str) -> None:
        """Give up the channel. Only the first reason counts."""
        self.replied(ChannelLost(why))

    def callback(self, function: Callable[..., None]) -> Callable[..., None]:
        """Return the function as pika may call it. Once this is closed, it does nothing.

        What it raises is a defect, and is raised by ``reply`` and ``close``. pika would treat it as
        a lost connection, or leave it to the loop.
        """

        def call(*arguments: Any) -> None:
            if self._over:
                return
            try:
                function(*arguments)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is raised elsewhere.
                self._defect = error
                self.replied(error)

        return call

    async def close(self) -> None:
        """Close the connection; the broker requeues what is unacked. Raises a callback's defect."""
        self._over = True
        if not self._closed.done():
            with suppress(ConnectionWrongStateError):
                self._connection.close()
            await asyncio.wait({self._closed}, timeout=CLOSE_TIMEOUT_S)
        if not self._closed.done():
            # As long as the broker got heartbeats, it would not requeue what is unacked.
            self._connection.abort()
        if self._defect is not None:
            raise self._defect

    def _on_channel(self, channel: Any) -> None:
        channel.add_on_close_callback(lambda _, error: self.lose(amqp.explain(error)))
        self.channel = channel
        self.replied(channel)

    def _on_closed(self, _connection: Any, error: BaseException) -> None:
        self._closed.set_result(None)
        self.lose(amqp.explain(error))


class RecoveringConnection:
    """Keeps a channel open. When it is lost, it connects again, after ever longer waits.

    The addresses are tried in random order, each of them before any is tried again. Raises
    SettingsError for an address that cannot be one.
    """

    def __init__(
        self,
        name: str,
        urls: Sequence[str],
        tcp_options: dict[str, int],
        system: System,
        health: Health,
        log: FilteringBoundLogger,
    ) -> None:
        amqp.keep_header_bytes()
        self._name, self._system, self._health = name, system, health
        self._log = log.bind(connection=name)
        self._parameters = [amqp.parameters_of(url, name, tcp_options) for url in urls]
        self._backoff = reconnect_wait(system.random)
        self._node, self._ready_s = "", math.inf
        self._said, self._said_s = "", -math.inf
        self._closing = asyncio.Event()
        self._running: asyncio.Task[Any] | None = None
        health.lacks(name, "not connected yet")

    async def run(self, use: Callable[[ClientChannel], Awaitable[None]]) -> None:
        """Await ``use`` with an open channel, and again when it raises ChannelLost, until closed.

        Any other exception of it, or of a callback, is raised in an ExceptionGroup.
        """
        # tenacity adds to statistics that it keeps per thread, and a shared Producer changes its
        # thread between attempts. Nobody reads them, so they are made again after each attempt.
        recover = AsyncRetrying(
            retry=retry_if_exception_type(ChannelLost),
            wait=self._wait_s,
            sleep=asyncio.sleep,
            after=lambda state: state.retry_object.begin(),
        )
        self._addresses = cycle(self._system.random.sample(self._parameters, len(self._parameters)))
        self._running = asyncio.current_task()
        async with asyncio.TaskGroup() as tasks:
            recovering: asyncio.Task[None] = tasks.create_task(recover(self._connect, use))
            await self._closing.wait()
            recovering.cancel()

    def ready(self) -> None:
        """Report that the channel is in use."""
        self._ready_s = asyncio.get_running_loop().time()
        self._health.has(self._name)
        self._said = ""
        self._log.info("connected to RabbitMQ", node=self._node)

    async def close(self) -> None:
        """Close the connection, and return when ``run`` has ended."""
        self._closing.set()
        if self._running is not None:
            await asyncio.wait({self._running})

    async def _connect(self, use: Callable[[ClientChannel], Awaitable[None]]) -> None:
        address, self._ready_s = next(self._addresses), math.inf
        self._node = f"{address.host}:{address.port}"
        client = ClientChannel(self._system.connect, address)
        try:
            await client.reply()
            await use(client)
        except (ChannelWrongStateError, ConnectionWrongStateError) as error:
            # The channel is lost, and the reason may still be among the replies.
            client.lose(amqp.explain(error))
            while True:
                await client.reply()
        finally:
            await client.close()

    def _wait_s(self, state: RetryCallState) -> float:
        """Report a loss, and return the seconds until the next attempt."""
        why = str(state.outcome.exception()) if state.outcome else ""
        now_s = asyncio.get_running_loop().time()
        if now_s - self._ready_s > HELD_S:
            self._backoff.waits = 0
        wait_s = self._backoff.next_s()
        self._health.lacks(self._name, why)
        if why != self._said or now_s - self._said_s >= SAID_EVERY_S:
            self._said, self._said_s = why, now_s
            self._log.warning(
                "no connection to RabbitMQ, trying again",
                error=why,
                node=self._node,
                again_in_s=round(wait_s, 2),
            )
        return wait_s


class Intake:
    """Consumes a service's queue on a connection of its own.

    At most ``prefetch`` deliveries are unacked. Nothing is read while they take more than
    ``max_bytes``. For each channel that is lost, ``returned`` is called with the number of
    deliveries that the broker requeues.
    """

    def __init__(
        self,
        topology: Topology,
        urls: Sequence[str],
        prefetch: int,
        system: System,
        health: Health,
        log: FilteringBoundLogger,
        returned: Callable[[int], None],
        max_bytes: int = MAX_BYTES_IN_FLIGHT,
    ) -> None:
        self._topology, self._urls, self._log = topology, urls, log
        self._prefetch, self._max_bytes, self._returned = prefetch, max_bytes, returned
        self._arrived: list[Delivery] = []
        self._some_arrived = asyncio.Event()
        self._epochs = 0
        self._epoch: Epoch | None = None
        self._consumer_tag = ""
        self._stopping = False
        self._connection = RecoveringConnection(
            "rabbitmq", urls, amqp.TCP_OPTIONS, system, health, log
        )

    async def run(self) -> None:
        """Stay connected and consume, until ``close``."""
        await self._connection.run(self._consume)

    async def deliveries(self) -> list[Delivery]:
        """Wait until there are deliveries, and return all of them, in order."""
        await self._some_arrived.wait()
        self._some_arrived.clear()
        arrived, self._arrived = self._arrived, []
        return arrived

    @property
    def in_hand(self) -> int:
        """How many deliveries have arrived and are unsettled."""
        return self._epoch.in_hand if self._epoch is not None else 0

    @property
    def arrived(self) -> int:
        """How many deliveries ``deliveries`` would return."""
        return len(self._arrived)

    def flush(self, *, past_gap: bool = False) -> None:
        """Ack what is settled, as `Epoch.flush` does."""
        if self._epoch is not None:
            self._epoch.flush(past_gap=past_gap)

    def stop(self) -> None:
        """Stop consuming; what is in flight can still be settled."""
        self._stopping = True
        if self._epoch is not None and self._epoch.channel.is_open:
            # pika returns to the broker what still arrives.
            self._epoch.channel.connection.reader = None
            self._epoch.channel.basic_cancel(self._consumer_tag)
            self._epoch.resume()

    async def close(self) -> None:
        """Close the connection once the last acks are safe; what is unacked is requeued."""
        await asyncio.sleep(LAST_ACKS_S)
        await self._connection.close()

    async def _consume(self, client: ClientChannel) -> None:
        channel = client.channel
        self._topology.declare(channel)
        channel.basic_qos(prefetch_count=self._prefetch, callback=client.replied)
        await client.reply()
        if self._stopping:
            return
        self._epochs += 1
        epoch = self._epoch = Epoch(self._epochs, channel, self._max_bytes)

        def arrive(deliveries: list[amqp.Arrival]) -> None:
            at_s = asyncio.get_running_loop().time()
            for tag, properties, body in deliveries:
                self._arrived.append(Delivery(epoch, tag, properties, body))
                if epoch.arrived(tag, at_s, _in_memory_bytes(properties, body)):
                    self._log.warning(
                        "what is in flight is large: no more is read until half of it is settled",
                        deliveries=epoch.in_hand,
                        bytes=self._max_bytes,
                    )
            self._some_arrived.set()

        def cancelled(method: Any) -> None:
            # pika drops what it reads after the cancel. If later deliveries were read here, their
            # ack would cover what pika has dropped.
            channel.connection.reader = None
            client.replied(method)

        # Before consuming: one read of the socket can bring the broker's answer and a cancel.
        channel.add_on_cancel_callback(client.callback(cancelled))
        on_deliveries = client.callback(arrive)

        def on_message(_channel: Any, method: Any, properties: Any, body: bytes) -> None:
            on_deliveries([(method.delivery_tag, b"".join(properties.encode()), body)])

        try:
            tag = channel.basic_consume(self._topology.service, on_message, callback=client.replied)
            self._consumer_tag = tag
            channel.connection.reader = amqp.Reader(channel.channel_number, tag, on_deliveries)
            await client.reply()
            self._connection.ready()
            await self._cancelled(client, epoch)
            raise ChannelLost(await self._why_cancelled(client, epoch))
        finally:
            self._epoch = None
            self._returned(epoch.end())

    async def _cancelled(self, client: ClientChannel, epoch: Epoch) -> None:
        """Wait until the broker cancels the consumer. Raises ChannelLost.

        When its node is cut off from the others, RabbitMQ 4.3 delivers nothing more and does not
        say so. So one broker of several is asked now and then to bind a queue that is bound
        already, which changes nothing but needs a majority.
        """
        asked, pauses = False, epoch.pauses
        while True:
            until_s = ANSWERS_WITHIN_S if asked else ASKED_EVERY_S
            asks = len(self._urls) > 1 and not self._stopping
            try:
                async with asyncio.timeout(until_s if asks else None):
                    reply = await client.reply()
                if not isinstance(reply.method, spec.Queue.BindOk):
                    return
                asked = False
            except TimeoutError:
                if not asked:
                    service, exchange, (key, *_), _ = self._topology
                    client.channel.queue_bind(service, exchange, key, callback=client.replied)
                # If reading was paused meanwhile, the answer may not have been read.
                elif not epoch.paused and epoch.pauses == pauses:
                    raise ChannelLost(
                        f"no answer within {ANSWERS_WITHIN_S:.0f} s: this broker may be cut off "
                        "from the others"
                    ) from None
                asked, pauses = True, epoch.pauses

    async def _why_cancelled(self, client: ClientChannel, epoch: Epoch) -> str:
        """Return why the broker has cancelled the consumer, which basic.cancel does not say.

        RabbitMQ 4.3 cancels a consumer that has held a delivery for longer than the consumer
        time-out, and requeues that delivery; the others stay unacked until the channel is closed.
        Raises ChannelLost if the queue is gone.
        """
        held, oldest_s = "none is unacked now", epoch.oldest_s
        if oldest_s is not None:
            held = f"the oldest for {asyncio.get_running_loop().time() - oldest_s:.1f} s"
        await asyncio.sleep(GONE_WITHIN_S)
        client.channel.queue_declare(self._topology.service, passive=True, callback=client.replied)
        await client.reply()
        return (
            "the broker cancelled the consumer, whose queue is still there: probably a delivery "
            f"was unacked for longer than the broker's consumer_timeout ({held})"
        )
