"""Events that fail are retried, then parked with their reason and an unchanged body."""

import struct
from collections import Counter
from decimal import Decimal
from functools import partial
from typing import Any

import pika
import pytest

from chaos.checks import becomes
from chaos.load import order, orders
from chaos.receiver import Receiver
from chaos.rig import Rig
from fakes.corpus import MIB, NO_EVENTS, ODD_EVENTS
from fakes.headers import array, encoded, entry, table
from idempotent_consumer import encode_id
from idempotent_consumer.amqp import Properties, keep_header_bytes
from integration.command import Command
from servers.broker import encode
from servers.processes import resident_bytes

# Invalid events.

_PROPERTIES = [
    None,
    pika.BasicProperties(content_type="application/json", delivery_mode=1, expiration="60000"),
    pika.BasicProperties(content_encoding="gzip", headers={"x-reason": "failed", "x-error": 7}),
    pika.BasicProperties(headers={"x-attempts": -1, "x-death": [{"count": 10**9}]}, priority=9),
]
"""The properties of the bodies, in turn: a body is judged whatever they are."""

_MOST_BYTES = 256 * MIB
"""Less than it takes to parse a body of 16 MiB."""


def test_invalid_events_are_parked_and_the_valid_ones_among_them_are_handled(rig: Rig) -> None:
    """All of them arrive at once. Ids that look alike belong to different events."""
    assert rig.start("order").terminate() == 0
    plain, odd = orders(2 * len(NO_EVENTS)), list(ODD_EVENTS.values())
    for index, body in enumerate(NO_EVENTS):
        bodies = [body, *odd[index : index + 1]]
        rig.broker.publish_raw(*bodies, properties=_PROPERTIES[index % len(_PROPERTIES)])
        rig.broker.publish(plain[2 * index : 2 * index + 2])
    running = rig.start("order")
    becomes(lambda: rig.statsd.count("orders_invalid"), len(NO_EVENTS), timeout_s=60)
    becomes(lambda: rig.statsd.count("orders_processed"), len(plain) + len(odd))
    rig.broker.publish_raw(*odd)
    becomes(lambda: rig.statsd.count("orders_processed_skipped"), len(odd))
    rig.drained("order")
    dead = rig.parked("order", len(NO_EVENTS))
    assert Counter(message.body for message in dead) == Counter(NO_EVENTS)
    for message in dead:
        assert message.headers["x-reason"] == "invalid"
        assert isinstance(error := message.headers["x-error"], str)
        assert error
        # Some came with -1 attempts; the service has made none.
        assert message.headers.get("x-attempts", -1) == -1
    rig.handled_once("order", [*plain, *(order(encode_id(event_id)) for event_id in ODD_EVENTS)])
    assert running.health().status == 200
    rig.counters_add_up("orders")
    assert resident_bytes(running.pid, "VmHWM") < _MOST_BYTES


# Properties and headers.

HOSTILE: dict[str, Any] = {
    "traced": {"headers": {"trace": "t-1", "n": 1}, "message_id": "m-1"},
    "expires": {"expiration": "60000"},
    "claims-a-sender": {"user_id": "guest"},
    "carbon-copy": {"headers": {"CC": ["order", "order.dead-letter"], "BCC": ["order"]}},
    "huge-own-headers": {"headers": {"x-error": "x" * 50_000, "x-reason": "none of ours"}},
    "own-headers-of-other-types": {
        "headers": {"x-attempts": "many", "x-reason": 7, "x-error": ["a"]}
    },
    "forged-deaths": {"headers": {"x-death": "never", "x-delivery-count": 10**9}},
    "transient": {"delivery_mode": 1, "priority": 255, "reply_to": "x" * 255, "type": "x" * 255},
}


