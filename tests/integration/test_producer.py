"""The library's producer: what it returns as published is in the queue, whatever happens."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

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
"""Longer than TCP_USER_TIMEOUT, by which the library notices a broker that has vanished."""


def bodies(number: int, prefix: str = "p") -> list[bytes]:
    return [orjson.dumps({"id": f"{prefix}{n}", "type": "new_order"}) for n in range(number)]


def declare(broker: Broker, *exchange_and_bindings: str) -> None:
    """Make the queues that the order service would make."""
    exchange, *bindings = exchange_and_bindings or ("events", "#")
    with broker.channel() as channel:
        bus.Topology(QUEUE, exchange, tuple(bindings)).declare(channel)


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
    """More than fit in one window, then more on the same connection, then on another."""
    sent, told = bodies(5_000), list[int]()
    assert producer.publish(iter(sent), progress=told.append) == 5_000
    assert told == sorted(told)
    assert told[-1] == 5_000
    assert producer.publish(bodies(3, "q")) == 3
    rig.servers.rabbitmq.ctl("close_all_connections", "closed by the test")
    assert producer.publish(bodies(1, "r")) == 1
    assert arrived(rig.broker) == [*sent, *bodies(3, "q"), *bodies(1, "r")]


def test_events_go_to_an_exchange_of_ones_own_with_headers(rig: Rig) -> None:
    headers: dict[str, str | int | bool] = {"tenant": "ä", "n": -(2**63), "least": 5, "new": True}
    declare(rig.broker, "shop", "new_order")
    with producer_at(rig.servers.rabbitmq.url, exchange="shop") as producer:
        producer.publish(bodies(2), headers=headers)
    assert [message.headers for message in rig.broker.drain(QUEUE)] == [headers] * 2


@pytest.mark.parametrize("body", [b"{", b'{"type":"new_order"}', b'{"id":"","type":"x"}', None])
def test_what_stands_before_an_invalid_event_or_an_error_is_there(
    producer: Producer, rig: Rig, body: bytes | None
) -> None:
    """The producer raises what the iterable has raised, and can be used again."""

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
def test_a_broker_that_goes_down_meanwhile_gets_everything(
    rig: Rig, producer: Producer, end: Callable[[RabbitMQ], None]
) -> None:
    """What was on its way is sent again: each event is there at least once."""
    sent = bodies(30_000)

    def restart() -> None:
        end(rig.servers.rabbitmq)
        rig.servers.rabbitmq.start()

    with ThreadPoolExecutor(1) as breaking:

        def watched() -> Iterator[bytes]:
            for number, body in enumerate(sent):
                if number == 10_000:
                    breaking.submit(restart)
                yield body

        assert producer.publish(watched(), timeout_s=60) == len(sent)
    assert set(arrived(rig.broker)) == set(sent)


def test_events_wait_for_a_queue_that_takes_them(
    rig: Rig, capfd: pytest.CaptureFixture[str]
) -> None:
    """The broker confirms what no queue takes: here that is not published."""
    with Producer(Settings(rabbitmq_urls=(rig.servers.rabbitmq.url,))) as producer:
        with pytest.raises(PublishError, match="no queue takes what is sent to 'events'") as caught:
            # It is sent once a second: at that moment nobody knows yet what will become of it.
            producer.publish(bodies(1), timeout_s=1.5)
        assert caught.value.confirmed == 0
        declare(rig.broker)
        assert producer.publish(bodies(1, "later")) == 1
    assert arrived(rig.broker) == bodies(1, "later")
    assert "no queue takes" in capfd.readouterr().err


def test_an_alarm_is_named_and_what_was_given_up_is_not_sent_after_all(rig: Rig) -> None:
    """The connection outlasts it, though the broker reads nothing, and the buffers are full.

    A new connection would send all of that once more.
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
    # What pika had sent before it knew may be among them, and nothing that had still to be sent.
    assert len(there) < 5_000


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
