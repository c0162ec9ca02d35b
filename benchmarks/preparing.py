"""What stands around a run: a queue and a process before it, clean servers after it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pika

from harness.broker import Broker
from harness.process import Child
from harness.servers import Servers
from harness.wait import eventually

from .records import Records
from .subjects import Subject


@contextmanager
def channel(servers: Servers) -> Iterator[Any]:
    """Give a channel of pika's, on a connection of its own."""
    connection = pika.BlockingConnection(pika.URLParameters(servers.rabbitmq.url))
    try:
        yield connection.channel()
    finally:
        connection.close()


@contextmanager
def prepared(servers: Servers, subject: Subject) -> Iterator[tuple[Any, Child]]:
    """Give a channel and the consumer, not started; end it and clear both servers afterwards."""
    try:
        with channel(servers) as declaring, subject.process() as child:
            subject.declare(declaring)
            yield declaring, child
    finally:
        Broker(servers.rabbitmq).delete_queues(subject.queue)
        Records(servers.etcd).clear()


@contextmanager
def waiting_service(servers: Servers, subject: Subject) -> Iterator[Any]:
    """Run the service with an empty queue, and give a channel once it consumes."""
    with prepared(servers, subject) as (declaring, child):

        def consuming() -> None:
            declared = declaring.queue_declare(subject.queue, passive=True).method
            assert declared.consumer_count, f"{subject.name} does not consume: {child.output()}"

        child.start()
        eventually(consuming)
        yield declaring
