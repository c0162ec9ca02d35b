"""The library's producer: what it returns as published is in the queue, whatever happens."""

import threading
from collections.abc import Callable, Iterator

import orjson
import pika
import pytest
import structlog

from chaos.rig import Rig
from idempotent_consumer import InvalidEvent, Producer, PublishError, Settings, bus
from servers.broker import Broker
from servers.processes import free_port
from servers.servers import RabbitMQ, Servers

QUEUE = "order"

UNREAD_TOO_LONG_S = 9.0
"""Longer than TCP_USER_TIMEOUT, by which the library notices a broker that has vanished."""


def bodies(number: int, prefix: str = "p") -> list[bytes]:
    return [orjson.dumps({"id": f"{prefix}{n}", "type": "new_order"}) for n in range(number)]


def declare(rabbitmq: RabbitMQ) -> None:
    """Make the queues that the order service would make."""
    connection = pika.BlockingConnection(pika.URLParameters(rabbitmq.url))
    bus.Topology(QUEUE).declare(connection.channel())
    connection.close()


def producer_at(url: str) -> Producer:
    return Producer(Settings.from_environ({"RABBITMQ_URL": url}))


@pytest.fixture
def producer(clean: Servers) -> Iterator[Producer]:
    declare(clean.rabbitmq)
    with producer_at(clean.rabbitmq.url) as running:
        yield running


def arrived(broker: Broker) -> list[bytes]:
    return [message.body for message in broker.drain(QUEUE)]


def test_what_is_published_is_in_the_queue_in_order(producer: Producer, broker: Broker) -> None:
    """More than fit in one window, from an iterable, and then once more on the same connection."""
    sent = bodies(5_000)
    assert producer.publish(iter(sent)) == 5_000
    assert producer.publish(bodies(3, "q")) == 3
    assert producer.publish([]) == 0
    assert arrived(broker) == [*sent, *bodies(3, "q")]


def test_events_go_to_an_exchange_of_ones_own_with_headers(clean: Servers, broker: Broker) -> None:
    headers: dict[str, str | int | bool] = {"tenant": "ä", "n": -(2**63), "least": 5, "new": True}
    connection = pika.BlockingConnection(pika.URLParameters(clean.rabbitmq.url))
    bus.Topology(QUEUE, "shop", ("new_order",)).declare(connection.channel())
    connection.close()
    settings = Settings.from_environ({"RABBITMQ_URL": clean.rabbitmq.url})
    with Producer(settings, exchange="shop") as producer:
        producer.publish(bodies(2), headers=headers)
    assert [message.headers for message in broker.drain(QUEUE)] == [headers] * 2


