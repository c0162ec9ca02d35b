"""What a longer history costs: start-up, import, memory, throughput and etcd, by its length.

`python -m benchmarks.growth`, from the repository's root with `tests` on the path.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness.packages import ServersUnavailableError
from harness.server import CommandFailedError
from harness.servers import REPOSITORY, start_servers
from harness.statsd import listen_statsd
from idempotent_consumer.etcd import EtcdError

from .growing import Growth
from .growth_report import report
from .machine import describe
from .markdown import publish
from .progress import NotMeasuredError

SIZES = (0, 10_000, 100_000, 1_000_000)


def main() -> int:
    """Measure at each size, print and write the table; the exit code is 1 if a mark is missed."""
    options = _options()
    try:
        with start_servers() as servers, listen_statsd() as statsd:
            machine = describe(servers)
            growth = Growth(servers, statsd, options.starts, options.events)
            grown = [growth.measure(size) for size in options.sizes]
            deletion_bytes = growth.deletion_bytes()
            growth.close()
    except (
        ServersUnavailableError,
        CommandFailedError,
        NotMeasuredError,
        EtcdError,
        AssertionError,
    ) as error:
        print(error, file=sys.stderr)
        return 1
    text, met = report(machine, grown, deletion_bytes)
    publish(text, options.results)
    return int(not met)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="0 first, ascending")
    parser.add_argument("--starts", type=int, default=7, help="at each size; default 7")
    parser.add_argument(
        "--events", type=int, default=60_000, help="for each size's throughput; default 60000"
    )
    parser.add_argument(
        "--results", type=Path, metavar="FILE", default=REPOSITORY / "benchmarks/results/growth.md"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
