"""How fast events are consumed, called for and published, and how soon they are recorded."""

import os
import random
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median

from chaos.checks import becomes, says
from servers.processes import TICKS_A_SECOND, cpu_s
from servers.wait import eventually

from . import runner
from .programs import PERSISTENT, new_events
from .report import Table, ratio
from .runner import BARE, LOST_AFTER_S, RECORDS, Figures, Site, Subject, service

CEILING = Subject("ceiling: pika alone", "ceiling", {"PREFETCH": str(BARE.prefetch)})
# It handles one event at a time: a larger prefetch would only fill the outer tenths.
NAIVE = Subject("naive: one txn, one ack each", "naive", {"PREFETCH": "100"})
_NAIVE_GETS_ONE_IN = 20
# 128 operations are the default of etcd and of the services.
BARE_SMALL, ORDER_SMALL = service("bare", 128, 128), service("order", 128, 128)
ORDER = service("order")
HALF, DUPLICATES = BARE._replace(name="half duplicates"), "duplicates, cache warm"
SWEEP = {n: (service("bare", n), service("order", n)) for n in (16, 32, 64, 128, 256, 512)}
"""By batch size, without and with an effect: 512 events with one are etcd's 1,024 operations."""
LEAST_EVENTS = 4 * BARE.prefetch
"""Without the first prefetch window and the outer tenths, half of them have to be left."""


