"""One run of one subject, and the rounds of all."""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pika

from harness.broker import Broker
from harness.process import Child
from harness.servers import Servers
from harness.wait import eventually

from .loading import Loader, new_events
from .progress import Rate, follow, rate
from .records import Records
from .subjects import DUPLICATES, Subject

Rates = dict[str, Rate]

_STOP_WITHIN_S = 15.0


def run_rounds(servers: Servers, subjects: Sequence[Subject], rounds: int, events: int
               ) -> list[Rates]:
    """Run every subject once a round.

    Each round begins with another subject: what the one before leaves behind (a warm page cache,
    a broker that still writes) shall not always meet the same one.
    """
    results = []
    for number in range(rounds):
        turn = number % len(subjects)
        rates: Rates = {}
        for subject in (*subjects[turn:], *subjects[:turn]):
            for name, found in run_once(servers, subject, events).items():
                rates[name] = found
                print(f"round {number + 1}: {name:30} {found.events_per_s:9,.0f}/s",
                      file=sys.stderr)
        results.append(rates)
    return results


def run_once(servers: Servers, subject: Subject, events: int) -> Rates:
    """Preload the subject's queue, let it consume everything, and check what it has recorded."""
    number = events // 20 if subject.slow else events
    bodies = new_events(number)
    with _prepared(servers, subject) as (channel, child):
        Loader(servers.rabbitmq.url, subject.queue, bodies * (2 if subject.repeated else 1)).run()
        child.start()
        samples = follow(channel, subject.queue, child)
        records = Records(servers.etcd)
        for prefix in subject.records:
            # The queue is empty before the last batches are recorded.
            eventually(partial(records.require, prefix, number))
    if subject.repeated:
        return {
            subject.name: rate(samples, number, behind=number),
            DUPLICATES: rate(samples, number),
        }
    return {subject.name: rate(samples, number)}


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