def test_progress_ends_at_the_number_published(producer: Producer) -> None:
    told: list[int] = []
    producer.publish(bodies(3_000), progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 3_000


@pytest.mark.parametrize("body", [b"{", b'{"type":"new_order"}', b'{"id":"","type":"x"}'])
def test_a_body_that_is_no_event_is_refused_and_what_stands_before_it_is_there(
    producer: Producer, broker: Broker, body: bytes
) -> None:
    good = bodies(3)
    with pytest.raises(InvalidEvent):
        producer.publish([*good, body, *bodies(1, "after")])
    assert arrived(broker) == good


def test_what_the_iterable_raises_comes_out_and_the_producer_goes_on(
    producer: Producer, broker: Broker
) -> None:
    def broken() -> Iterator[bytes]:
        yield from bodies(2)
        raise OSError("the file ends here")

    with pytest.raises(OSError, match="the file ends here"):
        producer.publish(broken())
    assert producer.publish(bodies(1, "next")) == 1
    assert arrived(broker) == [*bodies(2), *bodies(1, "next")]


@pytest.mark.parametrize("end", [RabbitMQ.stop, RabbitMQ.kill])
def test_a_broker_that_goes_down_meanwhile_gets_everything(
    rig: Rig, producer: Producer, end: Callable[[RabbitMQ], None]
) -> None:
    """What was on its way is sent again: each event is there at least once."""
    sent = bodies(30_000)
    half = threading.Event()

    def watched() -> Iterator[bytes]:
        for number, body in enumerate(sent):
            if number == 10_000:
                half.set()
            yield body

    def restart() -> None:
        assert half.wait(30)
        end(rig.servers.rabbitmq)
        rig.servers.rabbitmq.start()

    breaking = threading.Thread(target=restart)
    breaking.start()
    try:
        assert producer.publish(watched(), timeout_s=60) == len(sent)
    finally:
        breaking.join()
    assert set(arrived(rig.broker)) == set(sent)


def test_a_connection_lost_in_a_pause_is_opened_again(rig: Rig, producer: Producer) -> None:
    producer.publish(bodies(1))
    rig.servers.rabbitmq.ctl("close_all_connections", "closed by the test")
    assert producer.publish(bodies(1, "again")) == 1
    assert arrived(rig.broker) == [*bodies(1), *bodies(1, "again")]


def test_events_wait_for_a_queue_that_takes_them(
    rig: Rig, capfd: pytest.CaptureFixture[str]
) -> None:
    """The broker confirms what no queue takes: here that is not published."""
    with producer_at(rig.servers.rabbitmq.url) as producer:
        with pytest.raises(PublishError, match="no queue takes what is sent to 'events'") as caught:
            producer.publish(bodies(1), timeout_s=1)
        assert caught.value.confirmed == 0
        declare(rig.servers.rabbitmq)
        assert producer.publish(bodies(1, "later")) == 1
    assert arrived(rig.broker) == bodies(1, "later")
    assert "no queue takes" in capfd.readouterr().err


def test_an_alarm_is_named_and_what_was_given_up_is_not_sent_after_all(
    rig: Rig, producer: Producer
) -> None:
    producer.publish(bodies(1, "first"))
    rig.servers.rabbitmq.ctl("set_vm_memory_high_watermark", "0")
    try:
        with pytest.raises(PublishError, match="alarm") as caught:
            producer.publish(bodies(5_000), timeout_s=2)
    finally:
        rig.servers.rabbitmq.ctl("set_vm_memory_high_watermark", "0.6")
    assert caught.value.confirmed == 0
    assert producer.publish(bodies(1, "last")) == 1
    there = arrived(rig.broker)
    assert there[0] == bodies(1, "first")[0]
    assert there[-1] == bodies(1, "last")[0]
    # What pika had sent before it knew may be among them, and nothing that had still to be sent.
    assert len(there) < 5_000


def test_a_connection_outlasts_an_alarm_in_which_the_broker_reads_nothing(
    clean: Servers,
) -> None:
    """More than the system's buffers hold. A new connection would send all of it once more."""
    declare(clean.rabbitmq)
    large = [
        orjson.dumps({"id": str(n), "type": "new_order", "args": {"x": "y" * 900_000}})
        for n in range(50)
    ]
    settings = Settings.from_environ({"RABBITMQ_URL": clean.rabbitmq.url})
    with (
        structlog.testing.capture_logs() as logs,
        Producer(settings, structlog.get_logger()) as producer,
    ):
        producer.publish(bodies(1))
        clean.rabbitmq.ctl("set_vm_memory_high_watermark", "0")
        try:
            with pytest.raises(PublishError, match="alarm"):
                producer.publish(large, timeout_s=UNREAD_TOO_LONG_S)
        finally:
            clean.rabbitmq.ctl("set_vm_memory_high_watermark", "0.6")
        producer.publish(bodies(1))
    assert [line["event"] for line in logs].count("connected to RabbitMQ") == 1, logs


def test_what_is_unconfirmed_is_said_before_what_the_iterable_raised() -> None:
    def broken() -> Iterator[bytes]:
        yield from bodies(2)
        raise OSError("the file ends here")

    with (
        producer_at(f"amqp://localhost:{free_port()}/") as producer,
        pytest.raises(PublishError) as caught,
    ):
        producer.publish(broken(), timeout_s=0.5)
    assert isinstance(caught.value.__cause__, OSError)
