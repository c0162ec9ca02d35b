"""The report of a run: one HTML page that needs nothing else, neither a server nor a script."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from demo.chart import Axes, Band, chart
from demo.play import COUNTERS, Play
from demo.screen import Entry
from demo.stage import NO_ANSWER, SERVICES
from demo.watch import Sample, Watch
from servers.servers import REPOSITORY

REPORT = REPOSITORY / "demo-report.html"

_STYLE = Path(__file__).with_name("report.css")
_LEGEND = {
    "processed": "<b>{}</b> processed",
    "skipped": "<b>{}</b> skipped",
    "waiting": "at most <b>{}</b> waiting in its queue",
    "open": "circuit breaker open: events are held",
}
_MARGIN = 0.03
"""Of the time of the run, after its end: what came last is to be seen too."""


Line = Sequence[tuple[float, float]]
"""A number over time: from each time on (Unix, in seconds) it has the value beside it."""


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
    """Return the whole page."""
    passed = sum(entry.kind == "passed" for entry in run.story)
    failed = any(entry.kind == "failed" for entry in run.story)
    verdict = "A check failed, after {} that passed" if failed else "All {} checks passed"
    title = escape(verdict.format(passed))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{_STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<header class="{"failed" if failed else "passed"}">
<p>Reliability Nirvana: the demo</p>
<h1>{title}</h1>
{_facts(run)}
</header>
<main>
{"".join(_graphs(run))}
{"".join(_acts(run.story))}
</main>
<footer><p>{_SOURCES}</p></footer>
</body>
</html>
"""


def _facts(run: Run) -> str:
    when = time.strftime("%Y-%m-%d %H:%M %z", time.localtime(run.ended_at))
    facts = {
        "When": f"{when}, for {run.ended_at - _bands(run)[0].begin:.0f}\u00a0s",
        "Where": run.place,
        "Servers": ", ".join(run.versions) or "(they did not tell their versions)",
    }
    rows = (f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items())
    return f"<dl>{''.join(rows)}</dl>"


_SOURCES = (
    "Counters and queues were read twice a second; Graphite shows a count a second or two late. "
    "To play it again: <code>make demo</code>, or one act of it: <code>make demo ACT=2</code>."
)


def _bands(run: Run) -> list[Band]:
    headings = [entry for entry in run.story if entry.kind == "heading"]
    return [Band(entry.text.partition(":")[0], entry.at) for entry in headings]


def _graphs(run: Run) -> Iterator[str]:
    axes = _axes(run)
    yield '<section class="graphs"><h2>What the services counted</h2>'
    for service in SERVICES:
        lines = _lines(run, service, axes.top)
        most = {name: _most(line) for name, line in lines.items()}
        text = (
            f"At the end {most['processed']} processed and {most['skipped']} skipped; "
            f"at most {most['waiting']} waiting in its queue."
        )
        picture = chart(service, f"{service}, over the time of the run", text, axes, lines)
        yield f"<figure><h3>{service}</h3>{picture}{_legend(most)}</figure>"
    yield "</section>"


def _lines(run: Run, service: str, top: int) -> dict[str, Line]:
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


def _axes(run: Run) -> Axes:
    bands = _bands(run)
    margin = (run.ended_at - bands[0].begin) * _MARGIN
    read = [(*sample.counts.values(), *sample.waiting.values()) for sample in run.samples]
    top = max((value or 0 for values in read for value in values), default=0)
    return Axes(bands, run.ended_at + margin, max(1, top))


def _line(run: Run, read: Callable[[Sample], int | None]) -> Line:
    values = ((sample.at, read(sample)) for sample in run.samples)
    return [(at, value) for at, value in values if value is not None]


def _most(line: Line) -> int:
    return round(max((value for _, value in line), default=0))


def _legend(most: dict[str, int]) -> str:
    items = (f'<li class="{name}">{_LEGEND[name].format(most[name])}</li>' for name in most)
    return f"<figcaption><ul>{''.join(items)}</ul></figcaption>"


def _acts(story: Sequence[Entry]) -> Iterator[str]:
    """Return a section for each heading, with all that was told until the next."""
    begun = False
    for entry in story:
        if entry.kind == "heading":
            yield "</section>" * begun
            yield f"<section><h2>{escape(entry.text)}</h2><p>{escape(entry.more)}</p>"
            begun = True
        elif begun and entry.text:
            yield _told(entry)
    yield "</section>" * begun


def _told(entry: Entry) -> str:
    text, more = escape(entry.text), escape(entry.more)
    if entry.kind in {"passed", "failed"}:
        mark = "✓" if entry.kind == "passed" else "✗"
        seen = f" <code>{more}</code>" if more else ""
        return (
            f'<p class="check {entry.kind}"><b role="img" aria-label="{entry.kind}">{mark}</b>'
            f"<span>{text}</span>{seen}</p>"
        )
    if entry.kind == "typed":
        return f"<pre><code>{text}</code></pre>"
    if entry.kind == "log":
        return f'<h3>{text}</h3><pre class="log">{more}</pre>'
    return f"<p>{text}</p>"
