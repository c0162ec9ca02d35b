"""Whether memory and etcd stay as they are at full rate, with a window of a minute.

`python -m benchmarks.steady`, from the repository's root with `tests` on the path.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness.packages import ServersUnavailableError
from harness.servers import REPOSITORY, start_servers
from harness.statsd import listen_statsd

from .machine import describe
from .markdown import publish
from .preparing import channel
from .progress import NotMeasuredError
from .steadily import run
from .steady_report import Setting, report
from .subjects import LARGE, bare

WINDOW_S = 60
LEASE_S = WINDOW_S + 6
"""The library grants a lease for the window and a tenth of it."""
COMPACTION = (
    "--auto-compaction-mode=periodic",
    "--auto-compaction-retention=1m",
    "--experimental-compaction-batch-limit=10000",
)
"""Of history a minute, so that what is given back shows within the run; the last as in compose."""

_EMPTY_WITHIN_S = 400.0


def main() -> int:
    """Run, print and write the table; the exit code is 1 if something grew."""
    options = _options()
    try:
        with (
            start_servers(etcd_flags=COMPACTION) as servers,
            listen_statsd() as statsd,
        ):
            machine = describe(servers)
            subject = bare(
                servers,
                {
                    **LARGE,
                    **statsd.settings(),
                    "DEDUP_WINDOW": f"{WINDOW_S}s",
                },
            )
            with channel(servers) as declaring:
                subject.declare(declaring)
            found = run(servers, subject, 60 * options.minutes, _EMPTY_WITHIN_S)
    except (ServersUnavailableError, NotMeasuredError, AssertionError) as error:
        print(error, file=sys.stderr)
        return 1
    setting = Setting(WINDOW_S, LEASE_S, " ".join(COMPACTION))
    text, met = report(machine, setting, found)
    publish(text, options.results)
    return int(not met)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steady", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="default 30")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", default=REPOSITORY / "benchmarks/results/steady.md"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
