"""Measure what the library costs, beside references that it is compared with.

It starts RabbitMQ and etcd, in containers or as processes. DIRECTORY gets the figures as JSON, and
a page of tables. The exit code is 1 if a mark is missed, or if there is no figure.
"""

import argparse
import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

from etcd3 import Etcd3Exception

from servers.processes import CommandFailedError, ServersUnavailableError

from . import history, scenarios
from .pictures import draw
from .report import Mark, Report, compare, marks, medians, page
from .runner import Site, say

RESULTS = Path(__file__).parent / "results"
_NO_FIGURE = (ServersUnavailableError, CommandFailedError, Etcd3Exception, AssertionError, OSError)


class Scenario(NamedTuple):
    """An entry of scenarios.toml."""

    about: str
    measure: str = ""
    headings: Sequence[str] = ()
    marks: Sequence[Mapping[str, Any]] = ()
    pictures: Mapping[str, Mapping[str, Any]] = {}
    parts: Sequence[str] = ()
    rounds: int = 5
    events: int = 40_000
    # A name, since not every machine can import what the cluster needs.
    servers: str = "servers.servers:start_servers"
    servers_options: Mapping[str, Any] = {}


SCENARIOS = {
    name: Scenario(**{**entry, "about": " ".join(entry["about"].split())})
    for name, entry in tomllib.loads(Path(__file__).with_name("scenarios.toml").read_text()).items()
}


def measure(options: argparse.Namespace) -> Report:
    """Run a scenario, or its parts, on one pair of servers."""
    asked = SCENARIOS[options.what]
    options.rounds = options.rounds or asked.rounds
    options.events = options.events or asked.events
    servers = resolve_name(asked.servers)(**asked.servers_options)
    with servers as started, closing(Site(started)) as site:
        found = Report(site.machine(), options.rounds, options.events, {})
        for each in map(SCENARIOS.__getitem__, asked.parts or [options.what]):
            say(f"{each.headings[0]}:")
            tables = resolve_name(f"benchmarks.{each.measure}")(site, options)
            found.tables.update(zip(each.headings, tables, strict=True))
    return found


def marks_of(found: Report) -> list[Mark]:
    return [
        mark
        for each in SCENARIOS.values()
        for entry in each.marks
        if (table := found.tables.get(each.headings[-1]))
        for mark in marks(table, **entry)
    ]


def show(what: str, kept: Path) -> int:
    """Print the page of kept figures, write it and its pictures, and return the exit code."""
    found = Report(**json.loads(kept.read_text()))
    watched = marks_of(found)
    shown = [each for each in SCENARIOS.values() if {*each.headings} & {*found.tables}]
    notes = {each.headings[0]: each.about for each in shown}
    text = page(f"Measured by `python -m benchmarks {what}`", found, watched, notes)
    kept.with_suffix(".md").write_text(f"{text}\n")
    for each in shown:
        for name, picture in each.pictures.items():
            kept.with_name(name).write_text(draw(found.tables[each.headings[-1]], **picture))
    judged = [mark for mark in watched if mark.target]
    missed = [f"MISSED: {mark.name}" for mark in judged if mark.met is False]
    met = f"{sum(mark.met is True for mark in judged)} of {len(judged)} marks are met."
    print(text, "", *missed, *([met] if judged else []), sep="\n")
    return int(bool(missed))


def check(options: argparse.Namespace) -> int:
    """Compare the ratios with those of the last bench, and return the exit code."""
    try:
        kept = Report(**json.loads((RESULTS / "table.json").read_text()))
        compared = compare(*(medians(marks_of(each)) for each in (kept, measure(options))))
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
    add("--show", action="store_true", help="show the figures in DIRECTORY, and measure nothing")
    epilog = f"A quick look at one: calls --rounds 1 --events {least} --to /tmp/calls"
    parser = argparse.ArgumentParser("python -m benchmarks", None, __doc__, epilog)
    commands = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, each in SCENARIOS.items():
        commands.add_parser(name, help=each.about, description=each.about, parents=[common])
    options = parser.parse_args(arguments)
    if (options.rounds or 1) < 1 or (options.events or least) < least:
        parser.error(f"at least one round and {least} events are needed for a figure")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.what == "check":
        return check(options)
    kept = options.to / f"{'table' if options.what == 'bench' else options.what}.json"
    try:
        if not options.show:
            options.to.mkdir(parents=True, exist_ok=True)
            found = json.dumps(measure(options)._asdict(), ensure_ascii=False)
            kept.write_text(f"{found}\n")
        return show(options.what, kept)
    except _NO_FIGURE as error:
        say(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
