"""Services among programs that know nothing of them: producers and exchanges of others."""

from typing import Any

import pika
import pytest
from cloudevents.core.bindings.amqp import to_binary, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from pika.exceptions import UnroutableError

from chaos.checks import becomes
from chaos.rig import Rig

EXCHANGE = "shop"

PLACES = """
import sys
from idempotent_consumer import Put, Service, cloudevents, encode_id
import orjson

shop = {"exchange": "shop", "bindings": ["com.example.#"]}
service = Service("order", noun="orders", decode=cloudevents.decode, **shop)

@service.handler("com.example.order")
def place(event):
    return Put("/orders/" + encode_id(event.id), orjson.dumps(event.args))

sys.exit(service.run())
"""


def test_what_the_cloudevents_sdk_publishes_is_handled_once_in_either_mode(rig: Rig) -> None:
    """The same event in the other mode is a duplicate. One that no binding asks for stays away."""
    rig.start("order", script=PLACES)

    def publish(event_id: str, encode: Any, kind: str = "com.example.order") -> None:
        attributes = {"id": event_id, "source": "/shop", "type": kind, "specversion": "1.0"}
        attributes["datacontenttype"] = "application/json"
        message = encode(CloudEvent(attributes, {"amount": 42}), JSONFormat())
        properties = pika.BasicProperties(
            content_type=message.properties["content-type"], headers=message.application_properties
        )
        data = message.application_data
        rig.broker.publish_raw(data, properties=properties, exchange=EXCHANGE, routing_key=kind)

    for event_id, encode in zip("1221", (to_structured, to_binary) * 2, strict=True):
        publish(event_id, encode)
    with pytest.raises(UnroutableError):
        publish("3", to_binary, "com.other.order")
    counted = {"received": 4, "processed": 2, "processed_skipped": 2}
    becomes(lambda: rig.counters("orders"), counted)
    placed = rig.store.effects("/orders/").items()
    found = {id_: (effect.version, effect.value) for id_, effect in placed}
    assert found == dict.fromkeys(("/shop 1", "/shop 2"), (1, b'{"amount":42}'))


def test_queues_have_the_arguments_that_the_guarantee_rests_on(rig: Rig) -> None:
    """Quorum queues; the service's own, its dead letters, and one for each retry delay.

    They are for good, so they are settled here. The service's own queue alone is bound, to
    everything that is published.
    """
    rig.start("notify", RETRY_DELAYS="1s,5m")
    quorum = {"x-queue-type": "quorum"}
    dead_lettered = {
        **quorum,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": "notify",
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }
    parks = {"x-dead-letter-routing-key": "notify.dead-letter", "x-delivery-limit": 1000}
    expected = {
        "notify": dead_lettered | parks,
        "notify.dead-letter": {**quorum, "x-delivery-limit": -1},
        "notify.retry.1s": {**dead_lettered, "x-message-ttl": 1000},
        "notify.retry.5m": {**dead_lettered, "x-message-ttl": 300_000},
    }

    def ask(what: str) -> Any:
        return rig.servers.rabbitmq.management("GET", f"/api/{what}")

    queues = ask("queues/%2f?disable_stats=true")
    assert {queue["name"]: queue["arguments"] for queue in queues} == expected
    assert {(queue["durable"], queue["auto_delete"]) for queue in queues} == {(True, False)}
    exchange = ask("exchanges/%2f/events")
    assert (exchange["type"], exchange["durable"]) == ("topic", True)
    bindings = ask("exchanges/%2f/events/bindings/source")
    assert [(each["destination"], each["routing_key"]) for each in bindings] == [("notify", "#")]
