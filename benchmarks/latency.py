"""How long an event takes until its record is there: single ones, and at steady rates."""

import queue
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median

from chaos.checks import becomes

from .figures import NotMeasuredError, Table, percentile, pooled
from .publishers import PERSISTENT, new_events
from .sites import Site, outcome
from .subjects import LARGE, Subject, service
from .throughput import Asked, rounds

PER_MILLE = {"p50": 500, "p99": 990, "p99.9": 999}
"""The percentiles by their names."""

_LOAD_S = {1: 21, 100: 6, 1_000: 6, 10_000: 6}
"""How long a round lasts by its events per second, with the first second, which does not count:
it holds the grant of the first lease. At 1/s five rounds give the hundred samples that p99 needs.
"""
_BARE = service("bare", LARGE)
_REFERENCE = Subject("reference", "reference", {})
_RECORDS = _BARE.records[0]
_SAMPLES, _WARM_UP_EVENTS, _WARM_UP_S = 200, 20, 1
"""The first event waits for a lease, and the first of everything for its imports."""
_LOST_AFTER_S = 60.0
_KEPT = 0.99
"""Of its rate, by a publisher: else the latencies are those of its own trouble."""


def idle(site: Site, _asked: Asked) -> list[Table]:
    """Publish single events to a service and take the time until each record is there.

    That is when a watch, opened beforehand, has brought it to this process: one clock for both
    ends, and the watch's way back counts against the service. The bare steps are taken in turns
    with the events, so that all of them meet the same machine.
    """
    recorded_s: queue.Queue[float] = queue.Queue()
    delivered_s: list[float] = []
    with (
        site.queue(_REFERENCE) as channel,
        site.queue(_BARE),
        site.run(_BARE) as child,
        site.watch(_RECORDS, lambda at_s, _keys: recorded_s.put(at_s)),
    ):

        def recorded(event: bytes) -> float:
            channel.basic_publish("", _BARE.queue, event, PERSISTENT)
            return wait_record(recorded_s)

        def round_trip(event: bytes) -> float:
            channel.basic_publish("", _REFERENCE.queue, event, PERSISTENT)
            while not delivered_s:
                channel.connection.process_data_events(time_limit=_LOST_AFTER_S)
            return delivered_s.pop()

        def put(_event: bytes) -> float:
            site.etcd.put("/reference", "done")
            return time.monotonic()

        child.wait_ready()
        channel.basic_consume(
            _REFERENCE.queue, lambda *_: delivered_s.append(time.monotonic()), auto_ack=True
        )
        taken_ms = _take_in_turns((recorded, round_trip, put), channel.connection.sleep)
    site.clear()
    return [steps_table(*taken_ms)]


def _take_in_turns(
    steps: Sequence[Callable[[bytes], float]], sleep: Callable[[float], None]
) -> list[list[float]]:
    """Return how many milliseconds each step has taken; it returns when it was done."""
    taken_ms: list[list[float]] = [[] for _ in steps]
    for event in new_events(_WARM_UP_EVENTS + _SAMPLES):
        for step, step_ms in zip(steps, taken_ms, strict=True):
            started_s = time.monotonic()
            step_ms.append(1000 * (step(event) - started_s))
        sleep(0.02)
    return [step_ms[_WARM_UP_EVENTS:] for step_ms in taken_ms]


def steps_table(recorded_ms: list[float], round_trip_ms: list[float], put_ms: list[float]) -> Table:
    """Return a row for each step, and for both bare ones: through the broker, then into etcd."""
    both_ms = [a + b for a, b in zip(round_trip_ms, put_ms, strict=True)]
    steps = {
        "publish to recorded": recorded_ms,
        "bare: publish to consumed": round_trip_ms,
        "bare: etcd put": put_ms,
        "bare: both": both_ms,
    }
    return {
        name: {
            "median, ms": [median(ms)],
            "p99, ms": [p99] if (p99 := percentile(ms, PER_MILLE["p99"])) else [],
            "least, ms": [min(ms)],
        }
        for name, ms in steps.items()
    }


def wait_record(recorded_s: "queue.Queue[float]") -> float:
    """Return when the next record was there; raises NotMeasuredError."""
    try:
        return recorded_s.get(timeout=_LOST_AFTER_S)
    except queue.Empty:
        raise NotMeasuredError(f"an event is not recorded after {_LOST_AFTER_S:g} s") from None


def latency(site: Site, asked: Asked) -> list[Table]:
    """Publish at each rate to a service that waits for it."""
    table = rounds(site, asked, [partial(_load, site, per_s) for per_s in _LOAD_S])
    for per_s, name in zip(_LOAD_S, table, strict=True):
        table[name] = summary(per_s, **table[name])
    return [table]


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


def _load(site: Site, per_s: int) -> dict[str, dict[str, object]]:
    """Publish at a rate for a round.

    Open loop: events are due at a steady rate, whatever has become of those before, and a latency
    begins when its event is due, not when its publisher got round to it. So an event that had to
    wait behind a stall counts with all of its wait (a closed loop would send fewer events then,
    and hide it: "coordinated omission").
    """
    events = per_s * _LOAD_S[per_s]
    recorded_s: dict[int, float] = {}

    def changed(at_s: float, keys: Sequence[bytes]) -> None:
        recorded_s.update((int(key[len(_RECORDS) :]), at_s) for key in keys)

    with (
        site.queue(_BARE),
        site.run(_BARE) as child,
        site.watch(_RECORDS, changed),
    ):
        child.wait_ready()
        arguments = ("open_loop", site.url, _BARE.queue, str(per_s), str(events))
        told = outcome("benchmarks.publishers", *arguments)
        becomes(lambda: len(recorded_s), events, _LOST_AFTER_S)
    ms = latencies_ms(per_s, events, told["start_s"], recorded_s)
    figures = {"ms": ms, "late_ms": told["late_ms"], "reached_per_s": told["reached_per_s"]}
    return {f"{per_s:,}": figures}


def latencies_ms(
    per_s: int, events: int, start_s: float, recorded_s: Mapping[int, float]
) -> list[float]:
    """Return each event's latency from when it was due; those of the first second are left out."""
    return [
        1000 * (recorded_s[number] - start_s - number / per_s)
        for number in range(_WARM_UP_S * per_s, events)
    ]
