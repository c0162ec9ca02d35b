"""The figures as a table for people, and as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from .figures import Spread, cpu_us, per_s, percentile_99, ratio, show
from .latency import Latencies
from .marks import Mark
from .subjects import BARE, BARE_SMALL, CEILING, DUPLICATES, NAIVE, ORDER, ORDER_SMALL
from .throughput import Rates

_ROWS = (CEILING, NAIVE, BARE, BARE_SMALL, ORDER, ORDER_SMALL, DUPLICATES)


def print_report(machine: Mapping[str, str], rounds: Sequence[Rates], events: int,
                 latencies: Latencies, marks: Sequence[Mark]) -> None:
    """Print everything to standard output."""
    print("\n" + ", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{len(rounds)} rounds of {events:,} events; median (least to greatest)\n")
    _print_rates(rounds)
    _print_latencies(latencies)
    for mark in marks:
        verdict = "met   " if mark.met else "MISSED"
        print(f"{verdict}  {mark.what}: {mark.value:.2f}, {mark.target}")


def write_json(path: Path, machine: Mapping[str, str], rounds: Sequence[Rates], events: int,
               latencies: Latencies, marks: Sequence[Mark]) -> None:
    """Write the raw figures: every round's rates and every latency."""
    document = {
        "machine": dict(machine),
        "events": events,
        "rounds": [{name: rate._asdict() for name, rate in rates.items()} for rates in rounds],
        "latencies": asdict(latencies),
        "marks": [mark._asdict() for mark in marks],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def _print_rates(rounds: Sequence[Rates]) -> None:
    line = "{:30} {:>26} {:>8} {:>22} {:>20}"
    print(line.format("subject", "events/s", "CPU µs", "/ ceiling", "/ naive"))
    for name in _ROWS:
        print(line.format(
            name,
            show(per_s(rounds, name), "{:,.0f}".format),
            f"{cpu_us(rounds, name).median:.1f}",
            show(ratio(rounds, name, CEILING), "{:.3f}".format),
            show(ratio(rounds, name, NAIVE), "{:.1f}".format),
        ))
    print("CPU: of the consumer's process alone, microseconds per event, median\n")


def _print_latencies(latencies: Latencies) -> None:
    recorded_ms, bare_ms = latencies.recorded_ms, latencies.bare_ms
    print(f"idle, {len(recorded_ms)} single events, ms {'median':>22} {'p99':>7} {'least':>7}")
    for name, values in (
        ("publish to recorded", recorded_ms),
        ("bare: publish to consumed", latencies.round_trip_ms),
        ("bare: etcd put", latencies.put_ms),
        ("bare: both", bare_ms),
    ):
        spread = Spread.of(values)
        print(f"{name:35} {spread.median:14.2f} {percentile_99(values):7.2f} {spread.least:7.2f}")
    print(f"recorded / bare, medians: {median(recorded_ms) / median(bare_ms):.2f}\n")
