"""The tables of a run, in Markdown, to read on a terminal too."""

from collections.abc import Sequence
from itertools import groupby
from statistics import median

from . import marks
from .results import (
    PER_MILLE,
    Bench,
    Growth,
    Percentiles,
    Rates,
    Spread,
    Steady,
    cpu_us,
    per_s,
    percentile,
    ratio,
)
from .subjects import CALLS, CEILING, CONSUMERS, DUPLICATES, PUBLISHERS, SWEEP, UNCONFIRMED

_NONE = "-"


def bench(found: Bench) -> str:
    """Return the whole report, each section below its heading; what was not measured is absent."""
    sections = {
        "Marks": _marks(marks.judge_bench(found)),
        "Consuming": _rates(
            found.consuming,
            [*(subject.name for subject in CONSUMERS), DUPLICATES],
            CEILING.name,
            "of the ceiling",
        ),
        "Calls": _calls(found),
        "Ratios": _table(
            ["", "ratio, round by round"],
            *([name, _spread(spread, ".3f")] for name, spread in marks.ratios(found).items()),
        ),
        "Batch size": _sweep(found.sweep),
        "Publishing": _rates(
            found.publishing, list(PUBLISHERS), UNCONFIRMED, "of pika without confirms"
        ),
        "Latency by load": _loads(found.loads),
        "Latency when idle": _idle(found),
    }
    sections["Consuming"] += (
        "\n\nCPU time is of the consumer's process alone. The two numbers of a service are "
        "`ETCD_MAX_TXN_OPS` and `BATCH_SIZE`. Of duplicates, deliveries count."
    )
    return "\n\n".join(
        (
            f"# Measured by `make bench`\n\n{found.machine}.",
            (
                f"{len(found.consuming)} rounds of {found.events:,} events (slow subjects get "
                "fewer); each figure is a median (least to greatest)."
            ),
            *(f"## {heading}\n\n{text}" for heading, text in sections.items() if text),
        )
    )


def _marks(judged: Sequence[marks.Mark]) -> str:
    rows = (
        [mark.what, f"{mark.value:.2f}", mark.target, "yes" if mark.met else "NO"]
        for mark in judged
    )
    return _table(["mark", "median", "target", "met"], *rows)


def _rates(rounds: Sequence[Rates], names: Sequence[str], reference: str, of: str) -> str:
    rows = (
        [
            name,
            _spread(per_s(rounds, name), ",.0f"),
            _spread(cpu_us(rounds, name), ".1f"),
            _spread(ratio(rounds, name, reference), ".3f"),
        ]
        for name in names
    )
    return _table(["", "events/s", "CPU µs an event", of], *rows)


def _calls(found: Bench) -> str:
    head = [
        "handler, receiver, `CALLS_AT_ONCE`",
        "calls/s",
        "CPU µs a call",
        "client alone, calls/s",
        "of the client alone",
        "of what the slots allow",
    ]
    by_name = marks.ratios(found)
    rows = (
        [
            calls.name,
            _spread(per_s(found.calls, calls.name), ",.0f"),
            _spread(cpu_us(found.calls, calls.name), ".1f"),
            _spread(per_s(found.calls, calls.alone), ",.0f"),
            _spread(by_name[marks.of_client(calls)], ".3f"),
            _spread(by_name.get(marks.of_slots(calls)), ".3f"),
        ]
        for calls in CALLS
    )
    return _table(head, *rows) + (
        "\n\nA call for each event, under its claim, to a receiver that answers after so long. "
        "`notify` is the coroutine, on aiohttp; the plain handler runs on threads, on urllib3. "
        "The client alone makes the same calls without a broker and etcd, as many at once."
    )


def _sweep(rounds: Sequence[Rates]) -> str:
    if not rounds:
        return ""
    head = ["`BATCH_SIZE`"]
    for effects in ("no effect", "one effect"):
        head += [f"{effects}, events/s", "of the ceiling"]
    rows = []
    for size, subjects in SWEEP.items():
        rows.append([str(size)])
        for subject in subjects:
            rows[-1].append(_spread(per_s(rounds, subject.name), ",.0f"))
            rows[-1].append(_spread(ratio(rounds, subject.name, CEILING.name), ".3f"))
    ceiling = _spread(per_s(rounds, CEILING.name), ",.0f")
    return (
        f"{len(rounds)} rounds, `ETCD_MAX_TXN_OPS=1024`; the ceiling in them: {ceiling} events/s."
        f"\n\n{_table(head, *rows)}"
    )


def _loads(loads: Sequence[Percentiles]) -> str:
    if not loads:
        return ""
    head = ["events/s", "samples", *(f"{name}, ms" for name in PER_MILLE), "publisher late, ms"]
    rows = (
        [
            f"{load.per_s:,}",
            f"{load.samples:,}",
            *(_spread(ms, ".2f") for ms in load.ms.values()),
            _spread(load.late_ms, ".2f"),
        ]
        for load in loads
    )
    return "\n\n".join(
        (
            _table(head, *rows),
            (
                "From the moment an event is due until a watch on etcd has brought its record. "
                "Each percentile is of all rounds together (least to greatest of the rounds, where "
                f"each has the samples for its own); {_NONE}: too few samples. The publisher's own "
                "lateness, median, is part of the latencies."
            ),
            *(
                f"**At {load.per_s:,}/s there is no figure**: the publisher did not keep that rate "
                f"({load.slowest_per_s:,.0f}/s in its slowest round)."
                for load in loads
                if not load.kept
            ),
        )
    )


