"""The report of a run: one HTML page that needs nothing else, neither a server nor a script."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from demo.play import COUNTERS, Play
from demo.screen import Entry
from demo.stage import NO_ANSWER, SERVICES
from demo.watch import Sample, Watch
from servers.servers import REPOSITORY

REPORT = REPOSITORY / "demo-report.html"

_FILES = FileSystemLoader(Path(__file__).parent)
_PAGE = Environment(loader=_FILES, autoescape=True, trim_blocks=True).get_template("report.html")
_MARGIN = 0.03
"""Of the time of the run, after its end: what came last is to be seen too."""

_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600)
_MOST_TICKS = 6
_LETTER = 7

Line = Sequence[tuple[float, float]]
"""A number over time: from each time on (Unix, in seconds) it has the value beside it."""


@dataclass(frozen=True)
class Axes:
    """Where the graphs have times and values: from 26 to 394 and from 188 up to 20, of 400 x 210.

    `acts` are their names, each with its begin; `top` is the largest value.
    """

    acts: Sequence[tuple[str, float]]
    end: float
    top: int

    def x(self, at: float) -> float:
        """Return where a time is; times outside are moved to the edge."""
        begin = self.acts[0][1]
        share = (at - begin) / max(self.end - begin, 1e-9)
        return round(26 + 368 * min(max(share, 0.0), 1.0), 1)

    def y(self, value: float) -> float:
        """Return where a value is."""
        return round(188 - 168 * value / self.top, 1)

    def bands(self) -> Iterator[tuple[str, float, float]]:
        """Yield each act's name, or its last letter where there is no room, and left and width."""
        ends = [*(begin for _, begin in self.acts), self.end]
        for (name, _), (begin, end) in zip(self.acts, pairwise(ends), strict=True):
            width = round(self.x(end) - self.x(begin), 1)
            yield name if len(name) * _LETTER <= width else name[-1:], self.x(begin), width

    def values(self) -> range:
        """Return the values that have a grid line."""
        return range(0, self.top + 1, -(-self.top // 4))

    def seconds(self) -> range:
        """Return the times that are written, in seconds from the begin."""
        length_s = int(self.end - self.acts[0][1])
        step_s = next((s for s in _STEPS_S if length_s / s < _MOST_TICKS), length_s)
        return range(0, length_s + 1, step_s)

    def path(self, line: Line) -> str:
        """Return a line in steps, from its zero to the end, as SVG has it."""
        steps = "".join(f"H{self.x(at)}V{self.y(value)}" for at, value in line)
        return f"M26 {self.y(0)}{steps}H{self.x(self.end)}"


@dataclass(frozen=True)
class Run:
    """All that the report shows."""

    story: Sequence[Entry]
    place: str
    versions: Sequence[str]
    samples: Sequence[Sample]
    ended_at: float


def run_of(play: Play, watch: Watch) -> Run:
    """Put together what has been told and seen."""
    try:
        versions = play.stage.versions()
    except NO_ANSWER:
        versions = []
    story, samples = list(play.screen.story), list(watch.samples)
    return Run(story, play.stage.place, versions, samples, ended_at=time.time())


def write_report(run: Run, path: Path = REPORT) -> str:
    """Write it, and return the sentence that says where it is, or why it is not."""
    try:
        path.write_text(page(run), encoding="utf-8")
    except OSError as error:
        return f"The report cannot be written: {error}"
    return f"Report: {path}"


def page(run: Run) -> str:
    acts: list[tuple[Entry, list[Entry]]] = []
    for entry in run.story:
        if entry.kind == "heading":
            acts.append((entry, []))
        elif acts and entry.text:
            acts[-1][1].append(entry)
    bands = [(heading.text.partition(":")[0], heading.at) for heading, _ in acts]
    length_s = run.ended_at - bands[0][1]
    read = [(*sample.counts.values(), *sample.waiting.values()) for sample in run.samples]
    top = max([1, *(value or 0 for values in read for value in values)])
    when = time.strftime("%Y-%m-%d %H:%M %z", time.localtime(run.ended_at))
    return _PAGE.render(
        kinds=[entry.kind for entry in run.story],
        facts={
            "When": f"{when}, for {length_s:.0f}\u00a0s",
            "Where": run.place,
            "Servers": ", ".join(run.versions) or "(they did not tell their versions)",
        },
        axes=Axes(bands, run.ended_at + length_s * _MARGIN, top),
        graphs={service: _lines(run, service, top) for service in SERVICES},
        most_of=_most,
        acts=acts,
    )


def _lines(run: Run, service: str, top: int) -> dict[str, Line]:
    """Return a service's lines by their CSS classes."""
    processed, skipped = (name for name in COUNTERS if COUNTERS[name] == service)
    lines = {
        "waiting": _line(run, lambda sample: sample.waiting[service]),
        "processed": _line(run, lambda sample: sample.counts[processed]),
        "skipped": _line(run, lambda sample: sample.counts[skipped]),
    }
    breaker = _line(run, lambda sample: sample.breakers.get(service))
    if any(value for _, value in breaker):
        lines["open"] = [(at, top * (value > 0)) for at, value in breaker]
    return lines


def _line(run: Run, read: Callable[[Sample], int | None]) -> Line:
    values = ((sample.at, read(sample)) for sample in run.samples)
    return [(at, value) for at, value in values if value is not None]


def _most(lines: dict[str, Line]) -> dict[str, int]:
    return {name: round(max((n for _, n in line), default=0)) for name, line in lines.items()}
