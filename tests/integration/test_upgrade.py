"""RabbitMQ 4.0's data, opened by 4.3: what was in flight, waiting and parked is still there."""

from collections.abc import Iterator
from contextlib import ExitStack

import pika
import pytest

from chaos.checks import (
    assert_handled_once,
    becomes,
    not_ready,
    wait_drained,
)
from chaos.load import ids, order, orders
from chaos.rig import Rig
from integration.command import Command
from integration.containers import Brokers, brokers
from servers.broker import Broker
from servers.servers import RabbitMQ, Servers, docker_available, start_etcd
from servers.wait import eventually

OLD, NEW = "rabbitmq:4.0-management", "rabbitmq:4.3-management"

_RETRIED_AFTER_S = 20


@pytest.fixture
def place() -> Iterator[Brokers]:
    """Give the place where one broker follows the other."""
    if not docker_available():
        pytest.skip("brokers of two versions need Docker, which does not answer")
    with brokers() as place:
        yield place


@pytest.fixture
def old_broker() -> Iterator[ExitStack]:
    """Give what ends the old broker, before the test's end or at it."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def servers(place: Brokers, old_broker: ExitStack) -> Iterator[Servers]:
    """Give the old broker, and an etcd of the test's own."""
    with start_etcd("docker") as etcd, old_broker:
        yield Servers("docker", old_broker.enter_context(place.start(OLD)), etcd)


def retried_later(rabbitmq: RabbitMQ, event_id: str) -> None:
    """Put an event into order's retry queue, as a service does whose handler has failed once."""
    connection = pika.BlockingConnection(pika.URLParameters(rabbitmq.url))
    channel = connection.channel()
    channel.confirm_delivery()
    body = f'{{"id": "{event_id}", "type": "new_order"}}'.encode()
    properties = pika.BasicProperties(headers={"x-attempts": 1}, delivery_mode=2)
    channel.basic_publish("", f"order.retry.{_RETRIED_AFTER_S}s", body, properties, mandatory=True)
    connection.close()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("store_of_metadata", ["Khepri", "Mnesia"])
def test_a_volume_of_rabbitmq_4_0_is_opened_by_4_3_with_messages_in_flight(
    rig: Rig, place: Brokers, old_broker: ExitStack, store_of_metadata: str
) -> None:
    """The service runs on: it reconnects by itself, and handles each event once."""
    service = rig.start("order", RETRY_DELAYS=f"{_RETRIED_AFTER_S}s")
    done, held, later = (orders(50, name) for name in ("done", "held", "later"))
    rig.broker.publish(done)
    becomes(lambda: rig.store.done("order"), ids(done))
    rig.broker.publish_raw(b"not json")
    becomes(lambda: rig.broker.ready("order.dead-letter"), 1)
    rig.servers.rabbitmq.ctl("enable_feature_flag", "all")
    if store_of_metadata == "Khepri":
        rig.servers.rabbitmq.ctl("enable_feature_flag", "--opt-in", "khepri_db")
    rig.servers.etcd.pause()
    rig.broker.publish(held)
    becomes(lambda: rig.broker.depth("order").unacked, len(held))
    retried_later(rig.servers.rabbitmq, "retried")
    rig.servers.rabbitmq.stop()
    old_broker.close()
    eventually(lambda: not_ready(service, "rabbitmq"))
    with place.start(NEW) as rabbitmq:
        rig.servers.etcd.resume()
        service.wait_ready()
        rabbitmq.ctl("enable_feature_flag", "all")
        new = Broker(rabbitmq)
        assert rabbitmq.ctl("version").startswith("4.3.")
        new.publish(later)
        events = [*done, *held, *later, order("retried")]
        becomes(lambda: rig.store.done("order"), ids(events), 60)
        wait_drained(new, "order")
        assert_handled_once("order", rig.store, sent=events, confirmed=events, at_least=151)
        doctor = Command(rig.servers).json("doctor", RETRY_DELAYS=f"{_RETRIED_AFTER_S}s")
        assert doctor["problems"] == 0, doctor
        (dead,) = new.drain("order.dead-letter", expect=1)
        assert dead.body == b"not json"
        assert service.terminate(10) == 0
