"""Publish to recorded, when nothing else is going on, beside the two steps nobody can avoid."""

import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from harness.broker import Broker
from harness.servers import Servers

from .loading import PERSISTENT, new_events
from .preparing import waiting_service
from .subjects import Subject
from .watching import etcd_client, watch

SAMPLES = 200

_WARM_UP = 20  # The first event waits for a lease, and the first of everything for its imports.
_PAUSE_S = 0.02
_LOST_AFTER_S = 10.0
_REFERENCE = "reference"


@dataclass
class Latencies:
    """Milliseconds, one of each kind per sample."""

    recorded_ms: list[float] = field(default_factory=list)
    round_trip_ms: list[float] = field(default_factory=list)
    put_ms: list[float] = field(default_factory=list)

    @property
    def bare_ms(self) -> list[float]:
        """What one event costs at the least: through the broker, then into etcd."""
        return [a + b for a, b in zip(self.round_trip_ms, self.put_ms, strict=True)]

    @property
    def over_bare(self) -> float:
        """How many times the bare steps it takes, medians."""
        return median(self.recorded_ms) / median(self.bare_ms)


def measure(servers: Servers, subject: Subject) -> Latencies:
    """Publish single events to a service and take the time until each record is there.

    That is when a watch, opened beforehand, has brought it to this process: one clock for both
    ends, and the watch's way back counts against the service. The bare steps are taken in turns
    with the events, so that all of them meet the same machine.
    """
    found = Latencies()
    recorded_s: queue.Queue[float] = queue.Queue()

    def changed(at_s: float, _keys: Sequence[bytes]) -> None:
        recorded_s.put(at_s)

    with (
        waiting_service(servers, subject) as channel,
        etcd_client(servers) as etcd,
        watch(etcd, subject.records[0], changed),
    ):
        delivered_s = _consume_reference(channel)
        for number, body in enumerate(new_events(_WARM_UP + SAMPLES)):
            recorded = _recorded_ms(channel, subject.queue, recorded_s, body)
            trip = _round_trip_ms(channel, delivered_s, body)
            put = _put_ms(etcd, number)
            if number >= _WARM_UP:
                found.recorded_ms.append(recorded)
                found.round_trip_ms.append(trip)
                found.put_ms.append(put)
            channel.connection.sleep(_PAUSE_S)
    Broker(servers.rabbitmq).delete_queues(_REFERENCE)
    return found


def _consume_reference(channel: Any) -> list[float]:
    """Consume the reference queue; returns the list that gets the time of each delivery."""
    delivered_s: list[float] = []
    channel.queue_declare(_REFERENCE, durable=True, arguments={"x-queue-type": "quorum"})
    channel.basic_consume(
        _REFERENCE, lambda *_: delivered_s.append(time.monotonic()), auto_ack=True
    )
    return delivered_s


def _recorded_ms(channel: Any, name: str, recorded_s: "queue.Queue[float]", body: bytes) -> float:
    started_s = time.monotonic()
    channel.basic_publish("", name, body, PERSISTENT)
    return (recorded_s.get(timeout=_LOST_AFTER_S) - started_s) * 1000


def _round_trip_ms(channel: Any, delivered_s: list[float], body: bytes) -> float:
    delivered_s.clear()
    started_s = time.monotonic()
    channel.basic_publish("", _REFERENCE, body, PERSISTENT)
    while not delivered_s:
        channel.connection.process_data_events(time_limit=_LOST_AFTER_S)
    return (delivered_s[0] - started_s) * 1000


def _put_ms(etcd: Any, number: int) -> float:
    started_s = time.monotonic()
    etcd.put(f"/reference/{number}", "done")
    return (time.monotonic() - started_s) * 1000
