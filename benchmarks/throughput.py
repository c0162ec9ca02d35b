"""How fast events are consumed, calls made and events published; a backlog with more replicas."""

import os
import random
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median

from chaos.checks import becomes, says
from servers.servers import Servers
from servers.wait import eventually

from . import runner
from .programs import new_events
from .report import Mark, Table, ratio
from .runner import BARE, Run, Scenario, Site, Subject, in_rounds, program, service

CEILING = program("ceiling: pika alone", "ceiling", PREFETCH=str(BARE.prefetch))
# One event is in flight at a time: a larger prefetch would only fill the outer tenths.
NAIVE = program("naive: one txn, one ack each", "naive", PREFETCH="100")
_NAIVE_GETS_ONE_IN = 20
# 128 is what etcd allows unless told otherwise, and the services' own default.
BARE_SMALL, ORDER_SMALL = service("bare", 128, 128), service("order", 128, 128)
ORDER = service("order")
HALF, DUPLICATES = BARE._replace(name="half duplicates"), "duplicates, cache warm"
CONSUMERS = (CEILING, NAIVE, BARE, BARE_SMALL, ORDER, ORDER_SMALL, HALF)
SWEEP = {n: (service("bare", n), service("order", n)) for n in (16, 32, 64, 128, 256, 512)}
"""By batch size, without and with an effect: with one, 512 events fill etcd's 1,024 operations."""
LEAST_EVENTS = 4 * BARE.prefetch
"""The first prefetch window does not count, nor do the outer tenths: half of it has to be left."""

CALLS = {
    f"{kind}, {answer_ms} ms, {at_once:,} at once": (kind, answer_ms, at_once)
    for answer_ms in (0, 10, 100)
    for kind in ("coroutine", "plain")
    for at_once in (100, 1000)
}
"""Calls by `notify`, a coroutine on aiohttp, or a plain handler on urllib3; when the receiver
answers; and how many are made at once."""
_SLOTS, _CLIENT = 0.9, 0.6
"""Calls to a slow receiver reach so much of what the slots allow, or of the client alone."""
_BOUND = f"({_SLOTS:g} of the slots or {_CLIENT:g} of the client alone)"
_OF_CLIENT, _OF_SLOTS, _OF_BOUND = "of the client alone", "of what the slots allow", f"of {_BOUND}"
UNCONFIRMED, CONFIRMED = "pika without confirms", "library, all confirmed"

_COSTS_MS = {0: 60_000, 1: 12_000, 10: 2_000}
"""What a handler takes, and how many events are worked off: about as long, by one replica."""
_WORKED_OFF_S = 300.0


