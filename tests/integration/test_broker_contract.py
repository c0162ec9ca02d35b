"""Runs each test on the RabbitMQ in memory and on a real one.

So the unit tests and the simulation may rely on the one in memory.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pika
import pytest
from pika.exceptions import ChannelWrongStateError

from idempotent_consumer.amqp import Connection
from idempotent_consumer.testing.broker import FakeBroker
from idempotent_consumer.testing.loop import Loop
from servers.broker import Broker
from servers.servers import Servers

DEADLINE_S = 20.0
QUORUM = {"x-queue-type": "quorum"}
QUEUE = "contract"
"""All queues of a test have names that begin with this."""


@dataclass
class Client:
    """A connection with a channel. ``seen`` is what the broker has sent to it, in order."""

    connection: Any
    channel: Any
    seen: list[tuple[Any, ...]] = field(default_factory=list)
    tag: str = ""

    async def ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the channel, and return the broker's answer."""
        answered = asyncio.get_running_loop().create_future()
        getattr(self.channel, method)(*arguments, callback=answered.set_result, **options)
        return (await answered).method

    async def declare(self, queue: str, **arguments: Any) -> Any:
        named = {"x-" + name.replace("_", "-"): value for name, value in arguments.items()}
        return await self.ask("queue_declare", queue, durable=True, arguments=QUORUM | named)

    async def consume(self, queue: str, prefetch: int = 0) -> None:
        """Consume a queue. A delivery is seen as body, tag, redelivered and headers."""
        await self.ask("basic_qos", prefetch_count=prefetch)

        def on_message(_channel: Any, method: Any, properties: Any, body: bytes) -> None:
            headers = properties.headers or {}
            self.seen.append((body, method.delivery_tag, method.redelivered, headers))

        self.tag = (await self.ask("basic_consume", queue, on_message)).consumer_tag

    async def confirm(self) -> None:
        """Ask for confirms, and note them and what is returned."""

        def on_confirm(method: Any) -> None:
            confirm = method.method
            self.seen.append((confirm.NAME, confirm.delivery_tag))

        def on_return(_channel: Any, method: Any, _properties: Any, body: bytes) -> None:
            self.seen.append(("return", method.reply_code, method.routing_key, body))

        self.channel.add_on_return_callback(on_return)
        await self.ask("confirm_delivery", on_confirm)

    def publish(self, queue: str, body: bytes, exchange: str = "", **headers: Any) -> None:
        properties = pika.BasicProperties(headers=headers, delivery_mode=2)
        self.channel.basic_publish(exchange, queue, body, properties, mandatory=True)

    async def sees(self, number: int) -> list[tuple[Any, ...]]:
        """Wait until so much has been seen, and return all of it."""
        await until(lambda: len(self.seen) >= number)
        return self.seen

    async def is_closed_for(self) -> str:
        """Wait until the channel is closed, and return why."""
        await until(lambda: bool(self.channel.is_closed))
        error = self.seen[-1][1]
        return f"{error.reply_code} {error.reply_text}"


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


@dataclass
class Subject:
    """A broker under test."""

    connect: Callable[..., Any]
    run_coroutine: Callable[[Coroutine[Any, Any, None]], None]
    set_alarm: Callable[[bool], None]
    delete_queue: Callable[[str], None]
    connections: list[Any] = field(default_factory=list)

    def run(self, scenario: Coroutine[Any, Any, None]) -> None:
        """Run a test's scenario, and close its connections."""

        async def run() -> None:
            async with asyncio.timeout(DEADLINE_S):
                await scenario
                for connection in self.connections:
                    if connection.is_open:
                        connection.close()
                await until(lambda: all(one.is_closed for one in self.connections))

        self.run_coroutine(run())

    async def client(self) -> Client:
        loop = asyncio.get_running_loop()
        opened = loop.create_future()
        self.connect(
            on_open_callback=opened.set_result,
            on_open_error_callback=lambda _, error: opened.set_exception(error),
            on_close_callback=lambda *_: None,
        )
        self.connections.append(await opened)
        channel = loop.create_future()
        opened.result().channel(on_open_callback=channel.set_result)
        client = Client(opened.result(), await channel)
        client.channel.add_on_close_callback(lambda _, why: client.seen.append(("closed", why)))
        client.channel.add_on_cancel_callback(
            lambda method: client.seen.append(("cancelled", method.method.consumer_tag))
        )
        return client

    async def consuming(self, *bodies: bytes, prefetch: int = 0) -> Client:
        """Return a client with deliveries from a new queue, as many as the prefetch allows."""
        client = await self.client()
        await client.declare(QUEUE)
        for body in bodies:
            client.publish(QUEUE, body)
        await client.consume(QUEUE, prefetch)
        await client.sees(prefetch or len(bodies))
        return client


