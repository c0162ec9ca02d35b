"""The audit of acks tells an early ack from one in time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pika
import pytest

from chaos.acks import AckAudit
from chaos.checks import becomes
from chaos.load import order, orders, repeated
from chaos.rig import Rig

pytestmark = pytest.mark.chaos


def test_no_ack_of_a_service_is_early(rig: Rig, acks: AckAudit) -> None:
    rig.start("order", RABBITMQ_URL=acks.url)
    rig.broker.publish(repeated(orders(300), 2))
    rig.broker.publish_raw(b"not json")
    becomes(lambda: len(rig.store.done("order")), 300)
    rig.drained("order")
    assert acks.early() == set()
    assert (acks.checked, acks.unknown) == (601, 0)


def test_an_ack_without_a_record_is_early_be_it_covered_by_a_later_one(
    rig: Rig, acks: AckAudit
) -> None:
    with _channel(acks.url) as channel:
        channel.queue_declare("order", durable=True, arguments={"x-queue-type": "quorum"})
        channel.queue_bind("order", "events", "#")
        rig.broker.publish([order("e-1"), order("e-2"), order("e-3")])
        rig.broker.publish_raw(b"not json")
        tags = [method.delivery_tag for method, _, _ in _take(channel, 4)]
        rig.store.client.put("/service/order/e-1", b'{"state":"done"}')
        rig.store.client.put("/service/order/e-2", b'{"state":"claimed"}')
        channel.basic_ack(tags[0])
        channel.basic_ack(tags[3], multiple=True)
        becomes(lambda: acks.checked, 4)
    assert acks.early() == {"e-2", "e-3", "b'not json'"}


@contextmanager
def _channel(url: str) -> Iterator[Any]:
    connection = pika.BlockingConnection(pika.URLParameters(url))
    try:
        yield connection.channel()
    finally:
        connection.close()


def _take(channel: Any, number: int) -> list[Any]:
    """Consume so many deliveries without acking them."""
    found: list[Any] = []
    for delivery in channel.consume("order", inactivity_timeout=30):
        found.append(delivery)
        if len(found) == number:
            return found
    return found
