"""The pictures of a run, in SVG: throughput by batch size, and latency by load."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import product
from math import ceil, log10
from statistics import median

from .report import Table
from .scenarios import CEILING, PER_MILLE, SWEEP

_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 700, 80, 390
_COLORS = ("#0b62a4", "#d9730d", "#b3261e")
_START = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 460" width="720" height="460">
<style>text{font:15px sans-serif;fill:#222}path{fill:none;stroke-width:2.5}\
.grid{stroke:#ddd;stroke-width:1}.whisker{stroke-width:1.5}</style>
<rect width="100%" height="100%" fill="#fff"/>"""
_ROUND_NUMBERS = [digit * 10.0**decade for decade, digit in product(range(-3, 9), (1, 2, 5))]

Scale = Callable[[float], float]
Lines = Mapping[str, Mapping[int, Sequence[float]]]
"""Figures by the label of their line and their place on the x axis."""


def throughput(table: Table) -> str:
    """Draw the events recorded per second, by batch size, below the ceiling."""
    ceiling = table[CEILING.name]["events/s"]
    lines = {
        effects: {size: table[subjects[n].name]["events/s"] for size, subjects in SWEEP.items()}
        for n, effects in enumerate(("no effect", "one effect"))
    }
    step = next(tick for tick in _ROUND_NUMBERS if 1.1 * max(ceiling) / tick <= 8)
    return _draw(
        "Events recorded per second, by batch size",
        "most events in one transaction (BATCH_SIZE)",
        {size: str(size) for size in SWEEP},
        [step * number for number in range(ceil(1.1 * max(ceiling) / step) + 1)],
        {**lines, "RabbitMQ and pika alone (the ceiling)": dict.fromkeys(SWEEP, ceiling)},
    )


def latency(table: Table) -> str:
    """Draw the milliseconds from due to recorded, by load, on a logarithmic axis."""
    loads = {int(row.replace(",", "")): cells for row, cells in table.items()}
    lines = {name: {at: row[f"{name}, ms"] for at, row in loads.items()} for name in PER_MILLE}
    shown = [ms for line in lines.values() for values in line.values() for ms in values] or [1]
    first = max(n for n, tick in enumerate(_ROUND_NUMBERS) if tick <= min(shown))
    last = next(n for n, tick in enumerate(_ROUND_NUMBERS) if tick > max(shown))
    return _draw(
        "Milliseconds from due to recorded in etcd, by load",
        "events per second, at a steady rate",
        {at: f"{at:,}" + ("" if ms else "\n(not reached)") for at, ms in lines["p50"].items()},
        _ROUND_NUMBERS[first - first % 3 : last + 1],
        lines,
        log10,
    )


def _draw(
    title: str,
    x_label: str,
    xs: Mapping[int, str],
    ticks: Sequence[float],
    lines: Lines,
    y_scale: Scale = float,
) -> str:
    """Draw lines over a logarithmic x axis, with its labels by value; the y axis is from `ticks`.

    A line goes through the medians; whiskers reach from the least to the greatest.
    """
    x_of = _place((_LEFT + 30, _RIGHT - 30), (min(xs), max(xs)), log10)
    y_of = _place((_BOTTOM, _TOP), (ticks[0], ticks[-1]), y_scale)
    parts = [_START, f'<text x="16" y="30" style="font-size:19px">{escape(title)}</text>']
    for tick in ticks:
        label = _text(_LEFT - 8, y_of(tick) + 5, f"{tick:,g}", "end")
        parts.append(f'<path d="M{_LEFT} {y_of(tick)}H{_RIGHT}" class="grid"/>{label}')
    for x, label in xs.items():
        below = enumerate(label.splitlines())
        parts.append("".join(_text(x_of(x), _BOTTOM + 22 + 18 * n, line) for n, line in below))
    parts.append(_text((_LEFT + _RIGHT) / 2, 448, x_label))
    legend_x = float(_LEFT)
    for color, (label, points) in zip(_COLORS, lines.items(), strict=True):
        found = [(x_of(x), *map(y_of, (median(v), min(v), max(v)))) for x, v in points.items() if v]
        if found:
            circles = [(x, y) for x, y, _, _ in found] + [(legend_x + 8, _TOP - 25)]
            path = "L".join(f"{x} {y}" for x, y, _, _ in found)
            whiskers = "".join(f"M{x} {a}V{b}m-4 0h8M{x} {a}m-4 0h8" for x, _, a, b in found)
            parts.append(
                f'<path d="M{path}" stroke="{color}"/>'
                f'<path d="{whiskers}" class="whisker" stroke="{color}"/>'
                + "".join(f'<circle cx="{x}" cy="{y}" r="5" fill="{color}"/>' for x, y in circles)
                + _text(legend_x + 20, _TOP - 20, label, "start")
            )
        legend_x += 50 + 8 * len(label)
    return "\n".join([*parts, "</svg>\n"])


def _place(at: tuple[int, int], ends: tuple[float, float], scale: Scale) -> Scale:
    """Return what places a value on an axis that has these ends there."""
    first, last = map(scale, ends)
    return lambda value: round(at[0] + (scale(value) - first) / (last - first) * (at[1] - at[0]), 1)


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'
