"""Containers of a test's own: a broker of another version, or with other settings."""

from collections.abc import Iterator
from contextlib import contextmanager
from secrets import token_hex

from cluster.node import Node
from servers.local import run_tool
from servers.ports import free_port
from servers.server import RabbitMQ


@contextmanager
def container(
    image_name: str,
    ports: dict[int, int],
    mounts: tuple[str, ...] = (),
    command: tuple[str, ...] = (),
    hostname: str = "server",
) -> Iterator[Node]:
    """Create a container with {port in it: port on this machine}, and remove it in the end."""
    node = Node(f"test-{token_hex(4)}", "server", "127.0.0.1")
    published = [f"--publish=127.0.0.1:{outside}:{inside}" for inside, outside in ports.items()]
    volumes = [f"--volume={mount}" for mount in mounts]
    named = (f"--name={node.container}", f"--hostname={hostname}")
    run_tool(["docker", "create", *named, *published, *volumes, image_name, *command])
    try:
        yield node
    finally:
        run_tool(["docker", "rm", "--force", "--volumes", node.container])


class Brokers:
    """Brokers that take each other's place: the same ports, node name and data."""

    def __init__(self, volume: str) -> None:
        self._volume = volume
        self._amqp_port, self._management_port = free_port(), free_port()

    @contextmanager
    def start(self, image_name: str, *mounts: str) -> Iterator[RabbitMQ]:
        """Start one, and remove it in the end; the data stays."""
        ports = {5672: self._amqp_port, 15672: self._management_port}
        data = f"{self._volume}:/var/lib/rabbitmq"
        with container(image_name, ports, (data, *mounts), hostname="rabbitmq") as node:
            rabbitmq = RabbitMQ(node, self._amqp_port, self._management_port)
            rabbitmq.start()
            yield rabbitmq


@contextmanager
def brokers() -> Iterator[Brokers]:
    """Give the place of a broker, whose data is removed in the end."""
    volume = f"test-{token_hex(4)}"
    run_tool(["docker", "volume", "create", volume])
    try:
        yield Brokers(volume)
    finally:
        run_tool(["docker", "volume", "rm", volume])
