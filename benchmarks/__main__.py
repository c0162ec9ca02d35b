"""Measure everything, print the tables and write them with the ratios and the pictures."""

import sys
from pathlib import Path

from harness.packages import ServersUnavailableError

from .markdown import publish
from .marks import judge, verdict
from .measuring import start_measuring
from .options import parser
from .pictures import draw
from .progress import NotMeasuredError
from .ratios import KEPT, medians, ratios, write_ratios
from .report import render
from .results import Results

_ROUNDS = 5


def main() -> int:
    """Run the benchmark; the exit code is 1 if a mark is missed, or there is no figure."""
    options = parser("python -m benchmarks", __doc__, _ROUNDS)
    options.add_argument(
        "--to",
        type=Path,
        metavar="DIRECTORY",
        default=KEPT.parent,
        help="where the results go; default benchmarks/results",
    )
    chosen = options.parse_args()
    try:
        with start_measuring(chosen.rounds, chosen.events) as measuring:
            results = measuring.everything()
    except (ServersUnavailableError, NotMeasuredError, AssertionError) as error:
        print(error, file=sys.stderr)
        return 1
    said, met = write(chosen.to, results)
    print(f"\n{said}")
    return int(not met)


def write(directory: Path, results: Results) -> tuple[str, bool]:
    """Print the tables, write all files of a run, and return its verdict."""
    found = ratios(results)
    marks = judge(found)
    publish(render(results, marks), directory / "table.md")
    draw(directory, results)
    write_ratios(directory / KEPT.name, medians(found))
    return verdict(marks)


if __name__ == "__main__":
    sys.exit(main())
