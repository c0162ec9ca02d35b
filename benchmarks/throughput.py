"""One run of one consumer, from a full queue to an empty one."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pika

from harness.broker import Broker
from harness.process import Child
from harness.servers import Servers
from harness.wait import eventually

from .loading import Loader, Mix, series
from .outcome import outcome
from .progress import Rate, Rates, follow, rate
from .records import Records
from .subjects import DUPLICATES, Subject

_STOP_WITHIN_S = 15.0
_ENDS_WITHIN_S = 60.0


def run_once(servers: Servers, subject: Subject, events: int) -> Rates:
    """Preload the subject's queue, let it consume everything, and check what it has recorded."""
    bodies, recorded = series(subject.mix, events // subject.one_in)
    with _prepared(servers, subject) as (channel, child):
        Loader(servers.rabbitmq.url, subject.queue, bodies).run()
        child.start()
        if not subject.prefetch:
            return {subject.name: Rate(**outcome(child, _ENDS_WITHIN_S))}
        samples = follow(channel, subject.queue, child)
        records = Records(servers.etcd)
        for prefix in subject.records:
            # The queue is empty before the last batches are recorded.
            eventually(partial(records.require, prefix, recorded))
    prefetch = subject.prefetch
    if subject.mix is Mix.REPEATED:
        return {
            subject.name: rate(samples, recorded, behind=recorded, prefetch=prefetch),
            DUPLICATES: rate(samples, recorded, prefetch=prefetch),
        }
    return {subject.name: rate(samples, len(bodies), prefetch=prefetch)}


@contextmanager
def _prepared(servers: Servers, subject: Subject) -> Iterator[tuple[Any, Child]]:
    """Give a channel and the consumer, not started; end it and clear both servers afterwards."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as logs:
        child = subject.child(Path(logs))
        connection = pika.BlockingConnection(pika.URLParameters(servers.rabbitmq.url))
        channel = connection.channel()
        subject.declare(channel)
        try:
            yield channel, child
        finally:
            if child.running:
                child.terminate(_STOP_WITHIN_S)
            connection.close()
            Broker(servers.rabbitmq).delete_queues(subject.queue)
            Records(servers.etcd).clear()