def series(subject: Subject, length: int) -> list[bytes]:
    """Return the bodies of a series.

    `BARE` gets it twice: the second time it consists of duplicates of what the same process has
    just recorded, so the cache is as warm as can be, with no restart and no import in between.
    `HALF` gets half of it, each event twice, shuffled, in the same order in each run.
    """
    if subject is HALF:
        bodies = 2 * new_events(length // 2)
        random.Random(4).shuffle(bodies)
        return bodies
    bodies = new_events(length // _NAIVE_GETS_ONE_IN if subject is NAIVE else length)
    return 2 * bodies if subject is BARE else bodies


def _consume(site: Site, subject: Subject, length: int) -> dict[str, dict[str, float]]:
    """Preload the subject's queue, let it consume everything, and check what it has recorded."""
    bodies = series(subject, length)
    events = len(set(bodies))
    with site.queue(subject) as channel:
        site.preload(subject, bodies)
        with site.run(subject) as child:
            seen = runner.follow(channel, subject.queue, child)
            # The queue is empty before the last batches are recorded.
            if subject is not CEILING:
                site.wait_recorded(subject, events)
            if subject.command == ORDER.command:
                becomes(partial(site.keys.count, "/orders/"), events)
    rate = partial(runner.rate, seen, prefetch=subject.prefetch)
    if subject is BARE:
        return {subject.name: rate(events, behind=events), DUPLICATES: rate(events)}
    return {subject.name: rate(len(bodies))}


def _shares(table: Table, reference: str, column: str) -> list[Table]:
    """Add to each row its events/s over those of a reference row."""
    for row in table.values():
        row[column] = ratio(row["events/s"], table[reference]["events/s"])
    return [table]


def _consuming(
    site: Site, asked: Namespace, subjects: Sequence[Subject] = CONSUMERS, most_rounds: int = 0
) -> list[Table]:
    runs = [partial(_consume, site, subject, asked.events) for subject in subjects]
    rounds = min(asked.rounds, most_rounds or asked.rounds)
    return _shares(in_rounds(site, rounds, runs), CEILING.name, "of the ceiling")


def _calling(site: Site, asked: Namespace) -> list[Table]:
    with site.run(program("", "receiver")) as receiver:
        listening, *_ = eventually(partial(says, receiver, "listening"))
        runs: list[Run] = []
        for name, (kind, answer_ms, at_once) in CALLS.items():
            url = f"http://127.0.0.1:{listening['port']}/{answer_ms}"
            settings = {**BARE.settings, "CALLS_AT_ONCE": str(at_once), "NOTIFY_URL": url}
            subject = program(name, "plain", **settings)
            if kind == "coroutine":
                subject = subject._replace(queue="notify", command=("notify",))
            # Calls are slow. What leaves the queue before the first ack does not count.
            runs.append(partial(_consume, site, subject, subject.prefetch + asked.events // 4))
            runs.append(partial(_call_alone, name, f"{kind}_client", url, at_once))
        return [add_call_shares(in_rounds(site, asked.rounds, runs))]


def _call_alone(name: str, client: str, url: str, at_once: int) -> dict[str, dict[str, float]]:
    """Let a process make these calls by the client alone; raises CommandFailedError."""
    # To connect is a small part of so many.
    told = runner.outcome(client, url, at_once, max(10_000, 20 * at_once))
    return {name: {"client alone, calls/s": told["events/s"]}}


def add_call_shares(table: Table) -> Table:
    """Add what the calls reach of their client alone, and of what their slots allow."""
    for name, (_, answer_ms, at_once) in CALLS.items():
        row = table[name]
        client = row[_OF_CLIENT] = ratio(row["events/s"], row["client alone, calls/s"])
        if answer_ms:
            slots = row[_OF_SLOTS] = [each * answer_ms / 1000 / at_once for each in row["events/s"]]
            if answer_ms == 100:
                row[_OF_BOUND] = [max(median(slots) / _SLOTS, median(client) / _CLIENT)]
    return table


def _publishing(site: Site, asked: Namespace) -> list[Table]:
    publishers = {UNCONFIRMED: "unconfirmed", CONFIRMED: "library"}
    runs = [partial(_publish, site, *each, asked.events) for each in publishers.items()]
    return _shares(in_rounds(site, asked.rounds, runs), UNCONFIRMED, f"of {UNCONFIRMED}")


def _publish(site: Site, name: str, publisher: str, events: int) -> dict[str, dict[str, float]]:
    """Let a publisher fill an empty quorum queue, and see that the broker has everything."""
    with site.queue(BARE):
        told = runner.outcome(publisher, site.url, events)
        becomes(partial(site.broker.ready, BARE.queue), events)
    return {name: told}


def _replicas(site: Site, asked: Namespace) -> list[Table]:
    runs = [
        partial(_work_off, site, number, cost_ms, events)
        for cost_ms, events in _COSTS_MS.items()
        for number in (1, 2, 3)
    ]
    return [in_rounds(site, asked.rounds, runs)]


def _work_off(site: Site, number: int, cost_ms: int, events: int) -> dict[str, dict[str, float]]:
    """Let so many replicas, which have started, work off a backlog."""
    subject = program("", "order", BATCH_SIZE="512", HANDLER_MS=str(cost_ms))
    with site.queue(subject), ExitStack() as stack:
        running = [stack.enter_context(site.run(subject)) for _ in range(number)]
        for replica in running:
            replica.wait_ready()
            replica.pause()
        site.publish(subject, new_events(events))

        def used() -> list[float]:
            return [time.monotonic(), _busy_s(), *(runner.cpu_s(each.pid) for each in running)]

        before = used()
        for replica in running:
            replica.resume()
        site.wait_recorded(subject, events, _WORKED_OFF_S)
        took_s, busy_s, *used_s = (now - s for now, s in zip(used(), before, strict=True))
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
    user, nice, system, _idle, _waiting, *others = Path("/proc/stat").read_text().split()[1:9]
    return sum(map(int, (user, nice, system, *others))) / runner.TICKS_A_SECOND


def _cluster() -> AbstractContextManager[Servers]:
    # Imported here: a machine without Docker has not all that this needs.
    from cluster.cluster import start_cluster

    return start_cluster()


_ENOUGH = {
    ("durable, no effect / ceiling", BARE.name): "at least 0.6",
    ("durable, one effect / ceiling", ORDER.name): "at least 0.5",
    ("durable, no effect / ceiling, 128 operations", BARE_SMALL.name): "at least 0.45",
    ("durable, one effect / ceiling, 128 operations", ORDER_SMALL.name): "at least 0.35",
    ("half duplicates / ceiling", HALF.name): "",
    ("all duplicates, cache warm / ceiling", DUPLICATES): "at least 0.7",
}
"""What is to be reached of the ceiling, by the name of the mark and its row."""
_TO_NAIVE, _TO_PIKA = "durable, no effect / naive", "confirmed publishing / pika without confirms"


def _called(what: str, column: str, to_ms: Sequence[int], target: str = "") -> list[Mark]:
    return [
        Mark(f"calls / {what}: {name}", name, column, target=target, kept=column != _OF_BOUND)
        for name, (_, answer_ms, _) in CALLS.items()
        if answer_ms in to_ms
    ]


SCENARIOS = {
    "consuming": Scenario(
        ("Consuming",),
        "A consumer works off a full queue: pika alone (the ceiling), a transaction and an ack for "
        "each event (the naive way), or a service. Its rate is that of its acks, the CPU time is "
        "of its process. The two numbers of a service are `ETCD_MAX_TXN_OPS` and `BATCH_SIZE`. Of "
        "duplicates, deliveries count.",
        _consuming,
        (
            *(
                Mark(name, row, "events/s", CEILING.name, target, kept=True)
                for (name, row), target in _ENOUGH.items()
            ),
            Mark(_TO_NAIVE, BARE.name, "events/s", NAIVE.name, "at least 25", kept=True),
        ),
    ),
    "calls": Scenario(
        ("Calls",),
        "A service makes a call for each event, under its claim, to a receiver that answers after "
        "so long, at most `CALLS_AT_ONCE` at once. `notify` is the coroutine, on aiohttp; the "
        "plain handler runs on threads, on urllib3. The client alone makes the same calls without "
        "a broker and etcd, as many at once.",
        _calling,
        (
            *_called("client alone", _OF_CLIENT, (0,), "at least 0.4"),
            *_called("client alone", _OF_CLIENT, (10, 100)),
            *_called("what the slots allow", _OF_SLOTS, (10, 100)),
            *_called(_BOUND, _OF_BOUND, (100,), "at least 1"),
        ),
    ),
    "publishing": Scenario(
        ("Publishing",),
        "The library's producer, or pika without confirms, publishes to an empty queue.",
        _publishing,
        (Mark(_TO_PIKA, CONFIRMED, "events/s", UNCONFIRMED, "at least 0.6", kept=True),),
    ),
    "batches": Scenario(
        ("Batch size",),
        "Services work off a full queue with `ETCD_MAX_TXN_OPS=1024` and each `BATCH_SIZE`, "
        "without and with an effect, beside the ceiling; at most three rounds.",
        partial(_consuming, subjects=(CEILING, *chain(*SWEEP.values())), most_rounds=3),
    ),
    "replicas": Scenario(
        ("Replicas",),
        "On the cluster of three nodes each, 1, 2 and 3 replicas work off a backlog with a handler "
        "that waits for so long. A replica's core, its handler or the machine is the limit if it "
        "is in use nearly all of the time.",
        _replicas,
        rounds=3,
        events=0,
        servers=_cluster,
    ),
}
