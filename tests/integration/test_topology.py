"""What the services declare: queue arguments are for good, so they are settled here."""

from typing import Any

import pytest

from chaos.rig import Rig

QUORUM = {"x-queue-type": "quorum"}


def dead_lettered(queue: str) -> dict[str, Any]:
    """Return the arguments that send a queue's dead letters to another, at least once."""
    return {
        **QUORUM,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": queue,
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }


@pytest.mark.parametrize("service", ["order", "notify"])
def test_queues_have_the_arguments_that_the_guarantee_rests_on(rig: Rig, service: str) -> None:
    """Quorum queues; the service's own, its dead letters, and one for each retry delay."""
    rig.start(service, RETRY_DELAYS="1s,5m")
    expected = {
        service: {**dead_lettered(f"{service}.dead-letter"), "x-delivery-limit": 1000},
        f"{service}.dead-letter": {**QUORUM, "x-delivery-limit": -1},
        f"{service}.retry.1s": {**dead_lettered(service), "x-message-ttl": 1000},
        f"{service}.retry.5m": {**dead_lettered(service), "x-message-ttl": 300_000},
    }
    assert set(rig.broker.queues()) == set(expected)
    for queue, arguments in expected.items():
        facts: Any = rig.servers.rabbitmq.management(
            "GET", f"/api/queues/%2f/{queue}?disable_stats=true"
        )
        assert facts["arguments"] == arguments
        assert facts["durable"]
        assert not facts["auto_delete"]


def test_services_are_bound_to_everything_that_is_published(rig: Rig) -> None:
    """One durable topic exchange; only the services' own queues are bound to it."""
    rig.start("order")
    rig.start("notify")
    exchange: Any = rig.servers.rabbitmq.management("GET", "/api/exchanges/%2f/events")
    assert (exchange["type"], exchange["durable"]) == ("topic", True)
    bindings: Any = rig.servers.rabbitmq.management(
        "GET", "/api/exchanges/%2f/events/bindings/source"
    )
    assert sorted((each["destination"], each["routing_key"]) for each in bindings) == [
        ("notify", "#"),
        ("order", "#"),
    ]
