"""The panel below the story: the current act, and what the services and queues hold."""

import time

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from demo.play import Play
from demo.stage import SERVICES
from demo.watch import Sample, Watch

_STYLES = {"running": "green", "starting": "yellow", "stopping": "yellow"}
_STYLES |= {"stopped": "red", "killed": "red"}
_HELD = "events stay unacked; one at a time is called, until a call succeeds"
_DOTS = {"processed": ("●", "cyan"), "skipped": ("○", "magenta"), "waiting": ("■", "yellow")}
_MOST_DOTS = 8
_OPEN = "breaker open"
_NEW_WITHIN_S = 2.0


def panel(play: Play, watch: Watch) -> Panel:
    """Draw the newest sample in eight lines of up to 80 columns."""
    story, samples = list(play.screen.story), list(watch.samples)
    headings = [entry for entry in story if entry.kind == "heading"]
    title = headings[-1].text if headings else "The demo"
    elapsed_s = int(time.time() - headings[0].at) if headings else 0
    progress = f"checks passed: {play.passed}   {elapsed_s // 60}:{elapsed_s % 60:02}"

    table = Table(box=None, expand=True, pad_edge=False, header_style="dim")
    for header, width in (("", 7), ("state", 12), ("processed", 14), ("skipped", 14)):
        table.add_column(header, width=width, no_wrap=True)
    table.add_column("waiting in queue", no_wrap=True)
    for service in SERVICES:
        table.add_row(*_row(service, play.stage.states[service], samples))

    facts = Table.grid(padding=(0, 1))
    # Rich first shrinks a column that may wrap: the texts, not their names.
    facts.add_column(style="dim", width=7, no_wrap=True)
    facts.add_column()
    newest = samples[-1].services.values() if samples else ()
    why, text = "skipped", play.skipping(sum(reading.skipped or 0 for reading in newest))
    if any(reading.open for reading in newest):
        why, text = "held", _HELD
    typed = next((entry.text for entry in reversed(story) if entry.kind == "typed"), "")
    command = typed.partition("\n")[0].rstrip(" \\")
    for name, fact in ((why, text), ("command", command)):
        facts.add_row(name, Text(fact, no_wrap=True, overflow="ellipsis"))

    return Panel(
        Group(table, "", facts),
        title=Text(f" {title} ", style="bold"),
        title_align="left",
        subtitle=Text(f" {progress} ", style="dim"),
        subtitle_align="right",
        border_style="blue",
    )


def _row(service: str, state: str, samples: list[Sample]) -> list[Text]:
    readings = [
        sample.services[service]
        for sample in samples
        if sample.at >= samples[-1].at - _NEW_WITHIN_S
    ]
    if state == "running" and readings and readings[-1].open:
        state = _OPEN
    return [
        Text(service, style="bold"),
        Text(state, style=_STYLES.get(state, "dim")),
        *(_number(kind, [getattr(reading, kind) for reading in readings]) for kind in _DOTS),
    ]


def _number(kind: str, recent: list[int | None]) -> Text:
    """Draw a number in digits and as dots; the digits are reversed if it has just changed."""
    if not recent or (now := recent[-1]) is None:
        return Text("-", style="dim")
    dot, colour = _DOTS[kind]
    changed = any(value not in {now, None} for value in recent)
    return Text.assemble(
        (f"{now:>3} ", "bold reverse" if changed else "bold"),
        " ",
        (dot * min(now, _MOST_DOTS) + ("…" if now > _MOST_DOTS else ""), colour),
    )
