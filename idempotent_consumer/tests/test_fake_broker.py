"""The RabbitMQ in memory: what a test does with it, beyond what a real one does.

What AMQP has is held to a real RabbitMQ in ``tests/integration/test_broker_contract.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pika
import pytest
from pika.exceptions import (
    AMQPConnectionError,
    ConnectionClosedByClient,
    ConnectionOpenAborted,
    ConnectionWrongStateError,
    StreamLostError,
)

from idempotent_consumer.testing.broker import FakeBroker, Queue
from idempotent_consumer.testing.loop import Loop


class Client:
    """A process with a connection, and a channel once it is open. ``seen`` has what it is told."""

    def __init__(self, broker: FakeBroker) -> None:
        self.loop, self.seen = Loop(broker.agenda), list[Any]()
        self.channel: Any = None
        self.do(lambda: self._connect(broker))

    def do(self, what: Callable[[], object]) -> None:
        """Do something in a step of the process, and let all follow that needs no time."""
        self.loop.call_soon(what)
        self.loop.run_until_idle()

    def _connect(self, broker: FakeBroker) -> None:
        def opened(connection: Any) -> None:
            connection.channel(on_open_callback=use)

        def use(channel: Any) -> None:
            self.channel = channel
            channel.confirm_delivery(
                lambda m: self.seen.append(
                    (type(m.method).__name__, m.method.delivery_tag, m.method.multiple)
                )
            )

        self.connection = broker.connect(
            None,
            on_open_callback=opened,
            on_open_error_callback=lambda _, error: self.seen.append(("not opened", type(error))),
            on_close_callback=lambda _, error: self.seen.append(("closed", type(error))),
        )

    def publish(self, queue: str, body: bytes) -> None:
        """Publish to a queue, with confirms."""
        properties = pika.BasicProperties()
        self.do(lambda: self.channel.basic_publish("", queue, body, properties, mandatory=True))

    def consume(self, queue: str) -> None:
        """Consume a queue; a delivery is its body."""
        self.do(
            lambda: self.channel.basic_consume(
                queue, lambda _channel, _method, _properties, body: self.seen.append(body)
            )
        )


@pytest.fixture
def broker() -> FakeBroker:
    broker = FakeBroker(Loop().agenda)
    broker.queues["q"] = Queue("q", {})
    return broker


@pytest.fixture
def client(broker: FakeBroker) -> Client:
    return Client(broker)


def test_a_broker_that_is_away_refuses_connections(broker: FakeBroker) -> None:
    broker.away = True
    client = Client(broker)
    assert client.seen == [("not opened", AMQPConnectionError)]
    assert (client.connection.is_closed, client.channel) == (True, None)


def test_confirms_can_be_held_back_and_be_for_several(broker: FakeBroker, client: Client) -> None:
    broker.confirms = False
    for body in (b"1", b"2", b"3"):
        client.publish("q", body)
    assert client.seen == []
    (channel,) = broker.sessions[0].channels.values()
    channel.confirm(2, multiple=True)
    channel.confirm(3)
    client.loop.run_until_idle()
    assert client.seen == [("Ack", 2, True), ("Ack", 3, False)]


def test_a_queue_can_refuse_a_message(broker: FakeBroker, client: Client) -> None:
    broker.nacks = lambda queue: queue == "q"
    client.publish("q", b"1")
    assert client.seen == [("Nack", 1, False)]
    assert broker.queues["q"].bodies == []


def test_a_lost_connection_is_told_to_both_sides(broker: FakeBroker, client: Client) -> None:
    broker.publish("", "q", b"1")
    client.consume("q")
    broker.lose(client.connection)
    client.loop.run_until_idle()
    assert client.seen == [b"1", ("closed", StreamLostError)]
    assert broker.queues["q"].bodies == [b"1"]
    assert (broker.sessions, broker.connections) == ([], [])


def test_what_a_dead_process_has_written_arrives_before_its_end(
    broker: FakeBroker, client: Client
) -> None:
    broker.publish("", "q", b"1")
    broker.publish("", "q", b"2")
    client.consume("q")
    broker.latency_s = lambda: 1.0
    client.loop.call_soon(lambda: client.channel.basic_ack(1))
    client.loop.run_until_idle()
    client.loop.kill()
    broker.gone(client.loop)
    broker.agenda.run()
    assert [message.body for message in broker.acked] == [b"1"]
    assert broker.queues["q"].bodies == [b"2"]


def test_closing_is_agreed_upon(client: Client) -> None:
    client.do(client.connection.close)
    assert client.seen == [("closed", ConnectionClosedByClient)]
    with pytest.raises(ConnectionWrongStateError):
        client.do(client.connection.close)


def test_a_connection_can_be_closed_before_it_is_open(broker: FakeBroker) -> None:
    broker.latency_s = lambda: 5.0
    client = Client(broker)
    client.do(client.connection.close)
    assert client.seen == [("not opened", ConnectionOpenAborted)]
    broker.agenda.run()
    assert broker.sessions == []


def test_consumers_take_turns(broker: FakeBroker, client: Client) -> None:
    other = Client(broker)
    for each in (client, other):
        each.consume("q")
    for body in (b"1", b"2", b"3"):
        broker.publish("", "q", body)
    client.loop.run_until_idle()
    assert [each.seen for each in (client, other)] == [[b"1", b"3"], [b"2"]]


def test_what_arrives_behind_a_cancel_is_rejected_as_pika_does(
    broker: FakeBroker, client: Client
) -> None:
    client.consume("q")
    client.loop.call_soon(
        lambda: client.channel.basic_cancel(next(iter(client.channel.consumer_tags)))
    )
    broker.publish("", "q", b"1")
    client.loop.run_until_idle()
    assert client.seen == []
    assert broker.queues["q"].bodies == [b"1"]
    assert broker.queues["q"].ready[0].returns == 1


class Reader:
    """What reads deliveries from the socket's bytes, ahead of pika."""

    def __init__(self, *, takes: bool) -> None:
        self._takes, self.data = takes, b""

    def read(self, data: bytes) -> tuple[int, bool]:
        """Read all or nothing."""
        self.data = data
        return (len(data) if self._takes else 0), False


@pytest.mark.parametrize("takes", [True, False])
def test_a_reader_gets_a_delivery_as_it_is_on_the_wire(
    broker: FakeBroker, client: Client, takes: bool
) -> None:
    """What it leaves goes to the consumer's callback."""
    reader = Reader(takes=takes)
    client.connection.reader = reader
    properties = pika.BasicProperties(headers={"a": "b"}, type="t")
    client.consume("q")
    broker.publish("", "q", b"the body", properties)
    client.loop.run_until_idle()
    assert client.seen == ([] if takes else [b"the body"])
    consumed, frames = 0, []
    while consumed < len(reader.data):
        used, frame = pika.frame.decode_frame(reader.data[consumed:])
        consumed += used
        frames.append(frame)
    deliver, header, body = frames
    assert deliver.method.delivery_tag == 1
    assert (header.body_size, header.properties.headers) == (8, {"a": "b"})
    assert body.fragment == b"the body"
