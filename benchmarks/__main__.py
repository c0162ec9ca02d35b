"""Measure one thing or another, keep the figures, and print and write what shows them.

The exit code is 1 if a mark is missed, or there is no figure. `check` exits with 1 if a ratio has
fallen by more than a fifth since those that are kept, or is gone, and with 2 if there are none.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from etcd3 import Etcd3Exception

from servers.processes import CommandFailedError, ServersUnavailableError

from . import marks, pictures, scenarios, tables
from .results import Bench, Growth, Load, NotMeasuredError, Percentiles, Rates, Steady, read, write
from .subjects import (
    CALLS,
    CEILING,
    CONSUMERS,
    LARGE,
    LEAST_EVENTS,
    PUBLISHERS,
    SWEEP,
    Subject,
    service,
)

DIRECTORY = Path(__file__).parent / "results"
RATIOS = "ratios.json"

_SWEEP_ROUNDS = 3
"""Of the sweep, at most: it is for a picture."""
_SIZES = (0, 10_000, 100_000, 1_000_000)
_NO_FIGURE = (
    ServersUnavailableError,
    CommandFailedError,
    NotMeasuredError,
    Etcd3Exception,
    AssertionError,
)

Run = Callable[[], Rates]


def bench(options: argparse.Namespace) -> int:
    """Measure everything beside the references."""
    with scenarios.start_site() as site:
        found = _ratios_only(site, options.rounds, options.events)
        points = _consumers(site, [CEILING, *chain(*SWEEP.values())], options.events)
        found.sweep = _rounds("sweep", points, min(options.rounds, _SWEEP_ROUNDS))
        loads: dict[int, list[Load]] = {per_s: [] for per_s in scenarios.LOAD_S}
        for number in range(options.rounds):
            for per_s, rounds in loads.items():
                _say(f"latency, round {number + 1} of {options.rounds}: {per_s:,}/s")
                rounds.append(scenarios.measure_load(site, per_s))
        found.loads = [Percentiles.of(each) for each in loads.values()]
    write(found, options.to / "bench.json")
    return _show("bench", options.to)


def check(options: argparse.Namespace) -> int:
    """Measure the ratios alone, and hold them against those that are kept."""
    try:
        kept = marks.read_ratios(DIRECTORY / RATIOS)
        with scenarios.start_site() as site:
            found = _ratios_only(site, options.rounds, options.events)
    except (OSError, ValueError, *_NO_FIGURE) as error:
        _say(f"bench-check: {error}")
        return 2
    compared = marks.compare(kept, marks.medians(found))
    for _, line in compared:
        print(line)
    return int(not all(passes for passes, _ in compared))


def growth(options: argparse.Namespace) -> int:
    """Measure start-up, memory and etcd by the number of records that are there."""
    subject = service("bare", LARGE)
    with scenarios.start_site() as site:
        found = Growth(site.machine, sizes=[], deletion_bytes=0)
        for before, size in pairwise([0, *options.sizes]):
            _say(f"{size:,} records")
            grown = before, size, options.starts, options.events
            found.sizes.append(scenarios.measure_size(site, subject, *grown))
        found.deletion_bytes = scenarios.measure_deletion(site, subject)
    write(found, options.to / "growth.json")
    return _show("growth", options.to)


def steady(options: argparse.Namespace) -> int:
    """Measure whether memory and etcd stay as they are at full rate."""
    with scenarios.start_site(*scenarios.COMPACTION) as site:
        found = scenarios.measure_steady(site, 60 * options.minutes)
    write(found, options.to / "steady.json")
    return _show("steady", options.to)


def show(options: argparse.Namespace) -> int:
    """Show once more what the last run of a command has found."""
    return _show(options.command, options.to)


_SHOWN: dict[str, tuple[Any, str, Callable[[Any], str], Callable[[Any], list[marks.Mark]]]] = {
    "bench": (Bench, "table.md", tables.bench, marks.judge_bench),
    "growth": (Growth, "growth.md", tables.growth, marks.judge_growth),
    "steady": (Steady, "steady.md", tables.steady, marks.judge_steady),
}


def _show(command: str, directory: Path) -> int:
    """Print the table, write it and the pictures, and return the exit code."""
    kind, name, table, judge = _SHOWN[command]
    found = read(kind, directory / f"{command}.json")
    if isinstance(found, Bench):
        (directory / "throughput.svg").write_text(pictures.throughput(found))
        (directory / "latency.svg").write_text(pictures.latency(found))
        marks.write_ratios(directory / RATIOS, marks.medians(found))
    text, judged = table(found), judge(found)
    (directory / name).write_text(f"{text}\n")
    print(text, *([marks.verdict(judged)] if judged else []), sep="\n\n")
    return int(not all(mark.met for mark in judged))


def _ratios_only(site: scenarios.Site, rounds: int, events: int) -> Bench:
    """Measure what the ratios are made of."""
    with scenarios.receiver() as receiver_url:
        calls: list[Run] = []
        for each in CALLS:
            subject = each.subject(receiver_url)
            # Calls are slow. What leaves the queue before the first ack does not count.
            calls += _consumers(site, [subject], subject.prefetch + events // 4)
            calls.append(partial(scenarios.call_alone, receiver_url, each))
        publishers = [partial(scenarios.publish, site, name, events) for name in PUBLISHERS]
        return Bench(
            machine=site.machine,
            events=events,
            consuming=_rounds("consuming", _consumers(site, CONSUMERS, events), rounds),
            calls=_rounds("calls", calls, rounds),
            publishing=_rounds("publishing", publishers, rounds),
            idle=scenarios.measure_idle(site),
            sweep=[],
            loads=[],
        )


def _consumers(site: scenarios.Site, subjects: Iterable[Subject], events: int) -> list[Run]:
    return [partial(scenarios.consume, site, subject, events) for subject in subjects]


def _rounds(what: str, runs: Sequence[Run], rounds: int) -> list[Rates]:
    """Run everything once a round, so that all meet the same machine; tell on standard error.

    Each round begins with another run: what the one before leaves behind (a warm page cache, a
    broker that still writes) shall not always meet the same one.
    """
    found: list[Rates] = []
    for number in range(rounds):
        turn = number % len(runs)
        found.append({})
        for run in (*runs[turn:], *runs[:turn]):
            for name, rate in run().items():
                found[-1][name] = rate
                where = f"{what}, round {number + 1} of {rounds}"
                _say(f"{where}: {name:30} {rate.events_per_s:9,.0f}/s")
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command: dict[Any, argparse.ArgumentParser] = {}
    for run in (bench, check, growth, steady, show):
        command[run] = commands.add_parser(run.__name__, help=run.__doc__)
        command[run].set_defaults(run=run)
        if run is not check:
            command[run].add_argument("--to", type=Path, metavar="DIRECTORY", default=DIRECTORY)
    for run, rounds in ((bench, 5), (check, 3)):
        command[run].add_argument("--rounds", type=_at_least(1), default=rounds)
        command[run].add_argument("--events", type=_at_least(LEAST_EVENTS), default=40_000)
    command[growth].add_argument("--sizes", type=int, nargs="+", default=_SIZES, help="0 first")
    command[growth].add_argument("--starts", type=_at_least(1), default=7, help="at each size")
    command[growth].add_argument("--events", type=_at_least(LEAST_EVENTS), default=60_000)
    command[steady].add_argument("--minutes", type=float, default=30)
    command[show].add_argument("command", choices=_SHOWN)
    return parser.parse_args()


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return number


def main() -> int:
    """Run what the command line says, and return the exit code."""
    options = _options()
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except _NO_FIGURE as error:
        _say(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
