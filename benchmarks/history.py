"""What records cost: by their number, and while they are written and expire at full rate."""

import time
import uuid
from argparse import Namespace
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import groupby, pairwise
from statistics import median

from chaos.checks import becomes, says, true
from servers.processes import resident_bytes
from servers.services import Service
from servers.wait import eventually, stands_still

from .programs import body, firehose, new_events
from .report import Table
from .runner import BARE, LOST_AFTER_S, RECORDS, Site, follow, rate, say

_FIRST, _MEMORY, _USED = "first event recorded, ms", "service MB", "etcd's file, in use MB"
_NEW = "new-"
"""The prefix of the ids of events that are not part of the history."""
_DUPLICATES, _PUBLISHED_AT_ONCE = 5_000, 50_000
SIZES = (0, 10_000, 100_000, 1_000_000)


def growth(site: Site, asked: Namespace) -> list[Table]:
    table: Table = {}
    for before, size in pairwise([0, *asked.sizes]):
        say(f"{size:,} records")
        site.clear(RECORDS + _NEW)
        with site.queue(BARE), site.run(BARE):
            for start in range(before, size, _PUBLISHED_AT_ONCE):
                stop = min(start + _PUBLISHED_AT_ONCE, size)
                site.publish(BARE.queue, _numbered(range(start, stop)))
                site.wait_recorded(BARE, stop)
        starts = [_start(site) for _ in range(asked.rounds)]
        figures = {name: [start[name] for start in starts] for name in starts[0]}
        row = table[f"{size:,} records"] = figures | _on_history(site, size, asked.events)
    # etcd writes to its file, and updates this metric, every 0.1 s.
    used_mb = partial(stands_still, lambda: site.gauges()["in use MB"])
    before_mb, number = used_mb(), site.keys.count(RECORDS)
    site.keys.delete(RECORDS)
    deletion_bytes = (used_mb() - before_mb) * 1e6 / number
    row["bytes that the deletion of a record adds"] = [deletion_bytes]
    return [add_growth(table, asked.sizes)]


def add_growth(table: Table, sizes: Sequence[int]) -> Table:
    """Add what each longer history costs in comparison with the first, empty one."""
    empty, *longer = table.values()
    for size, row in zip(sizes[1:], longer, strict=True):
        row["first event ÷ without history"] = [median(row[_FIRST]) / median(empty[_FIRST])]
        for name in (_MEMORY, _USED):
            more = median(row[name]) - median(empty[name])
            row[f"{name.removesuffix(' MB')} bytes a record"] = [more * 1e6 / size]
    return table


def _numbered(numbers: Iterable[int]) -> list[bytes]:
    """Return events of the history; their ids look random, and are the same each time."""
    return [body(uuid.uuid5(uuid.NAMESPACE_OID, str(number))) for number in numbers]


def _start(site: Site) -> dict[str, float]:
    """Publish an event, start the service, and wait for the record and the end of the import."""
    event_id = f"{_NEW}{uuid.uuid4()}"
    with site.queue(BARE), site.watch(RECORDS + event_id) as next_record:
        site.publish(BARE.queue, [body(event_id)], preload=True)
        started_s = time.monotonic()
        with site.run(BARE) as child:
            first_s = next_record()[1] - started_s
            import_s = _imported_s(child)
            memory = stands_still(partial(resident_bytes, child.pid))
    return {_FIRST: 1000 * first_s, "import, s": import_s, _MEMORY: memory / 1e6}


def _imported_s(child: Service) -> float:
    """Wait until a service says that its import is done, and return how long it took."""
    line, *_ = eventually(partial(says, child, "records imported"), LOST_AFTER_S)
    return float(line["seconds"])