def _idle(found: Bench) -> str:
    idle = found.idle
    rows = []
    for name, values in (
        ("publish to recorded", idle.recorded_ms),
        ("bare: publish to consumed", idle.round_trip_ms),
        ("bare: etcd put", idle.put_ms),
        ("bare: both", idle.bare_ms),
    ):
        p99 = percentile(values, PER_MILLE["p99"])
        last = _NONE if p99 is None else f"{p99:.2f}"
        rows.append([name, f"{median(values):.2f}", last, f"{min(values):.2f}"])
    table = _table(["", "median, ms", "p99, ms", "least, ms"], *rows)
    return f"{len(idle.recorded_ms)} single events, one after the other.\n\n{table}"


def growth(found: Growth) -> str:
    """Return the report of what a history costs by its length."""
    empty, *longer = sizes = found.sizes

    def starts(of: str, style: str) -> list[str]:
        spreads = (Spread.of(getattr(start, of) for start in size.starts) for size in sizes)
        return [_spread(spread, style) for spread in spreads]

    rows = (
        ["process start to first event recorded, ms", *starts("first_ms", ",.0f")],
        ["the same ÷ empty", "", *(f"{marks.slowdown(found, size):.2f}" for size in longer)],
        ["import, s", *starts("import_s", ".2f")],
        ["service's memory after it, MB", *(f"{marks.memory(size) / 1e6:,.1f}" for size in sizes)],
        [
            "the same a record, less the empty service's, bytes",
            "",
            *(f"{marks.memory_of_record(found, size):,.0f}" for size in longer),
        ],
        [
            "duplicates skipped / transactions etcd saw",
            "",
            *(f"{size.duplicates:,} / {size.transactions:,}" for size in longer),
        ],
        ["new events recorded a second", *(f"{size.rate.events_per_s:,.0f}" for size in sizes)],
        ["etcd's file in use, MB", *(f"{size.etcd.used / 1e6:,.1f}" for size in sizes)],
        [
            "the same a record, bytes",
            "",
            *(f"{(size.etcd.used - empty.etcd.used) / size.records:,.0f}" for size in longer),
        ],
        ["etcd's file on disk, MB", *(f"{size.etcd.file / 1e6:,.1f}" for size in sizes)],
        [
            "etcd's memory, its mapped file included, MB",
            *(f"{size.etcd.memory / 1e6:,.1f}" for size in sizes),
        ],
    )
    head = ["records in etcd at the start", *(f"{size.records:,}" for size in sizes)]
    return "\n\n".join(
        (
            "# What a longer history costs",
            found.machine,
            (
                f"{len(empty.starts)} starts at each size; median (least to greatest). "
                "MB are 10⁶ bytes."
            ),
            _table(head, *rows),
            f"Deleted, a record took {found.deletion_bytes:,.0f} bytes more, until etcd compacts.",
            "\n".join(f"- {mark}" for mark in marks.judge_growth(found)),
        )
    )


def steady(found: Steady) -> str:
    """Return the report of a long run, a line a minute."""
    judged, before, emptied = marks.judge_steady(found), found.samples[-1].etcd, found.emptied
    return "\n\n".join(
        (
            "# At full rate for a while",
            found.machine,
            (
                f"`DEDUP_WINDOW={found.window_s}s`, no effect, etcd with `{found.compaction}`.\n"
                "Medians of each minute; of the oldest lease's age the most. MB are 10⁶ bytes."
            ),
            _minutes(found),
            (
                f"- {found.published:,} events were published, and {found.recorded:,} recorded.\n"
                f"- Leases were granted for {found.lease_s} s; at the end {before.leases} were "
                "there.\n"
                f"- Without load the last record was gone after {found.gone_s:.0f} s, with its "
                f"lease ({emptied.leases} were left).\n"
                f"- Its space was free after {found.freed_s:.0f} s: {emptied.used / 1e6:,.1f} MB "
                f"in use, where it was {before.used / 1e6:,.0f}. The file keeps "
                f"{emptied.file / 1e6:,.0f} MB for what comes next."
            ),
            "\n".join(f"- {mark}" for mark in judged) or "Too short a run to be judged.",
        )
    )


def _minutes(found: Steady) -> str:
    ages_s = dict(zip(found.samples, marks.oldest_lease_s(found.samples), strict=True))
    rows = []
    for minute, samples in groupby(found.samples, lambda sample: int(sample.at_s // 60)):
        group = list(samples)
        if len(group) > 1:
            rows.append(
                [
                    str(minute + 1),
                    f"{marks.recorded_per_s(group):,.0f}",
                    *(
                        format(median(map(of, group)), style)
                        for of, style in marks.MEASURES.values()
                    ),
                    f"{median(sample.ready for sample in group):,.0f}",
                    f"{max(ages_s[sample] for sample in group):.0f}",
                ]
            )
    return _table(["minute", "events/s", *marks.MEASURES, "ready", "oldest lease s"], *rows)


def _spread(spread: Spread | None, style: str) -> str:
    """Write `median (least to greatest)`."""
    if spread is None:
        return _NONE
    middle, least, greatest = (format(value, style) for value in spread)
    return f"{middle} ({least} to {greatest})" if spread.least < spread.greatest else middle


def _table(head: Sequence[str], *rows: Sequence[str]) -> str:
    """Return a table; all columns but the first hold numbers."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for first, *others in (head, rule, *rows):
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
