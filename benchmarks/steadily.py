"""A service at full rate for a while, what it and etcd need meanwhile, and what is left of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from harness.broker import Broker
from harness.process import Child, resident_bytes
from harness.servers import Servers
from harness.wait import eventually

from .gauges import Gauges, read_gauges
from .outcome import run_module
from .progress import NotMeasuredError
from .startup import wait_imported
from .subjects import Subject

SAMPLE_EVERY_S = 5.0

_FILLER_STOPS_WITHIN_S = 30.0
_DRAINED_WITHIN_S = 60.0
_INCARNATION = 1
"""The one key that a service writes beside its records."""


class Sample(NamedTuple):
    """What was seen at one time, in seconds since the load began. ``memory`` is the service's."""

    at_s: float
    memory: int
    ready: int
    etcd: Gauges


class Emptied(NamedTuple):
    """What became of it without load: when the last record went, when its space was free."""

    gone_s: float
    freed_s: float
    etcd: Gauges


class Run(NamedTuple):
    """The samples under load, how many events were published and recorded, and the end."""

    samples: Sequence[Sample]
    published: int
    recorded: int
    emptied: Emptied


def run(servers: Servers, subject: Subject, load_s: float, empty_within_s: float) -> Run:
    """Keep the service at full rate, stop the load, and wait until etcd is empty again.

    The subject's queue must be there. Raises AssertionError if what was published is not
    recorded, or etcd not empty in time.
    """
    with subject.process() as child:
        child.start()
        wait_imported(child)
        before = read_gauges(servers.etcd)
        with run_module("benchmarks.filling", servers.rabbitmq.url, subject.queue) as filler:
            samples = list(_watch(servers, subject.queue, child, filler, load_s))
            filler.terminate(_FILLER_STOPS_WITHIN_S)
            published = int(filler.output())

        def all_recorded() -> int:
            recorded = read_gauges(servers.etcd).written - before.written
            if recorded != published:
                raise AssertionError(f"{recorded} recorded of {published} published")
            return recorded

        recorded = eventually(all_recorded, _DRAINED_WITHIN_S, interval_s=0.5)
        emptied = _wait_empty(servers, samples[-1].etcd.used, empty_within_s)
    return Run(samples, published, recorded, emptied)


def _watch(
    servers: Servers, queue: str, child: Child, filler: Child, load_s: float
) -> Iterator[Sample]:
    broker, started_s = Broker(servers.rabbitmq), time.monotonic()
    while (at_s := time.monotonic() - started_s) <= load_s:
        for each in (child, filler):
            if not each.running:
                raise NotMeasuredError(f"{each.command} ended:\n{each.output()[-2000:]}")
        yield Sample(
            at_s, resident_bytes(child.pid), broker.ready(queue), read_gauges(servers.etcd)
        )
        time.sleep(max(0.0, started_s + at_s + SAMPLE_EVERY_S - time.monotonic()))


def _wait_empty(servers: Servers, used: int, within_s: float) -> Emptied:
    """Wait until no record is left, and then until its space is free again, all but a fiftieth."""
    drained_s = time.monotonic()

    def seconds_until(true: Callable[[Gauges], bool]) -> float:
        def holds() -> float:
            if not true(found := read_gauges(servers.etcd)):
                raise AssertionError(f"etcd is not empty: {found}")
            return time.monotonic() - drained_s

        return eventually(holds, within_s, interval_s=0.5)

    gone_s = seconds_until(lambda found: found.keys <= _INCARNATION)
    freed_s = seconds_until(lambda found: found.used <= used / 50)
    return Emptied(gone_s, freed_s, read_gauges(servers.etcd))
