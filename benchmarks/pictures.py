"""Draws an SVG picture of lines: figures over the numbers at the end of their rows' names."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import product
from math import ceil, log10
from statistics import median

from .report import Table

_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 700, 80, 390
_COLORS = ("#0b62a4", "#d9730d", "#b3261e")
_START = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 460" width="720" height="460">
<style>text{font:15px sans-serif;fill:#222}path{fill:none;stroke-width:2.5}\
.grid{stroke:#ddd;stroke-width:1}.whisker{stroke-width:1.5}</style>
<rect width="100%" height="100%" fill="#fff"/>"""
_ROUND_NUMBERS = [digit * 10.0**decade for decade, digit in product(range(-3, 9), (1, 2, 5))]

Scale = Callable[[float], float]


def draw(
    table: Table,
    title: str,
    x_label: str,
    lines: Mapping[str, tuple[str, str]],
    logarithmic: bool = False,
) -> str:
    """Draw lines over a logarithmic x axis; `lines` has the rows and the column of each label.

    A line connects the medians; its whiskers go from the least to the greatest.
    """
    figures = {label: _by_place(table, *line) for label, line in lines.items()}
    places = next(iter(figures.values()))
    shown = [each for line in figures.values() for values in line.values() for each in values]
    ticks = _ticks(shown or [1], logarithmic)
    xs = [int(place.replace(",", "")) for place in places]
    x_of = _place((_LEFT + 30, _RIGHT - 30), (min(xs), max(xs)), log10)
    y_of = _place((_BOTTOM, _TOP), (ticks[0], ticks[-1]), log10 if logarithmic else float)
    parts = [_START, f'<text x="16" y="30" style="font-size:19px">{escape(title)}</text>']
    for tick in ticks:
        label = _text(_LEFT - 8, y_of(tick) + 5, f"{tick:,g}", "end")
        parts.append(f'<path d="M{_LEFT} {y_of(tick)}H{_RIGHT}" class="grid"/>{label}')
    for x, (place, values) in zip(xs, places.items(), strict=True):
        below = enumerate([place] if values else [place, "(not reached)"])
        parts.append("".join(_text(x_of(x), _BOTTOM + 22 + 18 * n, line) for n, line in below))
    parts.append(_text((_LEFT + _RIGHT) / 2, 448, x_label))
    legend_x = float(_LEFT)
    for color, (label, line) in zip(_COLORS, figures.items(), strict=True):
        # A row without a number in its name holds at each place.
        points = zip(xs, (line.get(place, line.get("", [])) for place in places), strict=True)
        found = [(x_of(x), *map(y_of, (median(v), min(v), max(v)))) for x, v in points if v]
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


def _by_place(table: Table, rows: str, column: str) -> dict[str, list[float]]:
    """Return the figures of the rows whose name has a prefix, by the rest of the name."""
    return {
        name.removeprefix(rows): row[column] for name, row in table.items() if name.startswith(rows)
    }


def _ticks(shown: Sequence[float], logarithmic: bool) -> list[float]:
    """Return the y axis: round numbers around the values, or at most nine from 0 on."""
    if logarithmic:
        first = max(n for n, tick in enumerate(_ROUND_NUMBERS) if tick <= min(shown))
        last = next(n for n, tick in enumerate(_ROUND_NUMBERS) if tick > max(shown))
        return _ROUND_NUMBERS[first - first % 3 : last + 1]
    end = 1.1 * max(shown)
    step = next(tick for tick in _ROUND_NUMBERS if end / tick <= 8)
    return [step * number for number in range(ceil(end / step) + 1)]


def _place(at: tuple[int, int], ends: tuple[float, float], scale: Scale) -> Scale:
    """Return a function that places a value on an axis, whose ends are these values."""
    first, last = map(scale, ends)
    return lambda value: round(at[0] + (scale(value) - first) / (last - first) * (at[1] - at[0]), 1)


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'