@pytest.mark.short
def test_hostile_properties_do_not_keep_a_message_from_being_parked(rig: Rig) -> None:
    """Parked, it does not expire and is stored on disk, and no other queue gets a copy.

    Headers at which pika would close the connection cost no event.
    """
    assert rig.start("order").terminate() == 0
    for name, properties in HOSTILE.items():
        rig.broker.publish_raw(name.encode(), properties=pika.BasicProperties(**properties))
    publish_what_pika_cannot(rig, "of-odd-types", {"float": 1.5, "table": {"list": [0.1, "a"]}})
    names = [*HOSTILE, "of-odd-types"]
    deep: dict[str, Any] = {}
    for _ in range(700):
        deep = {"a": deep}
    publish_what_pika_cannot(rig, '{"id":"deep","type":"new_order"}', deep)
    rig.broker.publish(orders(5))
    rig.start("order")
    settled = {"received": 6 + len(names), "processed": 6, "invalid": len(names)}
    becomes(lambda: rig.counters("orders"), settled)
    rig.drained("order")
    for properties in rig.waiting("order.dead-letter"):
        assert properties["delivery_mode"] == 2
        headers = properties["headers"]
        assert not {"expiration", "user_id", "CC", "BCC", "x-death"} & {*properties, *headers}
    dead = {dead.body.decode(): dead.headers for dead in rig.parked("order", len(names))}
    assert dead.keys() == set(names)
    for headers in dead.values():
        assert (headers["x-reason"], "not JSON" in headers["x-error"]) == ("invalid", True)
    assert (dead["traced"]["trace"], dead["traced"]["n"]) == ("t-1", 1)


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


@pytest.mark.short
def test_headers_arrive_unchanged_after_retries_a_dead_letter_and_a_replay(
    rig: Rig, receiver: Receiver
) -> None:
    """Also those of types that pika cannot write."""
    keep_header_bytes()  # So that this test reads them, too.
    rig.start("notify", NOTIFY_URL=receiver.url, RETRY_DELAYS="1s")
    receiver.refuse("1")
    rig.broker.publish_raw(encode(order("1")), properties=Properties().decode(encoded(WRITTEN)))
    becomes(lambda: rig.statsd.count("notifications_failed"), 1)
    command = Command(rig.servers)
    assert command.json("dead-letters", "replay", "notify", "--all", "--force")["replayed"] == 1
    becomes(lambda: rig.statsd.count("notifications_failed"), 2)
    (dead,) = rig.parked("notify", 1)
    theirs = {name: value for name, value in dead.headers.items() if not name.startswith("x-")}
    assert theirs == READ
    assert dead.headers["x-attempts"] == 2


def publish_what_pika_cannot(rig: Rig, payload: str, headers: dict[str, Any]) -> None:
    text = {"routing_key": "raw", "payload": payload, "payload_encoding": "string"}
    message, path = {"properties": {"headers": headers}, **text}, "exchanges/%2f/events/publish"
    assert rig.servers.rabbitmq.management("POST", f"/api/{path}", message) == {"routed": True}


# Handlers that fail.


def test_a_failing_event_waits_on_the_broker_and_not_in_the_process(
    rig: Rig, receiver: Receiver
) -> None:
    """With its attempts it survives a kill of the service and of the broker."""
    start = partial(rig.start, "notify", NOTIFY_URL=receiver.url, RETRY_DELAYS="7s,1s")
    first = start()
    receiver.refuse("e-1")
    rig.broker.publish([order("e-1")])
    becomes(lambda: rig.statsd.count("notifications_retried"), 1)
    rig.drained("notify")
    assert rig.broker.ready("notify.retry.7s") == 1
    first.kill()
    rig.servers.rabbitmq.kill()
    rig.servers.rabbitmq.start()
    start()
    becomes(lambda: rig.statsd.count("notifications_failed"), 1, 60)
    (dead,) = rig.parked("notify", 1)
    assert dead.headers["x-attempts"] == 3
    assert receiver.per_key() == {"e-1": 3}
    assert rig.store.done("notify") == set()
