"""How fast events are consumed, calls made and events published; a backlog with more replicas."""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from chaos.checks import becomes
from servers.wait import eventually

from . import subjects
from .figures import Table, add_shares, ratio
from .publishers import new_events, pour
from .sites import Site, cpu_s, follow, outcome, rate
from .subjects import CALLS, CEILING, CONSUMERS, DUPLICATES, SWEEP, Calls, Subject

_SLOTS, _CLIENT = 0.9, 0.6
"""Calls to a slow receiver reach so much of what the slots allow, or of the client alone."""
BOUND = f"({_SLOTS:g} of the slots or {_CLIENT:g} of the client alone)"
OF_CLIENT, OF_SLOTS = "of the client alone", "of what the slots allow"
OF_BOUND = f"of {BOUND}"

_SWEEP_ROUNDS = 3
"""At most: it is for a picture."""
_COSTS_MS = {0: 60_000, 1: 12_000, 10: 2_000}
"""What a handler takes, and how many events are worked off: about as long, by one replica."""
_REPLICAS, _WORKED_OFF_S = (1, 2, 3), 300.0
_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


class Asked(NamedTuple):
    """How much to measure."""

    rounds: int
    events: int
    sizes: Sequence[int]
    minutes: float
    say: Callable[[str], None]


Run = Callable[[], dict[str, dict[str, Any]]]
"""Measures once: figures by row and column."""


def rounds(site: Site, asked: Asked, runs: Sequence[Run]) -> dict[str, dict[str, list[Any]]]:
    """Run everything once a round, so that all meet the same machine, and empty etcd in between.

    Each round begins with another run: what the one before leaves behind (a warm page cache, a
    broker that still writes) shall not always meet the same one.
    """
    table: dict[str, dict[str, list[Any]]] = {}
    for number in range(asked.rounds):
        turn = number % len(runs)
        for run in (*runs[turn:], *runs[:turn]):
            for row, figures in run().items():
                for column, value in figures.items():
                    table.setdefault(row, {}).setdefault(column, []).append(value)
                told = (f"{v:,.6g} {name}" for name, v in figures.items() if isinstance(v, float))
                asked.say(f"round {number + 1} of {asked.rounds}: {row}: {', '.join(told)}")
            site.clear()
    return table


def consuming(site: Site, asked: Asked) -> list[Table]:
    """Measure each consumer beside the ceiling."""
    runs = [partial(_consume, site, subject, asked.events) for subject in CONSUMERS]
    return [add_shares(rounds(site, asked, runs), CEILING.name, "of the ceiling")]


def batches(site: Site, asked: Asked) -> list[Table]:
    """Measure services by their batch size."""
    swept = (subject for pair in SWEEP.values() for subject in pair)
    runs = [partial(_consume, site, subject, asked.events) for subject in (CEILING, *swept)]
    few = asked._replace(rounds=min(asked.rounds, _SWEEP_ROUNDS))
    return [add_shares(rounds(site, few, runs), CEILING.name, "of the ceiling")]


