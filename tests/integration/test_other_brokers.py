"""Other RabbitMQs: 4.0 that is upgraded to 4.3, and one without the management metrics.

RabbitMQ has announced that it will remove these metrics.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from secrets import token_hex

import pika
import pytest

from chaos.checks import becomes, not_ready
from chaos.load import ids, order, orders
from chaos.rig import Rig
from integration.command import Command
from servers.broker import Broker, encode
from servers.processes import free_port, run_tool
from servers.servers import RabbitMQ, Servers, booted, image, start_etcd
from servers.wait import eventually

pytestmark = pytest.mark.usefixtures("docker")

OLD, NEW = "rabbitmq:4.0-management", "rabbitmq:4.3-management"
RETRIED_AFTER_S = 20
WITHOUT_METRICS = "deprecated_features.permit.management_metrics_collection = false\n"


@dataclass
class Place:
    """The ports and the volume of brokers that replace each other."""

    volume: str
    ports: dict[int, int] = field(default_factory=lambda: {5672: free_port(), 15672: free_port()})

    @contextmanager
    def start(self, image_name: str, conf: Path | None = None) -> Iterator[RabbitMQ]:
        """Start a broker, and remove it after the block; the volume stays."""
        from servers.containers import prepare_container

        mounts = {self.volume: "/var/lib/rabbitmq"}
        if conf is not None:
            mounts[str(conf)] = "/etc/rabbitmq/conf.d/30-test.conf"
        runner = prepare_container(image_name, self.ports, mounts=mounts, hostname="rabbitmq")
        rabbitmq = RabbitMQ(runner, *self.ports.values())
        with booted(rabbitmq):
            yield rabbitmq


@pytest.fixture
def place() -> Iterator[Place]:
    """Give a new volume for brokers, and remove it afterwards."""
    volume = f"test-{token_hex(4)}"
    run_tool(["docker", "volume", "create", volume])
    try:
        yield Place(volume)
    finally:
        run_tool(["docker", "volume", "rm", volume])


@pytest.fixture
def servers(place: Place, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Servers]:
    """Give the old broker, or the usual one with a parameter as its configuration; and an etcd."""
    starting = place.start(OLD)
    if conf := getattr(request, "param", ""):
        (tmp_path / "test.conf").write_text(conf)
        starting = place.start(image("IMAGE_RABBITMQ"), tmp_path / "test.conf")
    with start_etcd("docker") as etcd, starting as rabbitmq:
        yield Servers("docker", rabbitmq, etcd)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("store_of_metadata", ["Khepri", "Mnesia"])
def test_a_volume_of_rabbitmq_4_0_is_opened_by_4_3_with_messages_in_flight(
    rig: Rig, place: Place, store_of_metadata: str
) -> None:
    """The service keeps running, reconnects by itself, and handles each event once."""
    service = rig.start("order", RETRY_DELAYS=f"{RETRIED_AFTER_S}s")
    done, held, later = (orders(50, name) for name in ("done", "held", "later"))
    rig.broker.publish(done)
    becomes(lambda: rig.store.done("order"), ids(done))
    rig.broker.publish_raw(b"not json")
    becomes(lambda: rig.broker.ready("order.dead-letter"), 1)
    rig.drained("order")
    rig.servers.rabbitmq.ctl("enable_feature_flag", "all")
    if store_of_metadata == "Khepri":
        rig.servers.rabbitmq.ctl("enable_feature_flag", "--opt-in", "khepri_db")
    rig.servers.etcd.pause()
    rig.broker.publish(held)
    becomes(lambda: rig.broker.depth("order").unacked, len(held))
    # As after the first failure of a handler.
    retried = pika.BasicProperties(headers={"x-attempts": 1}, delivery_mode=2)
    waiting = {"exchange": "", "routing_key": f"order.retry.{RETRIED_AFTER_S}s"}
    rig.broker.publish_raw(encode(order("retried")), properties=retried, **waiting)
    rig.servers.rabbitmq.stop()
    rig.servers.rabbitmq.close()
    eventually(lambda: not_ready(service, "rabbitmq"))
    with place.start(NEW) as rabbitmq:
        rig.servers.etcd.resume()
        service.wait_ready()
        rabbitmq.ctl("enable_feature_flag", "all")
        rig = replace(rig, broker=Broker(rabbitmq))
        assert rabbitmq.ctl("version").startswith("4.3.")
        rig.broker.publish(later)
        events = [*done, *held, *later, order("retried")]
        becomes(lambda: rig.store.done("order"), ids(events), 60)
        rig.handled_once("order", events)
        doctor = Command(rig.servers).json("doctor", RETRY_DELAYS=f"{RETRIED_AFTER_S}s")
        assert doctor["problems"] == 0, doctor
        assert [dead.body for dead in rig.parked("order", 1)] == [b"not json"]
        assert service.terminate(10) == 0


@pytest.mark.parametrize("servers", [WITHOUT_METRICS], indirect=True, ids=["without metrics"])
def test_the_command_shows_and_checks_the_same_without_metrics(rig: Rig) -> None:
    """Also what is unacked: the command asks the queue."""
    overview = rig.servers.rabbitmq.management("GET", "/api/overview")
    assert isinstance(overview, dict)
    assert "queue_totals" not in overview, "the metrics are on"
    service = rig.start("order")
    rig.broker.publish_raw(b"not json")
    becomes(lambda: rig.broker.ready("order.dead-letter"), 1)
    assert service.terminate(10) == 0
    rig.broker.publish(orders(20))
    command = Command(rig.servers)
    with rig.broker.channel() as channel:
        channel.basic_qos(prefetch_count=5)
        channel.basic_consume("order", lambda *_: None)

        def counts() -> list[int]:
            channel.connection.process_data_events()
            row = command.json("status")["services"]["order"]
            return [row[name] for name in ("ready", "unacked", "consumers", "dead_letters")]

        becomes(counts, [15, 5, 1, 1])
    doctor = command.json("doctor")
    assert doctor["problems"] == 0, doctor
    looked_at = {each["what"] for each in doctor["findings"] if each["about"] == "order"}
    assert {"all 5 queues are as they should be", "bound to exchange events by #"} <= looked_at
