"""Nothing that arrives ends the process, stops its batch mates, or disappears."""

import hashlib
import json
import re
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pika
import pytest

from chaos.checks import (
    becomes,
)
from chaos.load import order, orders
from chaos.rig import Rig
from fakes.corpus import MIB, NO_EVENTS, ODD_EVENTS
from servers.services import Service
from servers.wait import eventually

_PROPERTIES = [
    None,
    pika.BasicProperties(content_type="application/json", delivery_mode=1, expiration="60000"),
    pika.BasicProperties(content_encoding="gzip", headers={"x-reason": "failed", "x-error": 7}),
    pika.BasicProperties(headers={"x-attempts": -1, "x-death": [{"count": 10**9}]}, priority=9),
]
"""What the bodies come with, in turn: none of it says whether they are events."""

_DELIVERY_LIMIT = 1000

_MOST_MIB = 256
"""A body of 16 MiB that is read would alone take more than this."""


@pytest.mark.parametrize(("service", "noun"), [("order", "orders"), ("notify", "notifications")])
def test_a_corpus_of_rubbish_among_events_is_parked_body_by_body(
    rig: Rig, service: str, noun: str
) -> None:
    """All of it waits for the service, and arrives at once. Each body comes out as it went in.

    Ids that look alike, by slashes, case, Unicode forms, NUL or length, are those of other events.
    """
    assert rig.start(service).terminate() == 0
    plain, odd = orders(2 * len(NO_EVENTS)), list(ODD_EVENTS.values())
    for index, body in enumerate(NO_EVENTS):
        rig.broker.publish_raw(body, _PROPERTIES[index % len(_PROPERTIES)])
        if index < len(odd):
            rig.broker.publish_raw(odd[index], _PROPERTIES[index % len(_PROPERTIES)])
        rig.broker.publish(plain[2 * index : 2 * index + 2])
    running = rig.start(service)
    becomes(lambda: rig.statsd.count(f"{noun}_invalid"), len(NO_EVENTS), timeout_s=60)
    becomes(lambda: rig.statsd.count(f"{noun}_processed"), len(plain) + len(odd))
    for body in odd:
        rig.broker.publish_raw(body)
    becomes(lambda: rig.statsd.count(f"{noun}_processed_skipped"), len(odd))
    rig.drained(service)
    dead = rig.parked(service, len(NO_EVENTS))
    assert Counter(message.body for message in dead) == Counter(NO_EVENTS)
    for message in dead:
        assert message.headers["x-reason"] == "invalid"
        assert isinstance(message.headers["x-error"], str)
        assert message.headers["x-error"]
        # Some came with -1 attempts; the service has made none.
        assert message.headers.get("x-attempts", -1) == -1
    events = [*plain, *(order(_stored(event_id)) for event_id in ODD_EVENTS)]
    rig.handled_once(service, events)
    assert running.health().status == 200
    rig.counters_add_up(noun)
    assert _peak_mib(running) < _MOST_MIB


def test_an_event_that_ends_its_process_again_and_again_is_dead_lettered_by_the_broker(
    rig: Rig,
) -> None:
    """At the delivery limit, with the broker's own header and none of ours; the rest goes on."""
    assert rig.start("order").terminate() == 0
    (deadly, *others) = orders(4)
    rig.broker.publish([deadly])
    connection = pika.BlockingConnection(pika.URLParameters(rig.servers.rabbitmq.url))
    with closing(connection):
        for _ in range(_DELIVERY_LIMIT + 1):
            eventually(lambda: _take_and_vanish(connection))
    becomes(lambda: rig.broker.ready("order.dead-letter"), 1)
    rig.broker.publish(others)
    rig.start("order")
    becomes(lambda: rig.statsd.count("orders_processed"), len(others))
    rig.drained("order")
    (dead,) = rig.parked("order", 1)
    assert json.loads(dead.body) == deadly
    assert [death["reason"] for death in dead.headers["x-death"]] == ["delivery_limit"]
    assert not {"x-reason", "x-error", "x-attempts"} & set(dead.headers)


def _take_and_vanish(connection: Any) -> None:
    """Take the delivery and let it go back with its channel, as a process does that dies."""
    channel = connection.channel()
    method, _, _ = channel.basic_get("order")
    channel.close()
    if method is None:
        raise AssertionError("it is not back yet")


def _stored(event_id: str) -> str:
    """Return an id as it stands in a record's key."""
    encoded = event_id.encode()
    if len(encoded) > 128 or encoded.startswith(b"sha256:"):
        return "sha256:" + hashlib.sha256(encoded).hexdigest()
    return event_id


def _peak_mib(service: Service) -> float:
    """Return the most memory that a process has ever had."""
    status = Path(f"/proc/{service.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024 / MIB