def _consume(site: Site, subject: Subject, events: int) -> dict[str, dict[str, float]]:
    """Preload the subject's queue, let it consume everything, and check what it has recorded."""
    bodies, recorded = subject.series(events // subject.one_in)
    with site.queue(subject) as channel:
        site.preload(subject.queue, bodies)
        with site.run(subject) as child:
            seen = follow(channel, subject.queue, child)
            for prefix in subject.records:
                # The queue is empty before the last batches are recorded.
                becomes(partial(site.keys.count, prefix), recorded)
    if subject.order == "the whole series twice":
        return {
            subject.name: rate(seen, recorded, behind=recorded, prefetch=subject.prefetch),
            DUPLICATES: rate(seen, recorded, prefetch=subject.prefetch),
        }
    return {subject.name: rate(seen, len(bodies), prefetch=subject.prefetch)}


def calling(site: Site, asked: Asked) -> list[Table]:
    """Measure services that make a call for each event, beside their clients alone."""
    with site.start(("benchmarks.calls", "receiver"), {}) as receiver:

        def url() -> str:
            said = receiver.output()
            assert said.endswith("\n"), f"the receiver does not listen: {said}"
            return said.strip()

        receiver_url = eventually(url)
        runs: list[Run] = []
        for calls in CALLS:
            subject = calls.subject(receiver_url)
            # Calls are slow. What leaves the queue before the first ack does not count.
            runs.append(partial(_consume, site, subject, subject.prefetch + asked.events // 4))
            runs.append(partial(_call_alone, receiver_url, calls))
        table = rounds(site, asked, runs)
    return [add_call_shares(table)]


def add_call_shares(table: Table) -> Table:
    """Add what the calls reach of their client alone, and of what their slots allow."""
    for calls in CALLS:
        row = table[calls.name]
        client = row[OF_CLIENT] = ratio(row["events/s"], row["client alone, calls/s"])
        if not calls.answer_ms:
            continue
        most = 1000 * calls.at_once / calls.answer_ms
        slots = row[OF_SLOTS] = [each / most for each in row["events/s"]]
        if calls.answer_ms == 100:
            row[OF_BOUND] = [max(median(slots) / _SLOTS, median(client) / _CLIENT)]
    return table


def _call_alone(receiver_url: str, calls: Calls) -> dict[str, dict[str, float]]:
    """Let a process make these calls by the client alone; raises CommandFailedError."""
    number = max(10_000, 20 * calls.at_once)  # To connect is a small part of so many.
    url, at_once = f"{receiver_url}/{calls.answer_ms}", str(calls.at_once)
    told = outcome("benchmarks.calls", calls.kind, url, at_once, str(number))
    return {calls.name: {"client alone, calls/s": told["events/s"]}}


def publishing(site: Site, asked: Asked) -> list[Table]:
    """Measure the library's producer beside pika without confirms."""
    runs = [partial(_publish, site, name, asked.events) for name in subjects.PUBLISHERS]
    return [
        add_shares(rounds(site, asked, runs), subjects.UNCONFIRMED, f"of {subjects.UNCONFIRMED}")
    ]


def _publish(site: Site, name: str, events: int) -> dict[str, dict[str, float]]:
    """Let a publisher fill an empty quorum queue, and see that the broker has everything."""
    with site.queue(subjects.BARE):
        told = outcome("benchmarks.publishers", subjects.PUBLISHERS[name], site.url, str(events))
        becomes(partial(site.broker.ready, subjects.BARE.queue), events)
    return {name: told}


def replicas(site: Site, asked: Asked) -> list[Table]:
    """Let 1, 2 and 3 replicas work off a backlog, with handlers that wait for so long."""
    runs = [
        partial(_work_off, site, number, cost_ms, events)
        for cost_ms, events in _COSTS_MS.items()
        for number in _REPLICAS
    ]
    return [rounds(site, asked, runs)]


def _work_off(site: Site, number: int, cost_ms: int, events: int) -> dict[str, dict[str, float]]:
    subject = Subject("order", "order", {"BATCH_SIZE": "512", "HANDLER_MS": str(cost_ms)})
    with site.queue(subject), ExitStack() as stack:
        running = [stack.enter_context(site.run(subject)) for _ in range(number)]
        for replica in running:
            replica.wait_ready()
            replica.pause()
        pour(site.url, subject.queue, new_events(events))
        before_s, busy_s = time.monotonic(), _busy_s()
        used_s = [cpu_s(replica.pid) for replica in running]
        for replica in running:
            replica.resume()
        becomes(partial(site.keys.count, subject.records[0]), events, _WORKED_OFF_S)
        took_s, busy_s = time.monotonic() - before_s, _busy_s() - busy_s
        used_s = [cpu_s(one.pid) - before for one, before in zip(running, used_s, strict=True)]
        eventually(partial(site.broker.assert_drained, subject.queue))
    figures = {
        "events/s": events / took_s,
        "cores, the busiest replica": max(used_s) / took_s,
        "share of its time in the handler": events / took_s / number * cost_ms / 1000,
        f"cores of {os.cpu_count()}, all processes": busy_s / took_s,
    }
    return {f"{cost_ms} ms, {number} replica{'s' if number > 1 else ''}": figures}


def _busy_s() -> float:
    """Return the processor time that was not idle on any core since the start (proc_stat(5))."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    return (sum(map(int, fields[:8])) - int(fields[3]) - int(fields[4])) / _TICKS_A_SECOND
