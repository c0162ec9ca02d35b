"""The library's producer: events that it returns as published are in the queue."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson
import pytest
import structlog

from chaos.outages import alarm
from chaos.rig import Rig
from idempotent_consumer import InvalidEvent, Producer, PublishError, Settings, bus
from servers.broker import Broker
from servers.processes import free_port
from servers.servers import RabbitMQ

QUEUE = "order"

UNREAD_TOO_LONG_S = 9.0
"""Longer than TCP_USER_TIMEOUT, after which a connection to a vanished broker is closed."""


def bodies(number: int, prefix: str = "p") -> list[bytes]:
    return [orjson.dumps({"id": f"{prefix}{n}", "type": "new_order"}) for n in range(number)]


def declare(broker: Broker, **options: Any) -> None:
    """Declare the queues of the order service."""
    with broker.channel() as channel:
        bus.Topology(QUEUE, **options).declare(channel)


def producer_at(url: str, **options: str) -> Producer:
    return Producer(Settings(rabbitmq_urls=(url,)), structlog.get_logger(), **options)


@pytest.fixture
def producer(rig: Rig) -> Iterator[Producer]:
    declare(rig.broker)
    with producer_at(rig.servers.rabbitmq.url) as running:
        yield running


def arrived(broker: Broker) -> list[bytes]:
    return [message.body for message in broker.drain(QUEUE)]


def test_what_is_published_is_in_the_queue_in_order(rig: Rig, producer: Producer) -> None:
    """More than may be unconfirmed at once, then more on that connection and on another."""
    sent, told = bodies(5_000), list[int]()
    assert producer.publish(iter(sent), progress=told.append) == 5_000
    assert told == sorted(told)
    assert told[-1] == 5_000
    assert producer.publish(bodies(3, "q")) == 3
    rig.servers.rabbitmq.ctl("close_all_connections", "closed by the test")
    assert producer.publish(bodies(1, "r")) == 1
    assert arrived(rig.broker) == [*sent, *bodies(3, "q"), *bodies(1, "r")]


def test_an_exchange_and_headers_can_be_given(rig: Rig) -> None:
    headers: dict[str, str | int | bool] = {"tenant": "ä", "n": -(2**63), "least": 5, "new": True}
    declare(rig.broker, exchange="shop", bindings=("new_order",))
    with producer_at(rig.servers.rabbitmq.url, exchange="shop") as producer:
        producer.publish(bodies(2), headers=headers)
    assert [message.headers for message in rig.broker.drain(QUEUE)] == [headers] * 2


@pytest.mark.parametrize("body", [b"{", None])
def test_events_before_an_invalid_one_or_an_error_are_published(
    producer: Producer, rig: Rig, body: bytes | None
) -> None:
    """An error of the iterable is raised as it is. The producer can be used again."""

    def broken() -> Iterator[bytes]:
        yield from bodies(3)
        if body is None:
            raise OSError("the file ends here")
        yield body
        yield from bodies(1, "after")

    with pytest.raises(OSError if body is None else InvalidEvent):
        producer.publish(broken())
    assert producer.publish(bodies(1, "next")) == 1
    assert arrived(rig.broker) == [*bodies(3), *bodies(1, "next")]


@pytest.mark.parametrize("end", [RabbitMQ.stop, RabbitMQ.kill])
def test_every_event_is_published_although_the_broker_goes_down_meanwhile(
    rig: Rig, producer: Producer, end: Callable[[RabbitMQ], None]
) -> None:
    """Unconfirmed events are sent again, so there may be duplicates."""
    sent = bodies(10_000)

    def restart() -> None:
        end(rig.servers.rabbitmq)
        rig.servers.rabbitmq.start()

    with ThreadPoolExecutor(1) as breaking:

        def watched() -> Iterator[bytes]:
            for number, body in enumerate(sent):
                if number == 3_000:
                    breaking.submit(restart)
                yield body

        assert producer.publish(watched(), timeout_s=60) == len(sent)
    assert set(arrived(rig.broker)) == set(sent)


def test_an_event_that_no_queue_takes_is_not_published(
    rig: Rig, capfd: pytest.CaptureFixture[str]
) -> None:
    """Although the broker confirms it. It is sent again every second."""
    with Producer(Settings(rabbitmq_urls=(rig.servers.rabbitmq.url,))) as producer:
        with pytest.raises(PublishError, match="no queue takes what is sent to 'events'") as caught:
            # Not 1 s: just after it is sent again, the producer does not know yet whether it fails.
            producer.publish(bodies(1), timeout_s=1.5)
        assert caught.value.confirmed == 0
        declare(rig.broker)
        assert producer.publish(bodies(1, "later")) == 1
    assert arrived(rig.broker) == bodies(1, "later")
    assert "no queue takes" in capfd.readouterr().err


def test_events_that_are_given_up_in_an_alarm_are_not_sent_afterwards(rig: Rig) -> None:
    """The connection survives the alarm, though the broker reads nothing and buffers are full.

    On a new connection all of them would be sent once more.
    """
    declare(rig.broker)
    args = {"x": "y" * 900_000}
    large = [orjson.dumps({"id": f"l{n}", "type": "new_order", "args": args}) for n in range(50)]
    with (
        structlog.testing.capture_logs() as logs,
        producer_at(rig.servers.rabbitmq.url) as producer,
    ):
        producer.publish(bodies(1, "first"))
        with (
            alarm(rig.servers.rabbitmq, "memory"),
            pytest.raises(PublishError, match="alarm") as caught,
        ):
            producer.publish(large + bodies(5_000), timeout_s=UNREAD_TOO_LONG_S)
        assert caught.value.confirmed == 0
        producer.publish(bodies(1, "last"))
    assert [line["event"] for line in logs].count("connected to RabbitMQ") == 1, logs
    there = arrived(rig.broker)
    assert [there[0], there[-1]] == [*bodies(1, "first"), *bodies(1, "last")]
    # Some were sent before pika knew of the alarm.
    assert len(there) < 5_000


def test_an_error_of_the_iterable_is_the_cause_if_events_are_unconfirmed() -> None:
    def broken() -> Iterator[bytes]:
        yield from bodies(2)
        raise OSError("the file ends here")

    with (
        producer_at(f"amqp://localhost:{free_port()}/") as producer,
        pytest.raises(PublishError) as caught,
    ):
        producer.publish(broken(), timeout_s=0.5)
    assert isinstance(caught.value.__cause__, OSError)
