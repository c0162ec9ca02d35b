"""Measure everything, print the tables and write them with the pictures and the raw figures."""

import sys
from pathlib import Path

from harness.packages import ServersUnavailableError

from .marks import judge
from .measuring import start_measuring
from .options import parser
from .pictures import draw
from .progress import NotMeasuredError
from .ratios import KEPT, medians, ratios, write_ratios
from .report import render
from .results import Results, write_figures

_ROUNDS = 5


def main() -> int:
    """Run the benchmark and return the exit code: 1 where there is no figure."""
    options = parser("python -m benchmarks", __doc__, _ROUNDS)
    options.add_argument("--to", type=Path, metavar="DIRECTORY", default=KEPT.parent,
                         help="where the results go; default benchmarks/results")
    chosen = options.parse_args()
    try:
        with start_measuring(chosen.rounds, chosen.events) as measuring:
            results = measuring.everything()
    except (ServersUnavailableError, NotMeasuredError, AssertionError) as error:
        print(error, file=sys.stderr)
        return 1
    write(chosen.to, results)
    return 0


def write(directory: Path, results: Results) -> None:
    """Print the tables, and write all files of a run."""
    found = ratios(results)
    text = render(results, judge(found))
    print(text)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "table.md").write_text(text + "\n")
    draw(directory, results)
    write_ratios(directory / KEPT.name, medians(found))
    write_figures(directory / "figures.json", results)


if __name__ == "__main__":
    sys.exit(main())
