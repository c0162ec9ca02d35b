"""A producer without a broker: where it cannot be used, and that it says so."""

import asyncio
import gc
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from fakes.probe import free_port
from idempotent_consumer import Producer, PublishError, Settings, SettingsError

EVENT = b'{"id":"1","type":"new_order"}'


def producer_at(port: int) -> Producer:
    return Producer(Settings(rabbitmq_urls=(f"amqp://127.0.0.1:{port}/",)))


@pytest.fixture
def producer() -> Iterator[Producer]:
    with producer_at(free_port()) as producer:
        yield producer


def test_a_thread_that_runs_an_event_loop_is_told_what_to_do_instead(producer: Producer) -> None:
    async def publish() -> None:
        with pytest.raises(RuntimeError, match=r"asyncio\.to_thread"):
            producer.publish([EVENT])
        with pytest.raises(PublishError):
            await asyncio.to_thread(producer.publish, [EVENT], timeout_s=0.2)

    asyncio.run(publish())


def test_nothing_is_published_once_it_is_closed(producer: Producer) -> None:
    assert producer.publish([]) == 0
    producer.close()
    producer.close()
    with pytest.raises(ValueError, match="make another"):
        producer.publish([EVENT])


@pytest.mark.parametrize(
    ("bodies", "says"),
    [
        (EVENT, r"not one bytes: write publish\(\[body\]\)"),
        (EVENT.decode(), "not one str"),
        ({"id": "1", "type": "new_order"}, "not one dict"),
        ([{"id": "1", "type": "new_order"}], r"not dict: write json\.dumps\(event\)\.encode"),
        ([EVENT.decode()], "not str"),
    ],
)
def test_what_is_not_a_list_of_bodies_is_refused(
    producer: Producer, bodies: Any, says: str
) -> None:
    with pytest.raises(TypeError, match=says):
        producer.publish(bodies)


def test_a_header_that_cannot_be_sent_is_told_before_anything_is(producer: Producer) -> None:
    with pytest.raises(ValueError, match="x-error"):
        producer.publish([EVENT], headers={"x-error": "a"})


def test_an_interrupted_call_is_over_when_the_next_one_is_made(
    producer: Producer, caplog: pytest.LogCaptureFixture
) -> None:
    """Ctrl-C reaches whatever runs, which can be the iterable."""
    taken = []

    def interrupted() -> Iterator[bytes]:
        yield EVENT
        raise KeyboardInterrupt

    def others() -> Iterator[bytes]:
        taken.append(1)
        yield EVENT

    with pytest.raises(KeyboardInterrupt):
        producer.publish(interrupted())
    with pytest.raises(PublishError, match="refused") as raised:
        producer.publish(others(), timeout_s=0.2)
    assert (taken, raised.value.confirmed) == ([1], 0)
    gc.collect()
    assert [record for record in caplog.records if record.name == "asyncio"] == []


def test_a_wrong_address_is_a_wrong_setting() -> None:
    with pytest.raises(SettingsError, match=r"^RABBITMQ_URL"):
        Producer(Settings(rabbitmq_urls=("amqp://h/?heartbeat=0",)))


def test_it_closes_although_the_broker_says_nothing() -> None:
    """A frozen one takes connections all the same."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        producer = producer_at(server.getsockname()[1])
        with pytest.raises(PublishError, match="not connected yet"):
            producer.publish([EVENT], timeout_s=0.2)
        producer.close()
