"""How long an event takes until its record is there: single ones, and at steady rates."""

import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median

from .programs import PERSISTENT, new_events
from .report import Mark, Table
from .runner import BARE, LOST_AFTER_S, RECORDS, Scenario, Site, in_rounds, outcome, program

PER_MILLE = {"p50": 500, "p99": 990, "p99.9": 999}
"""The percentiles by their names."""
RECORDED, BOTH = "publish to recorded", "bare: both"

_LOAD_S = {1: 21, 100: 6, 1_000: 6, 10_000: 6}
"""How long a round lasts by its events per second, with the first second, which does not count.

At 1/s five rounds give the hundred samples that p99 needs."""
_REFERENCE = program("", "reference", PREFETCH="1")
_SAMPLES, _WARM_UP_EVENTS, _WARM_UP_S = 200, 20, 1
"""The first event waits for a lease, and the first of everything for its imports."""
_KEPT = 0.99
"""Of its rate, by a publisher: else the latencies are those of its own trouble."""


def _idle(site: Site, _asked: Namespace) -> list[Table]:
    """Take turns with the bare steps, so that all of them meet the same machine.

    A record is there when a watch has brought it to this process: one clock for both ends, and the
    watch's way back counts against the service.
    """
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
    """Return a row for each step, and for both bare ones: through the broker, then into etcd."""
    steps = (RECORDED, "bare: publish to consumed", "bare: etcd put", BOTH)
    in_ms = ([1000 * s for s in (*sample, sum(sample[1:]))] for sample in samples_s)
    return {
        step: {"median, ms": [median(ms)], "p99, ms": percentile(ms, 990), "least, ms": [min(ms)]}
        for step, ms in zip(steps, zip(*in_ms, strict=True), strict=True)
    }


def _latency(site: Site, asked: Namespace) -> list[Table]:
    rounds = in_rounds(site, asked.rounds, [partial(_load, site, per_s) for per_s in _LOAD_S])
    return [{f"{per_s:,}": summary(per_s, **rounds[f"{per_s:,}"]) for per_s in _LOAD_S}]


def _load(site: Site, per_s: int) -> dict[str, dict[str, object]]:
    """Publish at a rate for a round.

    Open loop: a latency begins when its event is due, whatever has become of those before, so a
    stall counts in full. A closed loop would send fewer events then ("coordinated omission").
    """
    events = per_s * _LOAD_S[per_s]
    with site.queue(BARE), site.run(BARE) as child, site.watch(RECORDS) as next_record:
        child.wait_ready()
        told = outcome("open_loop", site.url, BARE.queue, per_s, events)
        recorded_s = dict(next_record() for _ in range(events))
    by_number = {int(key.removeprefix(RECORDS)): at_s for key, at_s in recorded_s.items()}
    return {f"{per_s:,}": {"ms": latencies_ms(per_s, told.pop("start_s"), by_number), **told}}


def latencies_ms(per_s: int, start_s: float, recorded_s: Mapping[int, float]) -> list[float]:
    """Return each event's latency from when it was due; those of the first second are left out."""
    return [
        1000 * (recorded_s[number] - start_s - number / per_s)
        for number in range(_WARM_UP_S * per_s, len(recorded_s))
    ]


def summary(
    per_s: int, ms: Sequence[Sequence[float]], late_ms: list[float], reached_per_s: list[float]
) -> dict[str, list[float]]:
    """Return a row for all rounds at a rate: no percentile unless each round has kept the rate."""
    slowest_per_s = min(reached_per_s)
    kept = slowest_per_s >= _KEPT * per_s
    return {
        "samples": [sum(map(len, ms))],
        **{f"{name}, ms": pooled(ms, n) if kept else [] for name, n in PER_MILLE.items()},
        "publisher late, ms": late_ms,
        "rate not kept, slowest": [] if kept else [slowest_per_s],
    }


def pooled(rounds: Sequence[Sequence[float]], per_mille: int) -> list[float]:
    """Return the percentile of all rounds together, between the least and the greatest of them.

    It always lies between these, so it is the median of the three. It is alone where a round has
    too few samples for a percentile of its own.
    """
    whole = percentile([value for values in rounds for value in values], per_mille)
    own = [value for values in rounds for value in percentile(values, per_mille)]
    return [min(own), *whole, max(own)] if len(own) == len(rounds) else whole


def percentile(values: Sequence[float], per_mille: int) -> list[float]:
    """Return the value that so many of a thousand samples do not exceed, by its rank.

    There is none where none of them could lie beyond it: the p99.9 of less than a thousand would
    be their greatest by another name.
    """
    if len(values) * (1000 - per_mille) < 1000:
        return []
    rank = -(-len(values) * per_mille // 1000)
    return [sorted(values)[rank - 1]]


_OF_BOTH = "bare steps / publish to recorded, idle, medians"
_TO_BOTH = "publish to recorded, idle / bare steps, medians"

SCENARIOS = {
    "idle": Scenario(
        ("Latency when idle",),
        "200 single events, one after the other: the time until a watch on etcd has brought the "
        "record, beside that of the steps that nobody can avoid.",
        _idle,
        (
            Mark(_OF_BOTH, BOTH, "median, ms", RECORDED, kept=True),
            Mark(_TO_BOTH, RECORDED, "median, ms", BOTH, "at most 1.4"),
        ),
    ),
    "latency": Scenario(
        ("Latency by load",),
        "Events are due at so many per second, whatever becomes of those before. The time is from "
        "when an event is due until a watch on etcd has brought its record. A percentile is of all "
        "rounds together (least to greatest of the rounds, where each has the samples for its "
        "own). The publisher's own lateness, median, is part of it; if it did not keep the rate in "
        "some round, there is no percentile.",
        _latency,
    ),
}
