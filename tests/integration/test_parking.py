"""What can never succeed is parked with its reason and its body untouched; the rest goes on."""

import datetime as dt
import json
from typing import Any

import pika
import pytest

from integration.judging import StartService, becomes, parked, wait_drained
from integration.load import orders
from servers.broker import Broker, Message
from servers.servers import Servers
from servers.statsd import StatsdListener
from servers.store import Store


@pytest.mark.parametrize(("service", "noun"), [("order", "orders"), ("notify", "notifications")])
def test_the_first_body_of_an_id_wins_and_any_other_is_parked(
    start_service: StartService,
    broker: Broker,
    store: Store,
    statsd: StatsdListener,
    service: str,
    noun: str,
) -> None:
    """In one batch, later, and after a restart; the record keeps its bytes."""
    assert start_service(service).terminate() == 0
    first, *others = (_body(number) for number in range(4))
    for body in (first, others[0], first):
        broker.publish_raw(body)
    running = start_service(service)
    becomes(lambda: statsd.count(f"{noun}_conflicted"), 1)
    becomes(lambda: statsd.count(f"{noun}_processed_skipped"), 1)
    (record,) = store.client.get(f"/service/{service}/")
    broker.publish_raw(others[1])
    becomes(lambda: statsd.count(f"{noun}_conflicted"), 2)
    assert running.terminate() == 0
    start_service(service)
    broker.publish_raw(others[2])
    broker.publish_raw(first)
    becomes(lambda: statsd.count(f"{noun}_processed_skipped"), 2)
    wait_drained(broker, service)
    dead = parked(broker, service, 3)
    assert [message.body for message in dead] == others
    assert {message.headers["x-reason"] for message in dead} == {"conflict"}
    assert all("'one'" in message.headers["x-error"] for message in dead)
    assert store.client.get(f"/service/{service}/") == [record]
    assert statsd.count(f"{noun}_processed") == 1


def test_the_order_of_a_conflict_stays_that_of_the_first_body(
    start_service: StartService, broker: Broker, store: Store, statsd: StatsdListener
) -> None:
    """The effect of the first is not written over by the second."""
    start_service("order")
    broker.publish_raw(_body(1))
    broker.publish_raw(_body(2))
    becomes(lambda: statsd.count("orders_conflicted"), 1)
    placed = store.orders()["one"]
    assert placed.version == 1
    assert json.loads(placed.value)["args"] == {"number": 1}


def test_a_type_without_a_handler_is_ignored(
    start_service: StartService, broker: Broker, store: Store, statsd: StatsdListener
) -> None:
    """Acked, counted, recorded nowhere."""
    start_service("order")
    broker.publish([{"id": "e-1", "type": "order_paid"}])
    becomes(lambda: statsd.count("orders_ignored"), 1)
    wait_drained(broker, "order")
    assert store.client.get("/service/order/") == []
    assert broker.ready("order.dead-letter") == 0


HOSTILE: dict[str, Any] = {
    "expires": {"expiration": "4000"},
    "claims-a-sender": {"user_id": "guest"},
    "carbon-copy": {"headers": {"CC": ["order", "order.dead-letter"], "BCC": ["order"]}},
    "huge-header": {"headers": {"huge": "x" * 100_000}},
    "huge-own-headers": {"headers": {"x-error": "x" * 50_000, "x-reason": "none of ours"}},
    "own-headers-of-other-types": {
        "headers": {"x-attempts": "many", "x-reason": 7, "x-error": ["a"]}
    },
    "forged-deaths": {"headers": {"x-death": "never", "x-delivery-count": 10**9}},
    "odd-values": {
        "headers": {
            "none": None,
            "bytes": b"\xff\x00",
            "big": -(2**62),
            "when": dt.datetime(2020, 1, 1, tzinfo=dt.UTC),
            "deep": {"a": [{"b": [True, None, {"c": "d"}]}]},
            "ü" * 100: "ü",
            "": "nameless",
        }
    },
    "transient": {"delivery_mode": 1, "priority": 255, "reply_to": "x" * 255, "type": "x" * 255},
    "odd-content": {"content_type": "no/such", "content_encoding": "gzip", "app_id": "ü"},
}


def test_hostile_properties_do_not_keep_a_message_from_being_parked(
    clean: Servers,
    start_service: StartService,
    broker: Broker,
    statsd: StatsdListener,
) -> None:
    """Each is parked once: it does not expire there, is copied nowhere, and stays on disk."""
    start_service("order")
    for name, properties in HOSTILE.items():
        broker.publish_raw(name.encode(), pika.BasicProperties(**properties))
    publish_what_pika_cannot(clean, "of-odd-types", {"float": 1.5, "table": {"list": [0.1, "a"]}})
    names = [*HOSTILE, "of-odd-types"]
    broker.publish(orders(1))
    becomes(lambda: statsd.count("orders_processed"), 1)
    becomes(lambda: statsd.count("orders_invalid"), len(names))
    wait_drained(broker, "order")
    shown: Any = clean.rabbitmq.management(
        "POST",
        "/api/queues/%2f/order.dead-letter/get",
        {"count": 100, "ackmode": "ack_requeue_true", "encoding": "auto"},
    )
    for message in shown:
        assert "expiration" not in message["properties"]
        assert "user_id" not in message["properties"]
        assert message["properties"]["delivery_mode"] == 2
        assert not {"CC", "BCC", "x-death"} & set(message["properties"]["headers"])
    dead = parked(broker, "order", len(names))
    assert sorted(message.body.decode() for message in dead) == sorted(names)
    assert all(_is_our_reason(message) for message in dead)
    assert statsd.count("orders_received") == len(names) + 1


def test_headers_of_an_ordinary_dead_letter_are_kept(
    start_service: StartService, broker: Broker
) -> None:
    """Who replays a dead letter finds the trace id and the routing that it came with."""
    start_service("order")
    properties = pika.BasicProperties(headers={"trace": "t-1", "n": 1}, message_id="m-1")
    broker.publish_raw(b"not json", properties)
    (dead,) = parked(broker, "order", 1)
    assert dead.headers["trace"] == "t-1"
    assert dead.headers["n"] == 1


def test_headers_that_cannot_be_read_cost_neither_their_event_nor_its_batch_mates(
    clean: Servers, start_service: StartService, broker: Broker, statsd: StatsdListener
) -> None:
    """pika gives up a connection over them: all in hand would go back, again and again."""
    assert start_service("order").terminate() == 0
    deep: dict[str, Any] = {}
    for _ in range(700):
        deep = {"a": deep}
    broker.publish(orders(5))
    publish_what_pika_cannot(clean, '{"id":"deep","type":"new_order"}', deep)
    start_service("order")
    becomes(lambda: statsd.count("orders_processed"), 6)
    assert statsd.count("orders_returned") == 0
    wait_drained(broker, "order")
    assert broker.ready("order.dead-letter") == 0


def publish_what_pika_cannot(servers: Servers, payload: str, headers: dict[str, Any]) -> None:
    """Publish a body with headers that pika cannot write."""
    answer = servers.rabbitmq.management(
        "POST",
        "/api/exchanges/%2f/events/publish",
        {
            "properties": {"headers": headers},
            "routing_key": "raw",
            "payload": payload,
            "payload_encoding": "string",
        },
    )
    assert answer == {"routed": True}


def _body(number: int) -> bytes:
    return b'{"id":"one","type":"new_order","args":{"number":%d}}' % number


def _is_our_reason(message: Message) -> bool:
    return message.headers["x-reason"] == "invalid" and "not JSON" in str(
        message.headers["x-error"]
    )
