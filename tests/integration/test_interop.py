"""What other programs see of a service: the events they publish to it, and its queues."""

from typing import Any

import orjson
import pika
import pytest
from cloudevents.core.bindings.amqp import to_binary, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from pika.exceptions import UnroutableError

from chaos.checks import becomes
from chaos.rig import Rig

PLACES = """
import sys
from idempotent_consumer import Put, Service, cloudevents, encode_id
import orjson

bindings = ["com.example.#"]
service = Service("order", noun="orders", bindings=bindings, decode=cloudevents.decode)

@service.handler("com.example.order")
def place(event):
    return Put("/orders/" + encode_id(event.id), orjson.dumps(event.args))

sys.exit(service.run())
"""


def test_what_the_cloudevents_sdk_publishes_is_handled_once_in_either_mode(rig: Rig) -> None:
    """The same event in the other mode is a duplicate."""
    rig.start("order", script=PLACES)

    def publish(event_id: str, encode: Any, kind: str = "com.example.order") -> None:
        attributes = {"id": event_id, "source": "/shop", "type": kind, "specversion": "1.0"}
        attributes["datacontenttype"] = "application/json"
        message = encode(CloudEvent(attributes, {"amount": 42}), JSONFormat())
        properties = pika.BasicProperties(
            content_type=message.properties["content-type"], headers=message.application_properties
        )
        rig.broker.publish_raw(message.application_data, properties=properties, routing_key=kind)

    for first, second in ((to_structured, to_binary), (to_binary, to_structured)):
        publish(first.__name__, first)
        publish(first.__name__, second)
    with pytest.raises(UnroutableError):  # No binding asks for it.
        publish("other", to_binary, "com.other.order")
    counted = {"received": 4, "processed": 2, "processed_skipped": 2}
    becomes(lambda: rig.counters("orders"), counted)
    placed = rig.store.effects("/orders/")
    assert set(placed) == {"/shop to_structured", "/shop to_binary"}
    assert {found.value for found in placed.values()} == {orjson.dumps({"amount": 42})}


def test_queues_have_the_arguments_that_the_guarantee_rests_on(rig: Rig) -> None:
    """Once declared, they cannot be changed. Only the service's own queue is bound."""
    rig.start("notify", RETRY_DELAYS="1s,5m")
    quorum = {"x-queue-type": "quorum"}

    def dead_lettered(queue: str) -> dict[str, Any]:
        return {
            **quorum,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": queue,
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        }

    ask = rig.servers.rabbitmq.management
    queues: Any = ask("GET", "/api/queues/%2f?disable_stats=true")
    assert {queue["name"]: queue["arguments"] for queue in queues} == {
        "notify": {**dead_lettered("notify.dead-letter"), "x-delivery-limit": 1000},
        "notify.dead-letter": {**quorum, "x-delivery-limit": -1},
        "notify.retry.1s": {**dead_lettered("notify"), "x-message-ttl": 1000},
        "notify.retry.5m": {**dead_lettered("notify"), "x-message-ttl": 300_000},
    }
    assert {(queue["durable"], queue["auto_delete"]) for queue in queues} == {(True, False)}
    exchange: Any = ask("GET", "/api/exchanges/%2f/events")
    assert (exchange["type"], exchange["durable"]) == ("topic", True)
    bindings: Any = ask("GET", "/api/exchanges/%2f/events/bindings/source")
    assert [(each["destination"], each["routing_key"]) for each in bindings] == [("notify", "#")]
