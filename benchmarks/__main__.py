"""Measure everything once and print it; the exit code is 0 unless `--check` finds a mark missed."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from harness.packages import ServersUnavailableError
from harness.servers import start_servers
from harness.statsd import listen_statsd

from . import latency
from .machine import describe
from .marks import judge
from .progress import NotMeasuredError
from .report import print_report, write_json
from .subjects import LARGE, PREFETCH, all_subjects, bare
from .throughput import run_rounds

_LEAST_EVENTS = 10 * PREFETCH
"""The outer tenths do not count, and each has to hold a prefetch window."""


def main() -> int:
    """Run the benchmark and return the exit code."""
    options = _options()
    max_txn_ops = int(LARGE["ETCD_MAX_TXN_OPS"])
    try:
        with start_servers(max_txn_ops=max_txn_ops) as servers, listen_statsd() as statsd:
            machine = describe(servers)
            subjects = all_subjects(servers, statsd.settings())
            rounds = run_rounds(servers, subjects, options.rounds, options.events)
            idle = bare(servers, {**LARGE, **statsd.settings()})
            latencies = latency.measure(servers, idle)
    except (ServersUnavailableError, NotMeasuredError, AssertionError) as error:
        print(error, file=sys.stderr)
        return 1
    marks = judge(rounds, latencies)
    print_report(machine, rounds, options.events, latencies, marks)
    if options.json:
        write_json(options.json, machine, rounds, options.events, latencies, marks)
    return int(options.check and not all(mark.met for mark in marks))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=_at_least(1), default=3, help="default 3")
    parser.add_argument("--events", type=_at_least(_LEAST_EVENTS), default=40_000,
                        help=f"per subject and round, at least {_LEAST_EVENTS}; default 40000")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw figures here")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a mark is missed")
    return parser.parse_args()


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return number


if __name__ == "__main__":
    sys.exit(main())
