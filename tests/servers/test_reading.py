"""What tests read: events published through a restart, exact depths, whole histories, counters."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pika
import pytest

from servers.broker import Broker
from servers.conftest import declare
from servers.publisher import encode
from servers.servers import Servers
from servers.statsd import StatsdListener
from servers.store import Store
from servers.wait import eventually


def test_publishing_goes_on_through_a_broker_kill(
    clean: Servers, broker: Broker, queue: str
) -> None:
    """Every event that was confirmed is in the queue; publishing survives the kill."""
    events = [{"id": str(number), "type": "new_order"} for number in range(4000)]
    load = broker.publish_aside(events, rate_per_s=800)

    def some_arrived() -> None:
        assert broker.ready(queue) > 200

    eventually(some_arrived)
    clean.rabbitmq.kill()
    clean.rabbitmq.start()
    confirmed = load.result(timeout=60)
    assert len(confirmed) > 2000
    bodies = {message.body for message in broker.drain(queue, expect=len(confirmed))}
    assert {encode(event) for event in confirmed} <= bodies


def test_an_event_that_no_queue_takes_is_not_confirmed(broker: Broker) -> None:
    """The broker confirms unroutable events too; the publisher knows better."""
    assert broker.publish([{"id": "1", "type": "new_order"}]) == []


def test_depth_is_of_now(broker: Broker, queue: str) -> None:
    """Right after publishing the depth is right, not as of the queue's last tick."""
    for expected in range(1, 4):
        broker.publish_raw(b"not json \xff")
        assert broker.depth(queue) == (expected, 0)
    assert [message.body for message in broker.drain(queue)] == [b"not json \xff"] * 3


def test_what_is_held_counts_for_the_queue_that_it_came_from(
    clean: Servers, broker: Broker, queue: str
) -> None:
    """At once, a cancelled consumer's too; it is ready again once the channel is gone."""
    declare(clean.rabbitmq, "notify")
    broker.publish([{"id": str(number), "type": "new_order"} for number in range(5)])
    with held(clean.rabbitmq.url, "notify", 2), held(clean.rabbitmq.url, queue, 3) as consumer:
        assert (broker.unacked(queue), broker.unacked("notify")) == (3, 2)
        assert (broker.depth(queue), broker.depth("notify")) == ((2, 3), (3, 2))
        with pytest.raises(AssertionError, match=r"order: 2 ready"):
            broker.assert_drained(queue)
        assert len(broker.drain(queue)) == 2
        with pytest.raises(AssertionError, match=r"unacked=3"):
            broker.assert_drained(queue)
        consumer.cancel()
        assert broker.unacked(queue) == 3
        with pytest.raises(AssertionError, match=r"unacked"):
            broker.assert_drained(queue)
    assert (broker.depth(queue), broker.depth("notify")) == ((3, 0), (5, 0))


@contextmanager
def held(url: str, queue: str, count: int) -> Iterator[Any]:
    """Consume so many messages and ack none of them, while the block runs; yields the channel."""
    connection = pika.BlockingConnection(pika.URLParameters(url))
    with connection:
        channel = connection.channel()
        channel.basic_qos(prefetch_count=count)
        messages = channel.consume(queue)
        for _ in range(count):
            next(messages)
        yield channel


def test_history_holds_every_put_and_delete(store: Store) -> None:
    """It begins after the last clear and holds more than one gRPC answer of 4 MiB."""
    large = b"x" * 1_000_000
    for _ in range(6):
        store.client.put("/orders/1", large)
    store.client.delete("/orders/")
    store.client.put("elsewhere", b"1")
    history = store.history("/orders/")
    assert [change.kind for change in history] == ["put"] * 6 + ["delete"]
    assert all(change.value == large for change in history[:6])
    store.clear()
    assert store.history() == []


def test_the_listener_sums_counters_and_keeps_timers(statsd: StatsdListener) -> None:
    """Several lines may come in one packet, sampled, as zero, or broken."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        packet = b"n:2|c\nn:1|c|@0.5\nzero:0|c\nt:1.5|ms\nbroken\nn:x|c\n"
        sender.sendto(packet, ("127.0.0.1", statsd.port))

    def arrived() -> None:
        assert statsd.counts() == {"n": 4, "zero": 0}
        assert statsd.timers_ms("t") == [1.5]

    eventually(arrived, 5)
    assert statsd.seen("zero")
    assert not statsd.seen("t")
