"""What can never succeed is parked with its reason and its body untouched; the rest goes on."""

import datetime as dt
import struct
from decimal import Decimal
from typing import Any

import pika
import pytest

from chaos.checks import becomes
from chaos.load import order, orders
from chaos.receiver import Receiver
from chaos.rig import Rig
from fakes.headers import array, encoded, entry, table
from idempotent_consumer.amqp import Properties, keep_header_bytes
from integration.command import Command
from servers.broker import Message, encode
from servers.servers import Servers

pytestmark = pytest.mark.short


HOSTILE: dict[str, Any] = {
    "traced": {"headers": {"trace": "t-1", "n": 1}, "message_id": "m-1"},
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


def test_hostile_properties_do_not_keep_a_message_from_being_parked(rig: Rig) -> None:
    """Each is parked once: it does not expire there, is copied nowhere, and stays on disk."""
    rig.start("order")
    for name, properties in HOSTILE.items():
        rig.broker.publish_raw(name.encode(), pika.BasicProperties(**properties))
    publish_what_pika_cannot(
        rig.servers, "of-odd-types", {"float": 1.5, "table": {"list": [0.1, "a"]}}
    )
    names = [*HOSTILE, "of-odd-types"]
    rig.broker.publish(orders(1))
    becomes(lambda: rig.statsd.count("orders_processed"), 1)
    becomes(lambda: rig.statsd.count("orders_invalid"), len(names))
    rig.drained("order")
    shown: Any = rig.servers.rabbitmq.management(
        "POST",
        "/api/queues/%2f/order.dead-letter/get",
        {"count": 100, "ackmode": "ack_requeue_true", "encoding": "auto"},
    )
    for message in shown:
        assert "expiration" not in message["properties"]
        assert "user_id" not in message["properties"]
        assert message["properties"]["delivery_mode"] == 2
        assert not {"CC", "BCC", "x-death"} & set(message["properties"]["headers"])
    dead = rig.parked("order", len(names))
    assert sorted(message.body.decode() for message in dead) == sorted(names)
    assert all(_is_our_reason(message) for message in dead)
    (traced,) = (message.headers for message in dead if message.body == b"traced")
    assert (traced["trace"], traced["n"]) == ("t-1", 1)
    assert rig.statsd.count("orders_received") == len(names) + 1


def test_headers_that_cannot_be_read_cost_neither_their_event_nor_its_batch_mates(rig: Rig) -> None:
    """pika gives up a connection over them: all in flight would go back, again and again."""
    assert rig.start("order").terminate() == 0
    deep: dict[str, Any] = {}
    for _ in range(700):
        deep = {"a": deep}
    rig.broker.publish(orders(5))
    publish_what_pika_cannot(rig.servers, '{"id":"deep","type":"new_order"}', deep)
    rig.start("order")
    becomes(lambda: rig.statsd.count("orders_processed"), 6)
    assert rig.statsd.count("orders_returned") == 0
    rig.drained("order")
    assert rig.broker.ready("order.dead-letter") == 0


FLOAT, DOUBLE = struct.pack(">f", 0.5), struct.pack(">d", 1e300)
WRITTEN = table(
    entry(b"float", b"f", FLOAT),
    entry(b"decimal", b"D", struct.pack(">Bi", 2, 314)),
    entry(b"year", b"T", struct.pack(">Q", 2**62)),
    entry(b"table", b"F", table(entry(b"list", b"A", array(b"d" + DOUBLE, b"V")))),
    entry(b"x-attempts", b"f", FLOAT),
    entry(b"text", b"S", struct.pack(">I", 60_000) + b"a" * 60_000),
)
READ = {
    "float": 0.5,
    "decimal": Decimal("3.14"),
    "year": 2**62,
    "table": {"list": [1e300, None]},
    "text": "a" * 60_000,
}


def test_headers_arrive_unchanged_after_retries_a_dead_letter_and_a_replay(
    rig: Rig, receiver: Receiver
) -> None:
    """Of kinds that pika does not write, too."""
    keep_header_bytes()  # For what this test reads.
    rig.start("notify", NOTIFY_URL=receiver.url, RETRY_DELAYS="1s")
    receiver.refuse("1")
    rig.broker.publish_raw(encode(order("1")), Properties().decode(encoded(WRITTEN)))
    becomes(lambda: rig.statsd.count("notifications_failed"), 1)
    command = Command(rig.servers)
    assert command.json("dead-letters", "replay", "notify", "--all", "--force")["replayed"] == 1
    becomes(lambda: rig.statsd.count("notifications_failed"), 2)
    (dead,) = rig.parked("notify", 1)
    theirs = {name: value for name, value in dead.headers.items() if not name.startswith("x-")}
    assert theirs == READ
    assert dead.headers["x-attempts"] == 2


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


def _is_our_reason(message: Message) -> bool:
    return message.headers["x-reason"] == "invalid" and "not JSON" in str(
        message.headers["x-error"]
    )
