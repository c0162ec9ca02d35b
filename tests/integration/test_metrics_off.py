"""RabbitMQ without the management plugin's metrics, which are announced for removal."""

from collections.abc import Iterator

import pika
import pytest

from chaos.checks import becomes
from chaos.load import orders
from chaos.rig import Rig
from integration.command import Command
from integration.containers import brokers
from servers.servers import Servers, docker_available, image, start_etcd

_CONF = "deprecated_features.permit.management_metrics_collection = false\n"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Give a broker whose metrics are off."""
    if not docker_available():
        pytest.skip("a broker with settings of its own needs Docker, which does not answer")
    conf = tmp_path_factory.mktemp("rabbitmq") / "off.conf"
    conf.write_text(_CONF)
    mount = f"{conf}:/etc/rabbitmq/conf.d/30-off.conf:ro"
    with (
        brokers() as place,
        start_etcd("docker") as etcd,
        place.start(image("IMAGE_RABBITMQ"), mount) as rabbitmq,
    ):
        yield Servers("docker", rabbitmq, etcd)


def test_the_command_shows_and_checks_the_same_without_metrics(rig: Rig) -> None:
    """What is unacked too: it comes from the queue, not from the metrics."""
    overview = rig.servers.rabbitmq.management("GET", "/api/overview")
    assert isinstance(overview, dict)
    assert "queue_totals" not in overview, "the metrics are on"
    service = rig.start("order")
    rig.broker.publish_raw(b"not json")
    becomes(lambda: rig.broker.ready("order.dead-letter"), 1)
    assert service.terminate(10) == 0
    rig.broker.publish(orders(20))
    command = Command(rig.servers)
    connection = pika.BlockingConnection(pika.URLParameters(rig.servers.rabbitmq.url))
    try:
        channel = connection.channel()
        channel.basic_qos(prefetch_count=5)
        channel.basic_consume("order", lambda *_: None)

        def counts() -> list[int]:
            connection.process_data_events()
            row = command.json("status")["services"]["order"]
            return [row[name] for name in ("ready", "unacked", "consumers", "dead_letters")]

        becomes(counts, [15, 5, 1, 1])
    finally:
        connection.close()
    doctor = command.json("doctor")
    assert doctor["problems"] == 0, doctor
    looked_at = {each["what"] for each in doctor["findings"] if each["about"] == "order"}
    assert {"all 5 queues are as they should be", "bound to exchange events by #"} <= looked_at
