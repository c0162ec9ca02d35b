"""Services among programs that know nothing of them: producers, traces, exchanges of others."""

from collections.abc import Iterator
from typing import Any

import orjson
import pika
import pytest
from cloudevents.core.bindings.amqp import to_binary, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from pika.exceptions import UnroutableError

from chaos.checks import becomes, says
from chaos.rig import Rig
from servers.broker import Broker, Depth
from servers.wait import eventually

EXCHANGE = "shop"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACE = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01", "tracestate": "vendor=1"}

PLACES = """
import sys
from idempotent_consumer import Put, Service, cloudevents, encode_id
import orjson

bindings = sys.argv[1:] or ["com.example.#"]
decode = cloudevents.decode
service = Service("order", noun="orders", exchange="shop", bindings=bindings, decode=decode)

@service.handler("com.example.order")
def place(event):
    return Put("/orders/" + encode_id(event.id), orjson.dumps(event.args))

sys.exit(service.run())
"""

SHIPS = """
import sys
import structlog
from idempotent_consumer import Publish, Service

service = Service("order", noun="orders")

@service.handler("new_order")
def ship(event):
    structlog.get_logger().info("ships")
    return Publish("order_shipped", headers={"tenant": event.headers["tenant"]})

sys.exit(service.run())
"""

TELLS = """
import logging
import sys
from idempotent_consumer import Service

service = Service("notify", noun="notifications")

@service.claimed_handler("order_shipped", timeout_s=5)
async def tell(event, timeout_s):
    logging.getLogger("mails").info("tells", extra={"headers": dict(event.headers)})

sys.exit(service.run())
"""


@pytest.fixture
def shop(broker: Broker) -> Iterator[None]:
    """Leave no exchange of that name behind."""
    yield
    with broker.channel() as channel:
        channel.exchange_delete(EXCHANGE)


@pytest.mark.usefixtures("shop")
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

    for event_id, encode in (("1", to_structured), ("2", to_binary)):
        publish(event_id, encode)
    for event_id, encode in (("1", to_binary), ("2", to_structured)):
        publish(event_id, encode)
    with pytest.raises(UnroutableError):
        publish("3", to_binary, "com.other.order")
    counted = {"received": 4, "processed": 2, "processed_skipped": 2}
    becomes(lambda: rig.counters("orders"), counted)
    placed = rig.store.effects("/orders/")
    assert set(placed) == {"/shop 1", "/shop 2"}
    assert {(found.version, found.value) for found in placed.values()} == {
        (1, orjson.dumps({"amount": 42}))
    }


def test_one_trace_goes_through_two_services_although_the_first_dies_on_its_way(rig: Rig) -> None:
    """It is killed with the event recorded and unpublished; the next process publishes that.

    For that one the order is a duplicate, as its record is there.
    """
    tells = rig.start("notify", script=TELLS)
    killed = rig.start("order", script=SHIPS, crash_at="events recorded:1")
    properties = pika.BasicProperties(headers={**TRACE, "tenant": "a"})
    rig.broker.publish_raw(b'{"id":"1","type":"new_order"}', properties=properties)
    killed.wait_end()
    becomes(lambda: rig.broker.depth("order"), Depth(1, 0))
    ships = rig.start("order", script=SHIPS)
    (told,) = eventually(lambda: says(tells, "tells"))
    assert told["headers"] == {**TRACE, "tenant": "a"}
    settled = eventually(lambda: says(ships, "skipped: a duplicate") + says(tells, "processed"))
    own = [*says(ships, "ships"), told]
    assert [line["event_id"] for line in own + settled] == ["1", "1/order/0"] * 2
    assert {line["trace_id"] for line in own + settled} == {TRACE_ID}


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


def test_queues_have_the_arguments_that_the_guarantee_rests_on(rig: Rig) -> None:
    """Quorum queues; the service's own, its dead letters, and one for each retry delay.

    They are for good, so they are settled here. The service's own queue alone is bound, to
    everything that is published.
    """
    rig.start("notify", RETRY_DELAYS="1s,5m")
    expected = {
        "notify": {**dead_lettered("notify.dead-letter"), "x-delivery-limit": 1000},
        "notify.dead-letter": {**QUORUM, "x-delivery-limit": -1},
        "notify.retry.1s": {**dead_lettered("notify"), "x-message-ttl": 1000},
        "notify.retry.5m": {**dead_lettered("notify"), "x-message-ttl": 300_000},
    }
    ask = rig.servers.rabbitmq.management
    queues: Any = ask("GET", "/api/queues/%2f?disable_stats=true")
    assert {queue["name"]: queue["arguments"] for queue in queues} == expected
    assert {(queue["durable"], queue["auto_delete"]) for queue in queues} == {(True, False)}
    exchange: Any = ask("GET", "/api/exchanges/%2f/events")
    assert (exchange["type"], exchange["durable"]) == ("topic", True)
    bindings: Any = ask("GET", "/api/exchanges/%2f/events/bindings/source")
    assert [(each["destination"], each["routing_key"]) for each in bindings] == [("notify", "#")]
