"""The figures as tables in Markdown, which read well on a terminal too."""

from collections.abc import Callable, Sequence
from statistics import median

from .calls import SCENARIOS
from .figures import Spread, cpu_us, per_s, percentile, ratio, show
from .markdown import table
from .marks import Mark
from .percentiles import PER_MILLE, Percentiles, by_rate
from .publishing import PUBLISHERS, UNCONFIRMED
from .ratios import of_client, of_slots, ratios
from .results import Results
from .subjects import (
    BARE,
    BARE_SMALL,
    BATCH_SIZES,
    CEILING,
    DUPLICATES,
    HALF,
    NAIVE,
    ORDER,
    ORDER_SMALL,
    bare_name,
    order_name,
    sized,
)

_CONSUMING = (CEILING, NAIVE, BARE, BARE_SMALL, ORDER, ORDER_SMALL, HALF, DUPLICATES)
_NONE = "-"


def render(results: Results, marks: Sequence[Mark]) -> str:
    """Return the whole report, each section below its heading; what was not measured is absent."""
    sections = {
        "Marks": _marks(marks),
        "Consuming": _consuming(results),
        "Calls": _calls(results),
        "Ratios": _ratios(results),
        "Batch size": _sweep(results),
        "Publishing": _publishing(results),
        "Latency by load": _loads(results),
        "Latency when idle": _idle(results),
    }
    return "\n\n".join(
        (
            "# Measured by `make bench`",
            _head(results),
            *(f"## {heading}\n\n{text}" for heading, text in sections.items() if text),
        )
    )


def _head(results: Results) -> str:
    return (
        f"{results.machine}.\n\n{len(results.consuming)} rounds of {results.events:,} events "
        f"(slow subjects get fewer); each figure is a median (least to greatest)."
    )


def _marks(marks: Sequence[Mark]) -> str:
    return table(
        [
            ("mark", "median", "target", "met"),
            *(
                (mark.what, f"{mark.value:.2f}", mark.target, "yes" if mark.met else "NO")
                for mark in marks
            ),
        ]
    )


def _consuming(results: Results) -> str:
    rounds = results.consuming
    rows = [
        (
            name,
            _whole(per_s(rounds, name)),
            _one(cpu_us(rounds, name)),
            _three(ratio(rounds, name, CEILING)),
        )
        for name in _CONSUMING
    ]
    return table([("", "events/s", "CPU µs an event", "of the ceiling"), *rows]) + (
        "\n\nCPU time is of the consumer's process alone. The two numbers of a service are "
        "`ETCD_MAX_TXN_OPS` and `BATCH_SIZE`. Of duplicates, deliveries count."
    )


def _calls(results: Results) -> str:
    rounds, found = results.calls, ratios(results)
    head = (
        "handler, receiver, `CALLS_AT_ONCE`",
        "calls/s",
        "CPU µs a call",
        "client alone, calls/s",
        "of the client alone",
        "of what the slots allow",
    )
    rows = [
        (
            scenario.name,
            _whole(per_s(rounds, scenario.name)),
            _one(cpu_us(rounds, scenario.name)),
            _whole(per_s(rounds, scenario.alone)),
            _three(found[of_client(scenario)]),
            _three(found[of_slots(scenario)]) if scenario.most_per_s else _NONE,
        )
        for scenario in SCENARIOS
    ]
    return table([head, *rows]) + (
        "\n\nA call for each event, under its claim, to a receiver that answers after so long. "
        "`notify` is the coroutine, on aiohttp; the plain handler runs on threads, on urllib3. "
        "The client alone makes the same calls without a broker and etcd, as many at once."
    )


def _ratios(results: Results) -> str:
    rows = [(name, _three(spread)) for name, spread in ratios(results).items()]
    return table([("", "ratio, round by round"), *rows])


def _sweep(results: Results) -> str:
    if not results.sweep:
        return ""
    rounds = results.sweep
    rows = [
        (
            str(size),
            *(
                cell
                for name in (bare_name(sized(size)), order_name(sized(size)))
                for cell in (_whole(per_s(rounds, name)), _three(ratio(rounds, name, CEILING)))
            ),
        )
        for size in BATCH_SIZES
    ]
    head = (
        "`BATCH_SIZE`",
        "no effect, events/s",
        "of the ceiling",
        "one effect, events/s",
        "of the ceiling",
    )
    return (
        f"{len(rounds)} rounds, `ETCD_MAX_TXN_OPS=1024`; the ceiling in them: "
        f"{_whole(per_s(rounds, CEILING))} events/s.\n\n{table([head, *rows])}"
    )


def _publishing(results: Results) -> str:
    rounds = results.publishing
    rows = [
        (
            name,
            _whole(per_s(rounds, name)),
            _one(cpu_us(rounds, name)),
            _three(ratio(rounds, name, UNCONFIRMED)),
        )
        for name in PUBLISHERS
    ]
    return table([("", "events/s", "CPU µs an event", "of pika without confirms"), *rows])


def _loads(results: Results) -> str:
    if not results.loads:
        return ""
    found = by_rate(results.loads)
    head = ("events/s", "samples", *(f"{name}, ms" for name in PER_MILLE), "publisher late, ms")
    rows = [
        (
            f"{load.per_s:,}",
            f"{load.samples:,}",
            *(_two(ms) if ms else _NONE for ms in load.ms.values()),
            _two(load.late_ms),
        )
        for load in found
    ]
    return "\n\n".join(
        (
            table([head, *rows]),
            (
                "From the moment an event is due until a watch on etcd has brought its record. "
                "Each percentile is of all rounds together (least to greatest of the rounds, where "
                f"each has the samples for its own); {_NONE}: too few samples. The publisher's own "
                "lateness, median, is part of the latencies."
            ),
            *(_not_kept(load) for load in found if not load.kept),
        )
    )


def _not_kept(load: Percentiles) -> str:
    return (
        f"**At {load.per_s:,}/s there is no figure**: the publisher did not keep that rate "
        f"({load.slowest_per_s:,.0f}/s in its slowest round)."
    )


def _idle(results: Results) -> str:
    idle = results.idle
    rows = [
        (name, f"{median(values):.2f}", _or_none(percentile(values, 990)), f"{min(values):.2f}")
        for name, values in (
            ("publish to recorded", idle.recorded_ms),
            ("bare: publish to consumed", idle.round_trip_ms),
            ("bare: etcd put", idle.put_ms),
            ("bare: both", idle.bare_ms),
        )
    ]
    return (
        f"{len(idle.recorded_ms)} single events, one after the other.\n\n"
        f"{table([('', 'median, ms', 'p99, ms', 'least, ms'), *rows])}"
    )


def _or_none(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2f}"


def _format(number_format: str) -> Callable[[Spread], str]:
    return lambda spread: (
        show(spread, number_format.format)
        if spread.least < spread.greatest
        else number_format.format(spread.median)
    )


_whole, _one, _two, _three = map(_format, ("{:,.0f}", "{:.1f}", "{:.2f}", "{:.3f}"))
