"""RabbitMQ 4.0's data, opened by 4.3: what was in flight, waiting and parked is still there."""

from collections.abc import Iterator
from contextlib import ExitStack

import pika
import pytest

from integration.commanding import Command
from integration.containers import Brokers, brokers
from integration.judging import (
    StartService,
    assert_handled_once,
    becomes,
    not_ready,
    parked,
    wait_drained,
)
from integration.load import ids, order, orders
from servers.broker import Broker
from servers.engine import docker_available
from servers.server import RabbitMQ
from servers.servers import Servers, start_etcd
from servers.store import Store
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
    clean: Servers,
    place: Brokers,
    old_broker: ExitStack,
    start_service: StartService,
    broker: Broker,
    store: Store,
    store_of_metadata: str,
) -> None:
    """The service runs on: it reconnects by itself, and handles each event once."""
    service = start_service("order", RETRY_DELAYS=f"{_RETRIED_AFTER_S}s")
    done, held, later = (orders(50, name) for name in ("done", "held", "later"))
    broker.publish(done)
    becomes(lambda: store.done("order"), ids(done))
    broker.publish_raw(b"not json")
    becomes(lambda: broker.ready("order.dead-letter"), 1)
    clean.rabbitmq.ctl("enable_feature_flag", "all")
    if store_of_metadata == "Khepri":
        clean.rabbitmq.ctl("enable_feature_flag", "--opt-in", "khepri_db")
    clean.etcd.pause()
    broker.publish(held)
    becomes(lambda: broker.depth("order").unacked, len(held))
    retried_later(clean.rabbitmq, "retried")
    clean.rabbitmq.stop()
    old_broker.close()
    eventually(lambda: not_ready(service, "rabbitmq"))
    with place.start(NEW) as rabbitmq:
        clean.etcd.resume()
        service.wait_ready()
        rabbitmq.ctl("enable_feature_flag", "all")
        broker = Broker(rabbitmq)
        assert rabbitmq.ctl("version").startswith("4.3.")
        broker.publish(later)
        events = [*done, *held, *later, order("retried")]
        becomes(lambda: store.done("order"), ids(events), 60)
        wait_drained(broker, "order")
        assert_handled_once("order", store, sent=events, confirmed=events, at_least=151)
        doctor = Command(clean).json("doctor", RETRY_DELAYS=f"{_RETRIED_AFTER_S}s")
        assert doctor["problems"] == 0, doctor
        assert [message.body for message in parked(broker, "order", 1)] == [b"not json"]
        assert service.terminate(10) == 0
