"""Publish to recorded, when nothing else is going on, beside the two steps nobody can avoid."""

import queue
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import etcd3
import pika

from harness.broker import Broker
from harness.servers import Servers
from harness.wait import eventually

from .loading import new_events
from .records import Records
from .subjects import Subject

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


def measure(servers: Servers, subject: Subject) -> Latencies:
    """Publish single events to a service and take the time until each record is there.

    That is when a watch, opened beforehand, has brought it to this process: one clock for both
    ends, and the watch's way back counts against the service. The bare steps are taken in turns
    with the events, so that all of them meet the same machine.
    """
    found = Latencies()
    with _idle_service(servers, subject) as channel:
        etcd = _client(servers)
        arrivals, watch_id = _watch(etcd, subject.records[0])
        delivered: list[float] = []
        channel.queue_declare(_REFERENCE, durable=True, arguments={"x-queue-type": "quorum"})
        channel.basic_consume(
            _REFERENCE, lambda *_: delivered.append(time.perf_counter()), auto_ack=True
        )
        for number, body in enumerate(new_events(_WARM_UP + SAMPLES)):
            recorded = _recorded_ms(channel, subject.queue, arrivals, body)
            trip = _round_trip_ms(channel, delivered, body)
            put = _put_ms(etcd, number)
            if number >= _WARM_UP:
                found.recorded_ms.append(recorded)
                found.round_trip_ms.append(trip)
                found.put_ms.append(put)
            channel.connection.sleep(_PAUSE_S)
        etcd.cancel_watch(watch_id)
        etcd.close()
    return found


def _recorded_ms(channel: Any, name: str, arrivals: "queue.Queue[float]", body: bytes) -> float:
    started_s = time.perf_counter()
    channel.basic_publish("", name, body, pika.BasicProperties(delivery_mode=2))
    return (arrivals.get(timeout=_LOST_AFTER_S) - started_s) * 1000


def _round_trip_ms(channel: Any, delivered: list[float], body: bytes) -> float:
    delivered.clear()
    started_s = time.perf_counter()
    channel.basic_publish("", _REFERENCE, body, pika.BasicProperties(delivery_mode=2))
    while not delivered:
        channel.connection.process_data_events(time_limit=_LOST_AFTER_S)
    return (delivered[0] - started_s) * 1000


def _put_ms(etcd: Any, number: int) -> float:
    started_s = time.perf_counter()
    etcd.put(f"/reference/{number}", "done")
    return (time.perf_counter() - started_s) * 1000


def _client(servers: Servers) -> Any:
    host, port = servers.etcd.endpoint.rsplit(":", 1)
    return etcd3.client(host=host, port=int(port))


def _watch(etcd: Any, prefix: str) -> "tuple[queue.Queue[float], Any]":
    """Return a queue that gets the time of each change, once etcd watches, and the watch's id."""
    arrivals: queue.Queue[float] = queue.Queue()

    def changed(reply: Any) -> None:
        now_s = time.perf_counter()
        for _ in reply.events:
            arrivals.put(now_s)

    return arrivals, etcd.add_watch_prefix_callback(prefix, changed)


@contextmanager
def _idle_service(servers: Servers, subject: Subject) -> Iterator[Any]:
    """Run the service with an empty queue and give a channel once it consumes."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as logs:
        child = subject.child(Path(logs))
        connection = pika.BlockingConnection(pika.URLParameters(servers.rabbitmq.url))
        channel = connection.channel()
        subject.declare(channel)

        def consuming() -> None:
            declared = channel.queue_declare(subject.queue, passive=True).method
            assert declared.consumer_count, f"{subject.name} does not consume: {child.output()}"

        child.start()
        try:
            eventually(consuming)
            yield channel
        finally:
            child.terminate(_LOST_AFTER_S)
            connection.close()
            Broker(servers.rabbitmq).delete_queues(subject.queue, _REFERENCE)
            Records(servers.etcd).clear()
