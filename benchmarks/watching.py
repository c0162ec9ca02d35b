"""A service that waits for events, and a watch that tells when each has been recorded."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import etcd3
import pika

from harness.broker import Broker
from harness.servers import Servers
from harness.wait import eventually

from .records import Records
from .subjects import Subject

_STOP_WITHIN_S = 15.0


@contextmanager
def etcd_client(servers: Servers) -> Iterator[Any]:
    """Give a client of etcd3's own."""
    host, port = servers.etcd.endpoint.rsplit(":", 1)
    client = etcd3.client(host=host, port=int(port))
    try:
        yield client
    finally:
        client.close()


@contextmanager
def watch(etcd: Any, prefix: str, changed: Callable[[float, Sequence[bytes]], None]
          ) -> Iterator[None]:
    """Watch the keys below a prefix while the block runs.

    `changed` is called on the client's thread with the time, on the monotonic clock, and the keys
    that one answer brought. Watching has begun when the block begins.
    """

    def took(answer: Any) -> None:
        changed(time.monotonic(), [event.key for event in answer.events])

    watch_id = etcd.add_watch_prefix_callback(prefix, took)
    try:
        yield
    finally:
        etcd.cancel_watch(watch_id)


@contextmanager
def waiting_service(servers: Servers, subject: Subject) -> Iterator[Any]:
    """Run the service with an empty queue, and give a channel once it consumes."""
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
            child.terminate(_STOP_WITHIN_S)
            connection.close()
            Broker(servers.rabbitmq).delete_queues(subject.queue)
            Records(servers.etcd).clear()