@pytest.fixture(params=["in memory", "real"])
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    """Give each of the two brokers."""
    if request.param == "in memory":
        loop = Loop()
        fake = FakeBroker(loop.agenda)
        connect, run = partial(fake.connect, None), loop.run_until_complete
        yield Subject(connect, run, fake.set_alarm, fake.delete_queue)
        loop.kill()
        return
    servers: Servers = request.getfixturevalue("servers")
    servers.heal()
    connect = partial(Connection, pika.URLParameters(servers.rabbitmq.url))

    def set_alarm(alarm: bool) -> None:
        servers.rabbitmq.ctl("set_vm_memory_high_watermark", "0" if alarm else "0.6")

    delete_queues = Broker(servers.rabbitmq).delete_queues
    yield Subject(connect, asyncio.run, set_alarm, delete_queues)
    delete_queues(QUEUE)


def scenario(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Make a coroutine function a test, which its subject runs."""

    @functools.wraps(test)
    def run(subject: Subject, **parameters: Any) -> None:
        subject.run(test(subject, **parameters))

    return run


@scenario
async def test_a_message_that_no_queue_takes_is_returned_before_its_confirm(
    subject: Subject,
) -> None:
    client = await subject.client()
    assert (await client.declare(QUEUE)).message_count == 0
    await client.confirm()
    client.publish(QUEUE, b"a")
    assert await client.sees(1) == [("Basic.Ack", 1)]
    client.publish(QUEUE + ".absent", b"b")
    assert (await client.sees(3))[1:] == [
        ("return", 312, QUEUE + ".absent", b"b"),
        ("Basic.Ack", 2),
    ]
    assert (await client.declare(QUEUE)).message_count == 1


@scenario
async def test_an_ack_of_several_leaves_later_deliveries_unacked(subject: Subject) -> None:
    other, client = await subject.client(), await subject.consuming(b"a", b"b", b"c", b"d")
    assert [one[:3] for one in client.seen] == [
        (body, tag, False) for tag, body in enumerate((b"a", b"b", b"c", b"d"), start=1)
    ]
    client.channel.basic_ack(2, multiple=True)
    client.channel.basic_ack(4)
    await asyncio.sleep(0.5)  # RabbitMQ loses acks that have not reached the queue yet.
    client.connection.close()
    await other.consume(QUEUE)
    (only,) = await other.sees(1)
    assert only[:3] == (b"c", 1, True)
    assert only[3]["x-delivery-count"] == 1


WRONG = [
    ("basic_ack", (7,), "406 PRECONDITION_FAILED - unknown delivery tag 7"),
    ("basic_ack", (7, True), "406 PRECONDITION_FAILED - unknown delivery tag 7"),
    ("queue_declare", ("absent", True), "404 NOT_FOUND - no queue 'absent' in vhost '/'"),
    ("basic_consume", ("absent", print), "404 NOT_FOUND - no queue 'absent' in vhost '/'"),
    ("basic_publish", ("absent", "", b"a"), "404 NOT_FOUND - no exchange 'absent' in vhost '/'"),
]


@pytest.mark.parametrize(("method", "arguments", "why"), WRONG)
@scenario
async def test_an_error_closes_the_channel_but_not_the_connection(
    subject: Subject, method: str, arguments: tuple[Any, ...], why: str
) -> None:
    client = await subject.consuming(b"a")
    getattr(client.channel, method)(*arguments)
    assert await client.is_closed_for() == why
    with pytest.raises(ChannelWrongStateError):
        client.channel.basic_ack(1)
    assert client.connection.is_open


@pytest.mark.short
@scenario
async def test_the_arguments_of_a_queue_cannot_be_changed(subject: Subject) -> None:
    client = await subject.client()
    for _ in range(2):
        await client.declare(QUEUE, message_ttl=1000)
    client.channel.queue_declare(QUEUE, durable=True, arguments={**QUORUM, "x-message-ttl": 2000})
    assert await client.is_closed_for() == (
        f"406 PRECONDITION_FAILED - inequivalent arg 'x-message-ttl' for queue '{QUEUE}' "
        "in vhost '/': received '2000' but current is '1000'"
    )


@scenario
async def test_unacked_messages_are_requeued_before_those_never_delivered(subject: Subject) -> None:
    other = await subject.client()
    client = await subject.consuming(b"a", b"b", b"c", prefetch=2)
    await asyncio.sleep(0.2)
    assert len(client.seen) == 2
    client.connection.close()
    await until(lambda: bool(client.connection.is_closed))
    await other.consume(QUEUE)
    assert [one[:3] for one in await other.sees(3)] == [
        (b"a", 1, True),
        (b"b", 2, True),
        (b"c", 3, False),
    ]


@scenario
async def test_what_arrives_while_reading_is_paused_is_read_afterwards(subject: Subject) -> None:
    other, client = await subject.client(), await subject.consuming()
    await other.confirm()
    for number, body in enumerate((b"a", b"b"), start=1):
        client.connection.pause_reading()
        other.publish(QUEUE, body)
        await other.sees(number)
        await asyncio.sleep(0.5)
        assert len(client.seen) == number - 1
        client.connection.resume_reading()
        assert (await client.sees(number))[-1][0] == body
    client.connection.pause_reading()
    client.connection.resume_reading()
    assert (await client.declare(QUEUE)).message_count == 0


@scenario
async def test_an_expired_message_goes_where_its_queue_says(subject: Subject) -> None:
    client = await subject.client()
    await client.declare(QUEUE)
    dead = {"dead_letter_exchange": "", "dead_letter_routing_key": QUEUE}
    strategy = {"dead_letter_strategy": "at-least-once", "overflow": "reject-publish"}
    await client.declare(QUEUE + ".retry", message_ttl=1000, **dead, **strategy)
    await client.consume(QUEUE)
    client.publish(QUEUE + ".retry", b"a", mine=1)
    await asyncio.sleep(0.1)
    assert client.seen == []
    ((body, _, redelivered, headers),) = await client.sees(1)
    assert (body, redelivered, headers["mine"]) == (b"a", False, 1)
    (death,) = headers["x-death"]
    assert (death["queue"], death["reason"]) == (QUEUE + ".retry", "expired")
    assert death["count"] == 1


@pytest.mark.parametrize("way", ["rejected", "left unacked"])
@scenario
async def test_a_message_that_is_requeued_too_often_is_dead_lettered(
    subject: Subject, way: str
) -> None:
    client = await subject.client()
    await client.declare(QUEUE + ".dead")
    dead = {"dead_letter_exchange": "", "dead_letter_routing_key": QUEUE + ".dead"}
    await client.declare(QUEUE, delivery_limit=1, **dead)
    client.publish(QUEUE, b"a")
    for _ in range(2):
        other = await subject.client()
        await other.consume(QUEUE)
        await other.sees(1)
        await other.ask("basic_cancel", other.tag)
        if way == "rejected":
            other.channel.basic_reject(1, requeue=True)
        other.connection.close()
    await client.consume(QUEUE + ".dead")
    ((body, _, _, headers),) = await client.sees(1)
    assert (body, headers["x-death"][0]["reason"]) == (b"a", "delivery_limit")


@scenario
async def test_a_topic_exchange_routes_by_words(subject: Subject) -> None:
    client, exchange = await subject.client(), QUEUE
    await client.ask("exchange_declare", exchange, exchange_type="topic", durable=True)
    keys = ["#", "a", "a.*", "a.#", "*.b", "#.c"]
    for key in keys:
        await client.declare(f"{exchange}.{key}")
        await client.ask("queue_bind", f"{exchange}.{key}", exchange, key)
    await client.confirm()
    for number, routing_key in enumerate(["a", "a.b", "a.b.c", "c", ""], start=1):
        client.publish(routing_key, routing_key.encode(), exchange=exchange)
        await client.sees(number)
    counts = [(await client.declare(f"{exchange}.{key}")).message_count for key in keys]
    assert counts == [5, 1, 1, 3, 1, 2]


@scenario
async def test_a_consumer_is_told_when_its_queue_is_deleted(subject: Subject) -> None:
    client = await subject.consuming()
    await asyncio.to_thread(subject.delete_queue, QUEUE)
    assert await client.sees(1) == [("cancelled", client.tag)]
    assert client.channel.is_open


@scenario
async def test_a_cancelled_consumer_gets_no_more_deliveries_and_can_still_ack(
    subject: Subject,
) -> None:
    client = await subject.consuming(b"a", prefetch=1)
    await client.ask("basic_cancel", client.tag)
    client.channel.basic_ack(1)
    client.publish(QUEUE, b"b")
    await asyncio.sleep(0.3)
    assert len(client.seen) == 1
    assert (await client.declare(QUEUE)).message_count == 1


@scenario
async def test_in_an_alarm_nothing_is_read_from_a_connection_that_publishes(
    subject: Subject,
) -> None:
    client = await subject.client()
    await client.confirm()
    other = await subject.consuming()
    for each in (client, other):
        for name in ("blocked", "unblocked"):
            told = partial(each.seen.append, (name,))
            add = getattr(each.connection, f"add_on_connection_{name}_callback")
            add(lambda *_, told=told: told())
    client.publish(QUEUE, b"a")
    await client.sees(1)
    await other.sees(1)
    await asyncio.to_thread(subject.set_alarm, True)
    try:
        await asyncio.sleep(1)
        assert len(client.seen) == 1
        client.publish(QUEUE, b"b")
        assert (await client.sees(2))[1:] == [("blocked",)]
        client.publish(QUEUE, b"c")
        await asyncio.sleep(1)
        assert len(client.seen) == 2
        other.channel.basic_ack(1)
        assert len(other.seen) == 1
    finally:
        await asyncio.to_thread(subject.set_alarm, False)
    # One confirm or two: the broker may confirm several at once.
    await until(lambda: {("Basic.Ack", 3), ("unblocked",)} <= set(client.seen))
    assert client.seen.index(("unblocked",)) == 2
    assert [one[0] for one in await other.sees(3)] == [b"a", b"b", b"c"]
