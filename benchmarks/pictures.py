"""The pictures of a run, in SVG: throughput by batch size, and latency by load."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import count, takewhile
from math import ceil, floor, log10

from .results import PER_MILLE, Bench, Spread, per_s
from .subjects import CEILING, SWEEP

_WIDTH, _HEIGHT = 720, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 700, 80, 390
_BLUE, _ORANGE, _RED, _GREY = "#0b62a4", "#d9730d", "#b3261e", "#555"
_STYLE = (
    "text{font:15px sans-serif;fill:#222}path{fill:none;stroke-width:2.5}"
    ".grid{stroke:#ddd;stroke-width:1}.whisker{stroke-width:1.5}"
)


class Chart:
    """Lines over a logarithmic x axis, at whose values they have their points."""

    def __init__(
        self, title: str, x_label: str, xs: Mapping[int, str], ys: Sequence[float], *, log: bool
    ) -> None:
        """Take the labels of the x axis by its values, and the ticks of the y axis, from below."""
        self._xs, self._ys, self._log = list(xs), ys, log
        self._parts = [f'<text x="16" y="30" style="font-size:19px">{escape(title)}</text>']
        self._legend_x = float(_LEFT)
        for y in ys:
            at = self._y(y)
            self._path(f"M{_LEFT} {at}H{_RIGHT}", 'class="grid"')
            self._text(_LEFT - 8, at + 5, f"{y:,g}", "end")
        for x, label in xs.items():
            for number, line in enumerate(label.splitlines()):
                self._text(self._x(x), _BOTTOM + 22 + 18 * number, line)
        self._text((_LEFT + _RIGHT) / 2, _HEIGHT - 12, x_label)

    def band(self, spread: Spread, label: str) -> None:
        """Draw a figure that holds for all x."""
        top, bottom = self._y(spread.greatest), self._y(spread.least)
        self._parts.append(
            f'<rect x="{_LEFT}" y="{top}" width="{_RIGHT - _LEFT}" height="{bottom - top:.1f}" '
            f'fill="{_GREY}" opacity=".12"/>'
        )
        style = f'stroke="{_GREY}" stroke-dasharray="8 5"'
        self._path(f"M{_LEFT} {self._y(spread.median)}H{_RIGHT}", style)
        self._text(_LEFT + 10, top - 7, label, "start")

    def line(self, label: str, color: str, points: Mapping[int, Spread]) -> None:
        """Draw the medians as a line, and from the least to the greatest a whisker."""
        places = [(self._x(x), *map(self._y, spread)) for x, spread in points.items()]
        stroke = f'stroke="{color}"'
        whiskers = (f"M{x} {a}V{b}m-4 0h8M{x} {a}m-4 0h8" for x, _, a, b in places)
        self._path("M" + "L".join(f"{x} {y}" for x, y, _, _ in places), stroke)
        self._path("".join(whiskers), f'class="whisker" {stroke}')
        for x, y, _, _ in places:
            self._circle(x, y, color)
        self._circle(self._legend_x + 8, _TOP - 25, color)
        self._text(self._legend_x + 20, _TOP - 20, label, "start")
        self._legend_x += 50 + 8 * len(label)

    def svg(self) -> str:
        """Return the picture."""
        body = "\n".join(self._parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
            f'width="{_WIDTH}" height="{_HEIGHT}">\n<style>{_STYLE}</style>\n'
            f'<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n'
        )

    def _x(self, x: float) -> float:
        share = log10(x / self._xs[0]) / log10(self._xs[-1] / self._xs[0])
        return round(_LEFT + 30 + share * (_RIGHT - _LEFT - 60), 1)

    def _y(self, y: float) -> float:
        lowest, highest = self._ys[0], self._ys[-1]
        if self._log:
            share = log10(y / lowest) / log10(highest / lowest)
        else:
            share = (y - lowest) / (highest - lowest)
        return round(_BOTTOM - share * (_BOTTOM - _TOP), 1)

    def _path(self, d: str, attributes: str) -> None:
        self._parts.append(f'<path d="{d}" {attributes}/>')

    def _circle(self, x: float, y: float, color: str) -> None:
        self._parts.append(f'<circle cx="{x}" cy="{y}" r="5" fill="{color}"/>')

    def _text(self, x: float, y: float, text: str, anchor: str = "middle") -> None:
        place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
        self._parts.append(f"<text {place}>{escape(text)}</text>")


def throughput(found: Bench) -> str:
    """Draw the events recorded per second, by batch size, below the ceiling."""
    ceiling = per_s(found.sweep, CEILING.name)
    highest = 1.1 * ceiling.greatest
    step = next(tick for tick in _round_numbers(1) if highest / tick <= 8)
    chart = Chart(
        "Events recorded per second, by batch size",
        "most events in one transaction (BATCH_SIZE)",
        {size: str(size) for size in SWEEP},
        [step * number for number in range(ceil(highest / step) + 1)],
        log=False,
    )
    chart.band(ceiling, "RabbitMQ and pika alone (the ceiling)")
    for number, (label, color) in enumerate((("no effect", _BLUE), ("one effect", _ORANGE))):
        names = {size: subjects[number].name for size, subjects in SWEEP.items()}
        points = {size: per_s(found.sweep, name) for size, name in names.items()}
        chart.line(label, color, points)
    return chart.svg()


def latency(found: Bench) -> str:
    """Draw the milliseconds from due to recorded, by load."""
    shown = [ms for load in found.loads for ms in load.ms.values() if ms] or [Spread(1, 1, 9)]
    lowest = 10.0 ** floor(log10(min(ms.least for ms in shown)))
    highest = max(ms.greatest for ms in shown)
    numbers = list(takewhile(lambda number: number <= highest, _round_numbers(lowest)))
    chart = Chart(
        "Milliseconds from due to recorded in etcd, by load",
        "events per second, at a steady rate",
        {
            load.per_s: f"{load.per_s:,}" + ("" if load.kept else "\n(not reached)")
            for load in found.loads
        },
        [*numbers, next(number for number in _round_numbers(lowest) if number > highest)],
        log=True,
    )
    for name, color in zip(PER_MILLE, (_BLUE, _ORANGE, _RED), strict=True):
        points = {load.per_s: ms for load in found.loads if (ms := load.ms[name])}
        if points:
            chart.line(name, color, points)
    return chart.svg()


def _round_numbers(first: float) -> Iterator[float]:
    """Yield 1, 2, 5, 10 and so on, times the first."""
    for decade in count():
        yield from (first * digit * 10**decade for digit in (1, 2, 5))
