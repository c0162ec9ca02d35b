"""How fast a consumer works, seen from the broker.

The broker's count of ready messages is exact at every instant (a passive declare asks the
queue's leader; the management API's figures are seconds old). While a consumer's prefetch window
is full, each ack lets one more message out, so the count falls exactly as fast as acks arrive.
That treats every consumer alike: nothing is added to any of them, the question costs the same
for all, and an ack is what all of them have in common (a subject that records acks only what is
recorded, and its records are counted afterwards). Its own counters would come twice a second,
in runs that last a second; a watch on the records would cost some subjects CPU and not others.

The outer tenths of each series are left out: the first holds the start of the process and the
filling of the window, the last its emptying.
"""

import os
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from harness.process import Child

_EVERY_S = 0.01
_STALLED_AFTER_S = 30.0
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class NotMeasuredError(Exception):
    """The run gave no figure; the message says why."""


class Sample(NamedTuple):
    """How many messages were ready at a time, and what CPU time the consumer had used."""

    at_s: float
    ready: int
    cpu_s: float


class Rate(NamedTuple):
    """What one series of events gave."""

    events_per_s: float
    cpu_us: float


Rates = dict[str, Rate]
"""What one round gave, by the name of what was measured."""


def follow(channel: Any, queue: str, child: Child) -> list[Sample]:
    """Watch the queue until it is empty; raises NotMeasuredError if the consumer ends or stalls."""
    samples: list[Sample] = []
    moved_s = time.perf_counter()
    while not samples or samples[-1].ready:
        if not child.running:
            raise NotMeasuredError(f"{queue}: the consumer ended:\n{child.output()[-2000:]}")
        ready: int = channel.queue_declare(queue, passive=True).method.message_count
        now_s = time.perf_counter()
        if not samples or ready != samples[-1].ready:
            moved_s = now_s
        elif now_s - moved_s > _STALLED_AFTER_S:
            raise NotMeasuredError(f"{queue}: stalled at {ready}:\n{child.output()[-2000:]}")
        samples.append(Sample(now_s, ready, _cpu_s(child.pid)))
        time.sleep(_EVERY_S)
    return samples


def rate(samples: Sequence[Sample], events: int, behind: int = 0, prefetch: int = 0) -> Rate:
    """Return the rate over a series of `events`, with `behind` more messages queued behind it.

    The first `prefetch` of the series leave the queue before an ack has let any of them out.
    From the first fall inside to the last: a consumer that acks hundreds at a time makes a
    staircase, whose steps are exact at their edges alone.
    """
    trim = events // 10
    most, least = behind + events - max(trim, prefetch), behind + trim
    inside = [
        sample
        for before, sample in pairwise(samples)
        if least <= sample.ready < most and sample.ready != before.ready
    ]
    if len(inside) < 2:
        raise NotMeasuredError("too few events to measure: raise --events")
    first, last = inside[0], inside[-1]
    done = first.ready - last.ready
    return Rate(done / (last.at_s - first.at_s), (last.cpu_s - first.cpu_s) / done * 1e6)


def _cpu_s(pid: int) -> float:
    """Return the CPU time of a process with all its threads (proc(5), fields utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S
