"""What the harness's own tests publish to, in place of a service's queue."""

import pytest

from servers.server import RabbitMQ
from servers.servers import Servers


@pytest.fixture
def queue(clean: Servers) -> str:
    """Declare a quorum queue and bind it to the exchange, as a service does; returns its name."""
    declare(clean.rabbitmq, "order")
    return "order"


def declare(rabbitmq: RabbitMQ, name: str) -> None:
    """Declare exchange, queue and binding through the management API."""
    quorum = {"durable": True, "arguments": {"x-queue-type": "quorum"}}
    for method, path, body in [
        ("PUT", "/api/exchanges/%2f/events", {"type": "topic", "durable": True}),
        ("PUT", f"/api/queues/%2f/{name}", quorum),
        ("POST", f"/api/bindings/%2f/e/events/q/{name}", {"routing_key": "#"}),
    ]:
        rabbitmq.management(method, path, body)
