"""Services among programs that know nothing of them: producers, traces, exchanges of others."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pika
import pytest
from cloudevents.core.bindings.amqp import to_binary, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from pika.exceptions import UnroutableError

from chaos.checks import StartService, becomes, lines, losses, not_ready, says
from chaos.crash_points import VARIABLE
from chaos.rig import Rig
from integration.command import Command
from servers.broker import Depth
from servers.servers import Servers
from servers.services import Service
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

StartScript = Callable[..., Service]


@pytest.fixture
def start_script(start_service: StartService, tmp_path: Path) -> StartScript:
    """Start a program of the test's as a service; a crash point may be among its settings."""

    def start(name: str, script: str, *arguments: str, wait: bool = True, **more: str) -> Service:
        (tmp_path / f"its_{name}.py").write_text(script)
        command = [sys.executable, "-m", f"its_{name}", *arguments]
        if VARIABLE in more:
            command[2:3] = ["chaos.crash_points", f"its_{name}"]
        return start_service(name, wait=wait, command=command, PYTHONPATH=str(tmp_path), **more)

    return start


@contextmanager
def channel(servers: Servers) -> Iterator[Any]:
    connection = pika.BlockingConnection(pika.URLParameters(servers.rabbitmq.url))
    try:
        opened = connection.channel()
        opened.confirm_delivery()
        yield opened
    finally:
        connection.close()


@pytest.fixture
def shop(clean: Servers) -> Iterator[None]:
    """Leave no exchange of that name behind."""
    yield
    with channel(clean) as opened:
        opened.exchange_delete(EXCHANGE)


@pytest.mark.usefixtures("shop")
def test_what_the_cloudevents_sdk_publishes_is_handled_once_in_either_mode(
    rig: Rig, start_script: StartScript
) -> None:
    """The same event in the other mode is a duplicate. One that no binding asks for stays away."""
    start_script("order", PLACES)

    def publish(event_id: str, encode: Any, kind: str = "com.example.order") -> None:
        attributes = {"id": event_id, "source": "/shop", "type": kind, "specversion": "1.0"}
        attributes["datacontenttype"] = "application/json"
        message = encode(CloudEvent(attributes, {"amount": 42}), JSONFormat())
        properties = pika.BasicProperties(
            content_type=message.properties["content-type"], headers=message.application_properties
        )
        with channel(rig.servers) as opened:
            data = message.application_data
            opened.basic_publish(EXCHANGE, kind, data, properties, mandatory=True)

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


def test_one_trace_goes_through_two_services_although_the_first_dies_on_its_way(
    rig: Rig, start_script: StartScript
) -> None:
    """It is killed with the event recorded and unpublished; the next process publishes that.

    For that one the order is a duplicate, as its record is there.
    """
    tells = start_script("notify", TELLS)
    killed = start_script("order", SHIPS, **{VARIABLE: "events recorded:1"})
    properties = pika.BasicProperties(headers={**TRACE, "tenant": "a"})
    rig.broker.publish_raw(b'{"id":"1","type":"new_order"}', properties)
    killed.wait_end()
    becomes(lambda: rig.broker.depth("order"), Depth(1, 0))
    ships = start_script("order", SHIPS)
    (told,) = eventually(lambda: says(tells, "tells"))
    assert told["headers"] == {**TRACE, "tenant": "a"}
    settled = eventually(lambda: says(ships, "skipped: a duplicate") + says(tells, "processed"))
    own = [*says(ships, "ships"), told]
    assert [line["event_id"] for line in own + settled] == ["1", "1/order/0"] * 2
    assert {line["trace_id"] for line in own + settled} == {TRACE_ID}


@pytest.mark.usefixtures("shop")
def test_an_exchange_of_another_kind_is_told_in_one_line_that_names_the_way_out(
    rig: Rig, start_script: StartScript
) -> None:
    with channel(rig.servers) as opened:
        opened.exchange_declare(EXCHANGE, "fanout", durable=True)
    service = start_script("order", PLACES, wait=False)
    eventually(lambda: not_ready(service, "rabbitmq"), also=(OSError,))
    eventually(lambda: says(service, "no connection to RabbitMQ"))
    assert losses(service, "name another with exchange=") > 0
    assert not any("\n" in line["error"] for line in lines(service, "no connection"))
    with channel(rig.servers) as opened:
        opened.exchange_delete(EXCHANGE)
    service.wait_ready()


@pytest.mark.usefixtures("shop")
def test_doctor_names_a_binding_that_is_gone_and_one_that_nobody_asks_for(
    rig: Rig, start_script: StartScript
) -> None:
    assert start_script("order", PLACES, "com.example.#", "refund").terminate(10) == 0
    start_script("order", PLACES)
    command = Command(rig.servers)
    asked = ("doctor", "order", "--exchange", EXCHANGE, "--binding", "com.example.#")

    def bound(found: Any) -> list[tuple[str, str]]:
        return [(e["level"], e["what"]) for e in found["findings"] if "bound to " in e["what"]]

    unasked = "its queue is bound to exchange shop by refund too, which is not asked for"
    assert bound(command.json(*asked)) == [("warning", unasked)]
    with channel(rig.servers) as opened:
        opened.queue_unbind("order", EXCHANGE, "refund")
    assert bound(command.json(*asked)) == [("ok", "bound to exchange shop by com.example.#")]
    with channel(rig.servers) as opened:
        opened.queue_unbind("order", EXCHANGE, "com.example.#")
    missing = "its queue is not bound to exchange shop by com.example.#: it does not get those"
    assert bound(command.failing(*asked)) == [("problem", f"{missing} events")]
