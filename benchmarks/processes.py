"""The processes of a run: those that tell in the end what they took, and consumers, watched.

How fast a consumer works is seen from the broker. Its count of ready messages is exact at every
instant (a passive declare asks the queue's leader; the management API's figures are seconds old).
While a consumer's prefetch window is full, each ack lets one more message out, so the count falls
exactly as fast as acks arrive. That treats every consumer alike: nothing is added to any of them,
the question costs the same for all, and an ack is what all of them have in common (a subject that
records acks only what is recorded, and its records are counted afterwards).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from servers.processes import Child
from servers.servers import REPOSITORY
from servers.services import environment

from .results import NotMeasuredError, Rate

_ENDS_WITHIN_S = 30.0
_LOOK_EVERY_S = 0.01
_STALLED_AFTER_S = 30.0
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@contextmanager
def process(
    command: Sequence[str], settings: Mapping[str, str] | None = None, directory: Path = REPOSITORY
) -> Iterator[Child]:
    """Give the process of a module with its arguments, not started; it is ended afterwards.

    No setting of the calling shell reaches it.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as logs:
        env = {**environment(), **(settings or {})}
        log = Path(logs) / "process.log"
        child = Child([sys.executable, "-m", *command], env=env, cwd=directory, log=log)
        try:
            yield child
        finally:
            if child.running:
                child.terminate(_ENDS_WITHIN_S)


def outcome(*command: str, within_s: float = 60.0) -> dict[str, float]:
    """Run a module to its end, and return what it told; raises NotMeasuredError."""
    arguments = [sys.executable, "-m", *command]
    try:
        ended = subprocess.run(
            arguments, cwd=REPOSITORY, capture_output=True, text=True, timeout=within_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise NotMeasuredError(str(error)) from None
    if ended.returncode:
        what = f"{' '.join(command)} ended with exit code {ended.returncode}"
        raise NotMeasuredError(f"{what}:\n{ended.stderr[-2000:]}")
    told: dict[str, float] = json.loads(ended.stdout)
    return told


def tell(**fields: float) -> None:
    """Print the outcome; to be called once, by the process that is measured."""
    print(json.dumps(fields))


@contextmanager
def timed(events: int) -> Iterator[None]:
    """Tell how long the block takes over so many events, and what CPU time each of them costs."""
    started_s, cpu_s = time.monotonic(), time.process_time()
    yield
    took_s = time.monotonic() - started_s
    tell(events_per_s=events / took_s, cpu_us=(time.process_time() - cpu_s) / events * 1e6)


class Progress(NamedTuple):
    """How many messages were ready at a time, and what CPU time the consumer had used."""

    at_s: float
    ready: int
    cpu_s: float


def follow(channel: Any, queue: str, child: Child) -> list[Progress]:
    """Watch a queue until it is empty; raises NotMeasuredError if its consumer ends or stalls."""
    seen: list[Progress] = []
    moved_s = time.perf_counter()
    while not seen or seen[-1].ready:
        ready: int = channel.queue_declare(queue, passive=True).method.message_count
        now_s = time.perf_counter()
        if not seen or ready != seen[-1].ready:
            moved_s = now_s
        if not child.running or now_s - moved_s > _STALLED_AFTER_S:
            what = "stalled" if child.running else "its consumer ended"
            raise NotMeasuredError(f"{queue}: {what} at {ready}:\n{child.output()[-2000:]}")
        seen.append(Progress(now_s, ready, cpu_s(child.pid)))
        time.sleep(_LOOK_EVERY_S)
    return seen


def rate(seen: Sequence[Progress], events: int, behind: int = 0, prefetch: int = 0) -> Rate:
    """Return the rate over a series of `events`, with `behind` more messages queued behind it.

    The outer tenths are left out: the first holds the start of the process and the filling of the
    window (`prefetch` events leave the queue before an ack has let any out), the last its emptying.
    From the first fall inside to the last: a consumer that acks hundreds at a time makes a
    staircase, whose steps are exact at their edges alone.
    """
    trim = events // 10
    most, least = behind + events - max(trim, prefetch), behind + trim
    inside = [
        now
        for before, now in pairwise(seen)
        if least <= now.ready < most and now.ready != before.ready
    ]
    if len(inside) < 2:
        raise NotMeasuredError("too few events to measure: raise --events")
    first, last = inside[0], inside[-1]
    done = first.ready - last.ready
    return Rate(done / (last.at_s - first.at_s), (last.cpu_s - first.cpu_s) / done * 1e6)


def cpu_s(pid: int) -> float:
    """Return the CPU time of a process with all its threads (proc(5), fields utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S
