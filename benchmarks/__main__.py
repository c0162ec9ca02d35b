"""Measure what the library costs and gives, beside what it is compared with.

RabbitMQ and etcd are started for it, in containers or as processes. What is measured is kept as
JSON, and shown as a page of tables, in DIRECTORY. The exit code is 1 if a mark is missed, or there
is no figure.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from etcd3 import Etcd3Exception

from servers.processes import CommandFailedError, ServersUnavailableError

from . import history, pictures, report, scenarios
from .report import Mark, Report, Table
from .runner import SCENARIOS, Site, say

RESULTS = Path(__file__).parent / "results"
_CHECKED = ("consuming", "calls", "publishing", "idle")
_GROUPS = {"bench": ((*_CHECKED, "batches", "latency"), 5), "check": (_CHECKED, 3)}
"""The scenarios of each, and how many rounds unless told otherwise."""
_ABOUT = {
    "bench": f"{', '.join(_CHECKED)}, batches and latency, with pictures, and the ratios for check",
    "check": f"{', '.join(_CHECKED)}, to compare their ratios with those of the last bench; the "
    "exit code is 1 if one is gone or has fallen by more than a fifth, and 2 if there are none",
    **{name: scenario.about for name, scenario in SCENARIOS.items()},
}
_PICTURES = {
    "Batch size": ("throughput.svg", pictures.throughput),
    "Latency by load": ("latency.svg", pictures.latency),
}
_NO_FIGURE = (ServersUnavailableError, CommandFailedError, Etcd3Exception, AssertionError, OSError)


def measure(options: argparse.Namespace) -> Report:
    """Run the scenarios that were asked for, on one pair of servers."""
    names, rounds = _GROUPS.get(options.what, ((options.what,), None))
    chosen = [SCENARIOS[name] for name in names]
    options.rounds = options.rounds or rounds or chosen[0].rounds
    options.events = options.events or chosen[0].events
    with chosen[0].servers() as servers, closing(Site(servers)) as site:
        found = Report(site.machine(), options.rounds, options.events, {})
        for scenario in chosen:
            say(f"{scenario.headings[0]}:")
            tables = scenario.measure(site, options)
            found.tables.update(zip(scenario.headings, tables, strict=True))
    return found


def marks_of(found: Report) -> list[tuple[Mark, Table]]:
    """Return the marks of what was measured, each with its table."""
    return [
        (mark, found.tables[each.headings[-1]])
        for each in SCENARIOS.values()
        if each.headings[-1] in found.tables
        for mark in each.marks
    ]


def show(what: str, kept: Path) -> int:
    """Print the page of what was kept, write it with the pictures, and return the exit code."""
    found = Report(**json.loads(kept.read_text()))
    marks = marks_of(found)
    notes = {each.headings[0]: each.about for each in SCENARIOS.values()}
    text = report.page(f"Measured by `python -m benchmarks {what}`", found, marks, notes)
    kept.with_suffix(".md").write_text(f"{text}\n")
    for heading, (name, draw) in _PICTURES.items():
        if heading in found.tables:
            kept.with_name(name).write_text(draw(found.tables[heading]))
    if what == "bench":
        ratios = report.medians(marks)
        kept.with_name("ratios.json").write_text(json.dumps(ratios, indent=1) + "\n")
    judged = {mark.name: mark.met(table) for mark, table in marks if mark.target}
    missed = [f"MISSED: {name}" for name, met in judged.items() if met is False]
    met = f"{list(judged.values()).count(True)} of {len(judged)} marks are met."
    print(text, "", *missed, *([met] if judged else []), sep="\n")
    return int(bool(missed))


def check(options: argparse.Namespace) -> int:
    """Compare the ratios with those that are kept, and return the exit code."""
    try:
        kept = json.loads((RESULTS / "ratios.json").read_text())
        compared = report.compare(kept, report.medians(marks_of(measure(options))))
    except (ValueError, *_NO_FIGURE) as error:
        say(f"bench-check: {error}")
        return 2
    passed, lines = zip(*compared, strict=True)
    print(*lines, sep="\n")
    return int(not all(passed))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    least = scenarios.LEAST_EVENTS
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--rounds", type=int, help="how often (growth: starts at each size)")
    add("--events", type=int, help=f"of a series, at least {least}; slow consumers get fewer")
    add("--sizes", type=int, nargs="+", default=history.SIZES, help="growth: records, 0 first")
    add("--minutes", type=float, default=30, help="steady: how long (default: %(default)s)")
    add("--to", type=Path, metavar="DIRECTORY", default=RESULTS, help="default: %(default)s")
    add("--show", action="store_true", help="show what DIRECTORY has once more, measure nothing")
    epilog = f"A quick look at one: calls --rounds 1 --events {least} --to /tmp/calls"
    parser = argparse.ArgumentParser("python -m benchmarks", None, __doc__, epilog)
    commands = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, about in _ABOUT.items():
        commands.add_parser(name, help=about, description=about, parents=[common])
    options = parser.parse_args(arguments)
    if (options.rounds or 1) < 1 or (options.events or least) < least:
        parser.error(f"a round and {least} events at least, or there is no figure")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says, and return the exit code."""
    options = _options(arguments)
    if options.what == "check":
        return check(options)
    kept = options.to / f"{'table' if options.what == 'bench' else options.what}.json"
    try:
        if not options.show:
            options.to.mkdir(parents=True, exist_ok=True)
            found = json.dumps(measure(options)._asdict(), ensure_ascii=False, indent=1)
            kept.write_text(f"{found}\n")
        return show(options.what, kept)
    except _NO_FIGURE as error:
        say(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