def _on_history(site: Site, size: int, events: int) -> dict[str, list[float]]:
    """Publish duplicates from all parts of the history, then new events."""
    # Read etcd first: the pages that a write frees count as used until the next write.
    etcd = site.gauges()
    numbers = range(0, size, max(1, size // _DUPLICATES))[:_DUPLICATES]
    skipped = partial(site.statsd.count, "events_processed_skipped")
    with site.queue(BARE) as channel, site.run(BARE) as child:
        _imported_s(child)
        transactions, before = site.gauges()["transactions"], skipped()
        site.publish(BARE.queue, _numbered(numbers))
        becomes(skipped, before + len(numbers))
        transactions = site.gauges()["transactions"] - transactions
        # The service is frozen while new events are published.
        child.pause()
        site.publish(BARE.queue, [body(f"{_NEW}{uuid.uuid4()}") for _ in range(events)])
        child.resume()
        new = rate(follow(channel, BARE.queue, child), events)
    return {
        "duplicates skipped": [len(numbers)],
        "transactions for duplicates": [transactions],
        "new events/s": [new["events/s"]],
        _USED: [etcd["in use MB"]],
        "etcd's file, MB on disk": [etcd["file MB"]],
        "etcd's memory, its mapped file included, MB": [etcd["etcd MB"]],
    }


MEASURES = (_MEMORY, "etcd MB", "file MB", "in use MB", "records", "leases")
"""The figures that must not grow in a steady run."""
_THIRDS, _OLDEST = "last third ÷ the one before", "the oldest lease, s over its time"
_LEAST_MINUTES = 9
"""A third of a run has to contain the window and two compactions; until then all grows."""
_WINDOW_S, _LEASE_S = 60, 66
"""The library grants a lease for the window and a tenth more."""
_SAMPLE_EVERY_S, _LOOK_AGAIN_S, _EMPTY_WITHIN_S = 5.0, 0.05, 400.0
_LEAST_READY, _CHUNK = 20_000, 10_000

Sample = dict[str, float]
"""Figures of etcd, the service and the queue, ``at_s`` seconds after the start of the load."""


def steady(site: Site, asked: Namespace) -> list[Table]:
    subject = BARE._replace(settings={**BARE.settings, "DEDUP_WINDOW": f"{_WINDOW_S}s"})
    samples: list[Sample] = []
    published = 0
    with site.queue(subject) as channel, site.run(subject) as child:
        _imported_s(child)
        before, started_s = site.gauges()["written"], time.monotonic()
        with firehose(site.url, BARE.queue) as publish:
            while (at_s := time.monotonic() - started_s) <= 60 * asked.minutes:
                if not child.running:
                    raise AssertionError(f"the service ended:\n{child.output()[-2000:]}")
                ready = channel.queue_declare(BARE.queue, passive=True).method.message_count
                if ready < _LEAST_READY:
                    publish(new_events(_CHUNK))
                    published += _CHUNK
                if at_s >= len(samples) * _SAMPLE_EVERY_S:
                    seen = {"at_s": at_s, "ready": ready, _MEMORY: resident_bytes(child.pid) / 1e6}
                    samples.append(seen | site.gauges())
                channel.connection.sleep(_LOOK_AGAIN_S)
        becomes(lambda: int(site.gauges()["written"] - before), published, LOST_AFTER_S)
        drained_s, full = time.monotonic(), samples[-1]

        def seconds_until(name: str, most: float) -> float:
            eventually(lambda: true(site.gauges()[name] <= most), _EMPTY_WITHIN_S, interval_s=0.5)
            return time.monotonic() - drained_s

        after: dict[str, list[float]] = {
            "events published, and recorded": [published],
            # One key, the incarnation, stays.
            "last record gone after, s": [seconds_until("records", 1)],
            "its space free after, s": [seconds_until("in use MB", full["in use MB"] / 50)],
        }
        empty = site.gauges()
    for name in ("leases", "in use MB", "file MB"):
        after |= {f"{name}, under load": [full[name]], f"{name}, then": [empty[name]]}
    minutes = by_minute(samples)
    return [minutes, {"figure": after | thirds(minutes)}]


def by_minute(samples: Sequence[Sample]) -> Table:
    """Return the medians of each minute, and the greatest age of the oldest lease."""
    table: Table = {}
    aged = zip(samples, oldest_lease_s(samples), strict=True)
    for minute, group in groupby(aged, lambda pair: pair[0]["at_s"] // 60):
        seen, ages_s = zip(*group, strict=True)
        recorded, took_s = (seen[-1][name] - seen[0][name] for name in ("written", "at_s"))
        if took_s:
            table[f"minute {minute + 1:.0f}"] = {
                "events/s": [recorded / took_s],
                **{name: [median(one[name] for one in seen)] for name in (*MEASURES, "ready")},
                "oldest lease, s": [max(ages_s)],
            }
    return table


def thirds(minutes: Table) -> dict[str, list[float]]:
    """Compare the last third with the one before it, unless the run was too short."""
    third, is_judged = len(minutes) // 3, len(minutes) >= _LEAST_MINUTES
    figures: dict[str, list[float]] = {}
    for name in (*MEASURES, "events/s"):
        values = [row[name][0] for row in minutes.values()]
        last, before = values[2 * third :], values[third : 2 * third]
        figures[f"{name}, {_THIRDS}"] = [median(last) / median(before)] if is_judged else []
    ages_s = [row["oldest lease, s"][0] for row in minutes.values()]
    return {**figures, _OLDEST: [max(ages_s) - _LEASE_S] if is_judged else []}


def oldest_lease_s(samples: Sequence[Sample]) -> list[float]:
    """Return an upper bound of the oldest lease's age at each sample: the first not revoked yet."""
    ages_s = []
    for sample in samples:
        revoked_by_now = (one["at_s"] for one in samples if one["granted"] <= sample["revoked"])
        ages_s.append(max(0.0, sample["at_s"] - max(revoked_by_now, default=samples[0]["at_s"])))
    return ages_s
