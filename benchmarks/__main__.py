"""Measure what the library costs and gives, beside what it is compared with.

RabbitMQ and etcd are started for it, in containers or as processes. What is measured is kept as
JSON, and shown as a page of tables, in DIRECTORY. The exit code is 1 if a mark is missed, or there
is no figure.
"""

import argparse
import json
import sys
from pathlib import Path
from textwrap import fill

from etcd3 import Etcd3Exception

from servers.processes import CommandFailedError, ServersUnavailableError

from . import pictures, tables
from .figures import Mark, NotMeasuredError, Report, Table, compare, medians
from .scenarios import BENCH, CHECK, SCENARIOS
from .sites import open_site
from .subjects import LEAST_EVENTS
from .throughput import Asked

RESULTS = Path(__file__).parent / "results"

_RATIOS = "ratios.json"
_SIZES = (0, 10_000, 100_000, 1_000_000)
_NO_FIGURE = (
    ServersUnavailableError,
    CommandFailedError,
    NotMeasuredError,
    Etcd3Exception,
    AssertionError,
    OSError,
)
_CHECKED = (
    "The first four, to compare their ratios with those of the last bench. The exit code is 1 if "
    "one is gone or has fallen by more than a fifth, and 2 if there are none."
)
_GROUPS = {
    **{name: ((name,), each.rounds, each.about) for name, each in SCENARIOS.items()},
    "bench": (BENCH, 5, "The first six, with pictures, and the ratios for check."),
    "check": (CHECK, 3, _CHECKED),
}
"""What can be asked for: its scenarios, how many rounds unless told otherwise, and what it is."""
_QUICK = f"A quick look at one: calls --rounds 1 --events {LEAST_EVENTS} --to /tmp/calls"
_PICTURES = {
    "Batch size": ("throughput.svg", pictures.throughput),
    "Latency by load": ("latency.svg", pictures.latency),
}


def measure(options: argparse.Namespace) -> Report:
    """Run the scenarios that were asked for, on one pair of servers."""
    names, rounds, _ = _GROUPS[options.what]
    scenarios = [SCENARIOS[name] for name in names]
    events = options.events or scenarios[0].events
    asked = Asked(options.rounds or rounds, events, options.sizes, options.minutes, _say)
    with open_site(scenarios[0].servers) as site:
        report = Report(site.machine(), asked.rounds, events, {})
        for scenario in scenarios:
            _say(f"{scenario.headings[0]}:")
            found = scenario.measure(site, asked)
            report.tables.update(zip(scenario.headings, found, strict=True))
    return report


def marks_of(report: Report) -> list[tuple[Mark, Table]]:
    """Return the marks of what was measured, each with its table."""
    last = ((each, each.headings[-1]) for each in SCENARIOS.values())
    tables = ((each.marks, report.tables[name]) for each, name in last if name in report.tables)
    return [(mark, table) for marks, table in tables for mark in marks]


def show(what: str, report: Report, directory: Path) -> int:
    """Print the page, write it with the pictures, and return the exit code."""
    marks = marks_of(report)
    notes = {each.headings[0]: each.about for each in SCENARIOS.values()}
    page = tables.page(f"Measured by `python -m benchmarks {what}`", report, marks, notes)
    (directory / f"{_stem(what)}.md").write_text(f"{page}\n")
    for heading, (name, draw) in _PICTURES.items():
        if heading in report.tables:
            (directory / name).write_text(draw(report.tables[heading]))
    if what == "bench":
        (directory / _RATIOS).write_text(json.dumps(medians(marks), indent=1) + "\n")
    judged = {mark.name: mark.met(table) for mark, table in marks if mark.target}
    missed = [f"MISSED: {name}" for name, met in judged.items() if met is False]
    met = f"{list(judged.values()).count(True)} of {len(judged)} marks are met."
    print(page, "\n".join([*missed, met] if judged else []), sep="\n\n")
    return int(bool(missed))


def check(options: argparse.Namespace) -> int:
    """Compare the ratios with those that are kept, and return the exit code."""
    try:
        kept = json.loads((RESULTS / _RATIOS).read_text())
        compared = compare(kept, medians(marks_of(measure(options))))
    except (ValueError, *_NO_FIGURE) as error:
        _say(f"bench-check: {error}")
        return 2
    print(*(line for _, line in compared), sep="\n")
    return int(not all(passes for passes, _ in compared))


def _stem(what: str) -> str:
    return {"bench": "table"}.get(what, what)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    about = [
        fill(f"{name:11}{text}", 96, initial_indent="  ", subsequent_indent=13 * " ")
        for name, (_, _, text) in _GROUPS.items()
    ]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog="\n".join(["WHAT is one of:", *about, "", _QUICK]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("what", choices=_GROUPS, metavar="WHAT", help="what to measure, see below")
    add("--rounds", type=int, help="how often (growth: starts at each size)")
    add(
        "--events", type=int, help=f"of a series, at least {LEAST_EVENTS}; slow consumers get fewer"
    )
    add("--sizes", type=int, nargs="+", default=_SIZES, help="growth: records, 0 first")
    add("--minutes", type=float, default=30, help="steady: how long (default: %(default)s)")
    add("--to", type=Path, metavar="DIRECTORY", default=RESULTS, help="default: %(default)s")
    add("--show", action="store_true", help="show what DIRECTORY has once more, measure nothing")
    options = parser.parse_args()
    if (options.rounds or 1) < 1 or (options.events or LEAST_EVENTS) < LEAST_EVENTS:
        parser.error(f"a round and {LEAST_EVENTS} events at least, or there is no figure")
    return options


def main() -> int:
    """Do what the command line says, and return the exit code."""
    options = _options()
    if options.what == "check":
        return check(options)
    kept = options.to / f"{_stem(options.what)}.json"
    try:
        if not options.show:
            options.to.mkdir(parents=True, exist_ok=True)
            measure(options).write(kept)
        return show(options.what, Report.read(kept), options.to)
    except _NO_FIGURE as error:
        _say(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
