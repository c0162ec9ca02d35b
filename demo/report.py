"""The report of a run: one HTML page that needs no other file, no server and no script."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from demo.play import Play
from demo.screen import Entry
from demo.stage import NO_ANSWER, SERVICES
from demo.watch import Sample, Watch
from servers.servers import REPOSITORY

REPORT = REPOSITORY / "demo-report.html"

_FILES = FileSystemLoader(Path(__file__).parent)
_PAGE = Environment(loader=_FILES, autoescape=True, trim_blocks=True).get_template("report.html")
_MARGIN = 0.03
"""The share of the run's time that is added after its end, so that the last change is visible."""

_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600)
_MOST_TICKS = 6
_LETTER = 7

Line = Sequence[tuple[float, float]]
"""A number over time: pairs of a Unix time in seconds and the value from that time on."""


@dataclass(frozen=True)
class Axes:
    """Where the graphs, of 400 x 210, have times (x from 26 to 394) and values (y from 188 to 20).

    `acts` are the names of the acts and their begins; `top` is the largest value.
    """

    acts: Sequence[tuple[str, float]]
    end: float
    top: int

    def x(self, at: float) -> float:
        """Return the place of a time; times outside of the run are moved to the edge."""
        begin = self.acts[0][1]
        share = (at - begin) / max(self.end - begin, 1e-9)
        return round(26 + 368 * min(max(share, 0.0), 1.0), 1)

    def y(self, value: float) -> float:
        """Return the place of a value."""
        return round(188 - 168 * value / self.top, 1)

    def bands(self) -> Iterator[tuple[str, float, float]]:
        """Yield the name of each act (its last letter if there is no room), left and width."""
        ends = [*(begin for _, begin in self.acts), self.end]
        for (name, _), (begin, end) in zip(self.acts, pairwise(ends), strict=True):
            width = round(self.x(end) - self.x(begin), 1)
            yield name if len(name) * _LETTER <= width else name[-1:], self.x(begin), width

    def values(self) -> range:
        """Return the values of the grid lines."""
        return range(0, self.top + 1, -(-self.top // 4))

    def seconds(self) -> range:
        """Return the times that are labelled, in seconds since the begin."""
        length_s = int(self.end - self.acts[0][1])
        step_s = next((s for s in _STEPS_S if length_s / s < _MOST_TICKS), length_s)
        return range(0, length_s + 1, step_s)

    def path(self, line: Line) -> str:
        """Return a line as an SVG path in steps, from 0 at the begin to the end."""
        steps = "".join(f"H{self.x(at)}V{self.y(value)}" for at, value in line)
        return f"M26 {self.y(0)}{steps}H{self.x(self.end)}"


def write_report(play: Play, watch: Watch, path: Path = REPORT) -> str:
    """Write the report, and return a sentence that says where it is or why it is missing."""
    try:
        path.write_text(page(play, watch), encoding="utf-8")
    except OSError as error:
        return f"The report cannot be written: {error}"
    return f"Report: {path}"


def page(play: Play, watch: Watch) -> str:
    ended_at, story, samples = time.time(), list(play.screen.story), list(watch.samples)
    acts: list[tuple[Entry, list[Entry]]] = []
    for entry in story:
        if entry.kind == "heading":
            acts.append((entry, []))
        elif acts and entry.text:
            acts[-1][1].append(entry)
    try:
        versions = ", ".join(play.stage.versions())
    except NO_ANSWER:
        versions = "(they did not tell their versions)"
    bands = [(heading.text.partition(":")[0], heading.at) for heading, _ in acts]
    length_s = ended_at - bands[0][1]
    readings = [reading for sample in samples for reading in sample.services.values()]
    top = max([1, *(value or 0 for reading in readings for value in reading)])
    when = time.strftime("%Y-%m-%d %H:%M %z", time.localtime(ended_at))
    return _PAGE.render(
        kinds=[entry.kind for entry in story],
        facts={
            "When": f"{when}, for {length_s:.0f}\u00a0s",
            "Where": play.stage.place,
            "Servers": versions,
        },
        axes=Axes(bands, ended_at + length_s * _MARGIN, top),
        graphs={service: _lines(samples, service, top) for service in SERVICES},
        most_of=_most,
        acts=acts,
    )


def _lines(samples: Sequence[Sample], service: str, top: int) -> dict[str, Line]:
    """Return a service's lines by their CSS classes."""
    readings = [(sample.at, sample.services[service]) for sample in samples]
    lines: dict[str, Line] = {
        kind: [(at, value) for at, each in readings if (value := getattr(each, kind)) is not None]
        for kind in ("waiting", "processed", "skipped", "open")
    }
    is_open = [(at, top * (value > 0)) for at, value in lines.pop("open")]
    return lines | ({"open": is_open} if any(value for _, value in is_open) else {})


def _most(lines: dict[str, Line]) -> dict[str, int]:
    return {name: round(max((n for _, n in line), default=0)) for name, line in lines.items()}
