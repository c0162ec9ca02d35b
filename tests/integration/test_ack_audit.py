"""The audit of acks tells an early ack from one in time."""

import pika
import pytest

from chaos.acks import AckAudit
from chaos.checks import becomes
from chaos.load import order
from chaos.rig import Rig


@pytest.mark.chaos
def test_an_ack_without_a_record_is_early_be_it_covered_by_a_later_one(
    rig: Rig, acks: AckAudit
) -> None:
    rig.broker.bind("order")
    with pika.BlockingConnection(pika.URLParameters(acks.url)) as connection:
        channel = connection.channel()
        rig.broker.publish([order("e-1"), order("e-2"), order("e-3")])
        rig.broker.publish_raw(b"not json")
        deliveries = channel.consume("order", inactivity_timeout=30)
        tags = [next(deliveries)[0].delivery_tag for _ in range(4)]
        rig.store.client.put("/service/order/e-1", b'{"state":"done"}')
        rig.store.client.put("/service/order/e-2", b'{"state":"claimed"}')
        channel.basic_ack(tags[0])
        channel.basic_ack(tags[3], multiple=True)
        becomes(lambda: acks.checked, 4)
    assert acks.early() == {"e-2", "e-3", "b'not json'"}