def series(subject: Subject, length: int) -> list[bytes]:
    """Return the bodies of a series.

    `BARE` gets it twice. The second half are duplicates of what the same process has just recorded,
    so its cache is as warm as can be, without a restart and an import in between. `HALF` gets half
    as many events, each of them twice, shuffled in the same order each time.
    """
    if subject is HALF:
        bodies = 2 * new_events(length // 2)
        random.Random(4).shuffle(bodies)
        return bodies
    bodies = new_events(length // _NAIVE_GETS_ONE_IN if subject is NAIVE else length)
    return 2 * bodies if subject is BARE else bodies


def _consume(site: Site, subject: Subject, length: int) -> Figures:
    """Preload a queue, let its consumer empty it, and check what it has recorded."""
    bodies = series(subject, length)
    events = len(set(bodies))
    with site.queue(subject) as channel:
        site.publish(subject.queue, bodies, preload=True)
        with site.run(subject) as child:
            seen = runner.follow(channel, subject.queue, child)
            # The queue is empty before the last batches are recorded.
            if subject is not CEILING:
                site.wait_recorded(subject, events)
            if subject.queue == ORDER.queue:
                becomes(partial(site.keys.count, "/orders/"), events)
    rate = partial(runner.rate, seen, prefetch=subject.prefetch)
    if subject is BARE:
        return {subject.name: rate(events, behind=events), DUPLICATES: rate(events)}
    return {subject.name: rate(len(bodies))}


def _consumers(site: Site, asked: Namespace, rounds: int, subjects: Sequence[Subject]) -> Table:
    runs = [partial(_consume, site, subject, asked.events) for subject in subjects]
    return _share(runner.in_rounds(site, rounds, runs), CEILING.name, "of the ceiling")


def _share(table: Table, reference: str, column: str) -> Table:
    """Add a column: each row's events/s, divided by those of a reference row."""
    for row in table.values():
        row[column] = ratio(row["events/s"], table[reference]["events/s"])
    return table


def consuming(site: Site, asked: Namespace) -> list[Table]:
    subjects = (CEILING, NAIVE, BARE, BARE_SMALL, ORDER, ORDER_SMALL, HALF)
    return [_consumers(site, asked, asked.rounds, subjects)]


def batches(site: Site, asked: Namespace) -> list[Table]:
    return [_consumers(site, asked, min(asked.rounds, 3), (CEILING, *chain(*SWEEP.values())))]


CALLS = {
    f"{kind}, {answer_ms} ms, {at_once:,} at once": (kind, answer_ms, at_once)
    for answer_ms in (0, 10, 100)
    for kind in ("coroutine", "plain")
    for at_once in (100, 1000)
}
"""By name: the kind of handler, the receiver's latency, and the number of calls at once."""


def add_call_shares(table: Table) -> Table:
    """Add the ratios of the calls to those of the client alone, and to what their slots allow."""
    for name, (_, answer_ms, at_once) in CALLS.items():
        row = table[name]
        client = row["of the client alone"] = ratio(row["events/s"], row["client alone, calls/s"])
        if answer_ms:
            slots = [each * answer_ms / 1000 / at_once for each in row["events/s"]]
            row["of what the slots allow"] = slots
            if answer_ms == 100:
                lesser = max(median(slots) / 0.9, median(client) / 0.6)
                row["of (0.9 of the slots or 0.6 of the client alone)"] = [lesser]
    return table


def calls(site: Site, asked: Namespace) -> list[Table]:
    with site.run(Subject("", "receiver")) as receiver:
        listening, *_ = eventually(partial(says, receiver, "listening"))
        url = f"http://127.0.0.1:{listening['port']}"
        runs = [partial(_call, site, asked, url, name, *each) for name, each in CALLS.items()]
        return [add_call_shares(runner.in_rounds(site, asked.rounds, runs))]


def _call(
    site: Site, asked: Namespace, receiver: str, name: str, kind: str, answer_ms: int, at_once: int
) -> Figures:
    url = f"{receiver}/{answer_ms}"
    settings = {**BARE.settings, "CALLS_AT_ONCE": str(at_once), "NOTIFY_URL": url}
    subject = Subject(name, "notify" if kind == "coroutine" else "plain", settings)
    # Calls are slow, so there are fewer. The prefetch window does not count.
    found = _consume(site, subject, subject.prefetch + asked.events // 4)[name]
    # The time to connect is a small part of this many.
    alone = runner.outcome(f"{kind}_client", url, at_once, max(10_000, 20 * at_once))
    return {name: {**found, "client alone, calls/s": alone["events/s"]}}


def publishing(site: Site, asked: Namespace) -> list[Table]:
    def publish(name: str, publisher: str) -> Figures:
        with site.queue(BARE):
            told = runner.outcome(publisher, site.url, asked.events)
            becomes(partial(site.broker.ready, BARE.queue), asked.events)
        return {name: told}

    unconfirmed = "pika without confirms"
    publishers = {unconfirmed: "unconfirmed", "library, all confirmed": "library"}
    runs = [partial(publish, *each) for each in publishers.items()]
    return [_share(runner.in_rounds(site, asked.rounds, runs), unconfirmed, f"of {unconfirmed}")]


def replicas(site: Site, asked: Namespace) -> list[Table]:
    # By cost in ms: the number of events, for which one replica takes about the same time.
    backlogs = {0: 60_000, 1: 12_000, 10: 2_000}.items()
    runs = [partial(_work_off, site, n, *backlog) for backlog in backlogs for n in (1, 2, 3)]
    return [runner.in_rounds(site, asked.rounds, runs)]


def _work_off(site: Site, number: int, cost_ms: int, events: int) -> Figures:
    """Let replicas that have already started work off a backlog."""
    subject = Subject("", "bare", {"BATCH_SIZE": "512", "HANDLER_MS": str(cost_ms)})
    with site.queue(subject), ExitStack() as stack:
        running = [stack.enter_context(site.run(subject)) for _ in range(number)]
        for replica in running:
            replica.wait_ready()
            replica.pause()
        site.publish(subject.queue, new_events(events))

        def used() -> list[float]:
            return [time.monotonic(), _busy_s(), *(cpu_s(each.pid) for each in running)]

        before = used()
        for replica in running:
            replica.resume()
        site.wait_recorded(subject, events, within_s=300)
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
    """Return the busy time of all cores since the machine's start (proc_stat(5))."""
    user, nice, system, _idle, _waiting, *others = Path("/proc/stat").read_text().split()[1:9]
    return sum(map(int, (user, nice, system, *others))) / TICKS_A_SECOND


# How soon an event is recorded.

PER_MILLE = {"p50": 500, "p99": 990, "p99.9": 999}
"""The percentiles by name."""
_LOAD_S = {1: 21, 100: 6, 1_000: 6, 10_000: 6}
"""The length of a round by its events per second, with the first second, which does not count.

At 1/s, five rounds give the hundred samples that p99 needs."""
_REFERENCE = Subject("", "reference")
_SAMPLES, _WARM_UP_EVENTS, _WARM_UP_S = 200, 20, 1
"""The first event waits for a lease, and the first use of anything for its imports."""
_KEPT = 0.99
"""The part of its rate that a publisher has to reach, or the latencies would be its own."""


def idle(site: Site, _asked: Namespace) -> list[Table]:
    # In turns, so that all have the same conditions. The watch brings a record to this process, so
    # one clock measures both ends, and the way back counts against the service.
    samples: list[tuple[float, float, float]] = []
    delivered_s: list[float] = []
    with (
        site.queue(_REFERENCE) as channel,
        site.queue(BARE),
        site.run(BARE) as child,
        site.watch(RECORDS) as next_record,
    ):
        child.wait_ready()
        channel.basic_consume(
            _REFERENCE.queue, lambda *_: delivered_s.append(time.monotonic()), auto_ack=True
        )
        for event in new_events(_WARM_UP_EVENTS + _SAMPLES):
            sent_s = time.monotonic()
            channel.basic_publish("", BARE.queue, event, PERSISTENT)
            recorded_s = next_record()[1] - sent_s
            sent_s = time.monotonic()
            channel.basic_publish("", _REFERENCE.queue, event, PERSISTENT)
            while not delivered_s:
                channel.connection.process_data_events(time_limit=LOST_AFTER_S)
            consumed_s = delivered_s.pop() - sent_s
            sent_s = time.monotonic()
            site.etcd.put("/reference", "done")
            samples.append((recorded_s, consumed_s, time.monotonic() - sent_s))
            channel.connection.sleep(0.02)
    site.clear()
    return [steps_table(samples[_WARM_UP_EVENTS:])]


def steps_table(samples_s: Sequence[tuple[float, float, float]]) -> Table:
    """Return a row for each step, and for the two bare ones together."""
    steps = ("publish to recorded", "bare: publish to consumed", "bare: etcd put", "bare: both")
    in_ms = ([1000 * s for s in (*sample, sum(sample[1:]))] for sample in samples_s)
    return {
        step: {"median, ms": [median(ms)], "p99, ms": percentile(ms, 990), "least, ms": [min(ms)]}
        for step, ms in zip(steps, zip(*in_ms, strict=True), strict=True)
    }


def latency(site: Site, asked: Namespace) -> list[Table]:
    runs = [partial(_load, site, per_s) for per_s in _LOAD_S]
    rounds = runner.in_rounds(site, asked.rounds, runs)
    return [{f"{per_s:,}": summary(per_s, **rounds[f"{per_s:,}"]) for per_s in _LOAD_S}]


def _load(site: Site, per_s: int) -> Figures:
    """Publish at a rate for a round.

    The loop is open: a latency begins when its event is due, whatever happened to the earlier ones,
    so a stall counts in full. A closed loop would send fewer events then ("coordinated omission").
    """
    events = per_s * _LOAD_S[per_s]
    with site.queue(BARE), site.run(BARE) as child, site.watch(RECORDS) as next_record:
        child.wait_ready()
        told = runner.outcome("open_loop", site.url, BARE.queue, per_s, events)
        recorded_s = dict(next_record() for _ in range(events))
    by_number = {int(key.removeprefix(RECORDS)): at_s for key, at_s in recorded_s.items()}
    return {f"{per_s:,}": {"ms": latencies_ms(per_s, told.pop("start_s"), by_number), **told}}


def latencies_ms(per_s: int, start_s: float, recorded_s: Mapping[int, float]) -> list[float]:
    """Return the latency of each event from when it was due, without the first second's events."""
    return [
        1000 * (recorded_s[number] - start_s - number / per_s)
        for number in range(_WARM_UP_S * per_s, len(recorded_s))
    ]


def summary(
    per_s: int, ms: Sequence[Sequence[float]], late_ms: list[float], reached_per_s: list[float]
) -> dict[str, list[float]]:
    """Return a row for all rounds at a rate; without percentiles unless each has kept the rate."""
    slowest_per_s = min(reached_per_s)
    kept = slowest_per_s >= _KEPT * per_s
    return {
        "samples": [sum(map(len, ms))],
        **{f"{name}, ms": pooled(ms, n) if kept else [] for name, n in PER_MILLE.items()},
        "publisher late, ms": late_ms,
        "rate not kept, slowest": [] if kept else [slowest_per_s],
    }


def pooled(rounds: Sequence[Sequence[float]], per_mille: int) -> list[float]:
    """Return the percentile of all rounds together, and the least and greatest of the rounds.

    It always lies between these, so it is the median of the three. It is returned alone if a round
    has too few samples for a percentile of its own.
    """
    whole = percentile(list(chain(*rounds)), per_mille)
    own = [value for values in rounds for value in percentile(values, per_mille)]
    return [min(own), *whole, max(own)] if len(own) == len(rounds) else whole


def percentile(values: Sequence[float], per_mille: int) -> list[float]:
    """Return the value that so many of a thousand samples do not exceed.

    There is none if no sample could exceed it: the p99.9 of less than a thousand samples would only
    be another name for the greatest.
    """
    if len(values) * (1000 - per_mille) < 1000:
        return []
    rank = -(-len(values) * per_mille // 1000)
    return [sorted(values)[rank - 1]]
