"""Draw numbers over time as a small SVG; its colours and fonts are the page's."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

_WIDTH, _HEIGHT = 400, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 26, 394, 20, 188
_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600)
_MOST_TICKS = 6
_LETTER = 7


@dataclass(frozen=True)
class Band:
    """A stretch of the time axis."""

    name: str
    begin: float


@dataclass(frozen=True)
class Axes:
    """What both charts have in common: times are Unix, in seconds."""

    acts: Sequence[Band]
    end: float
    top: int
    """The largest value."""

    def x(self, at: float) -> float:
        """Return where a time is; times outside are moved to the edge."""
        begin = self.acts[0].begin
        share = (at - begin) / max(self.end - begin, 1e-9)
        return round(_LEFT + (_RIGHT - _LEFT) * min(max(share, 0.0), 1.0), 1)

    def y(self, value: float) -> float:
        """Return where a value is."""
        return round(_BOTTOM - (_BOTTOM - _TOP) * value / self.top, 1)


def chart(
    name: str,
    title: str,
    description: str,
    axes: Axes,
    lines: dict[str, Sequence[tuple[float, float]]],
) -> str:
    """Return an SVG element with one stepped line for each of `lines`, by CSS class."""
    parts = [*_acts(axes), *_values(axes), *_times(axes)]
    parts += [_line(css_class, points, axes) for css_class, points in lines.items()]
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-labelledby="{escape(name)}-title {escape(name)}-text" '
        'xmlns="http://www.w3.org/2000/svg">'
        f'<title id="{escape(name)}-title">{escape(title)}</title>'
        f'<desc id="{escape(name)}-text">{escape(description)}</desc>'
        f"{''.join(parts)}</svg>"
    )


def _acts(axes: Axes) -> list[str]:
    """Draw each act as a band with its name, or its last letter where there is no room."""
    parts = []
    ends = [*(act.begin for act in axes.acts), axes.end]
    for number, (act, (begin, end)) in enumerate(zip(axes.acts, pairwise(ends), strict=True)):
        left, width = axes.x(begin), round(axes.x(end) - axes.x(begin), 1)
        name = act.name if len(act.name) * _LETTER <= width else act.name[-1:]
        parts.append(
            f'<rect class="act{number % 2}" x="{left}" y="0" width="{width}" height="{_BOTTOM}"/>'
            f'<text class="name" x="{round(left + width / 2, 1)}" y="13">{escape(name)}</text>'
        )
    return parts


def _values(axes: Axes) -> list[str]:
    step = -(-axes.top // 4)
    return [
        f'<path class="grid" d="M{_LEFT} {axes.y(value)}H{_RIGHT}"/>'
        f'<text class="value" x="{_LEFT - 6}" y="{axes.y(value) + 4}">{value}</text>'
        for value in range(0, axes.top + 1, step)
    ]


def _times(axes: Axes) -> list[str]:
    begin = axes.acts[0].begin
    length_s = int(axes.end - begin)
    step_s = next((s for s in _STEPS_S if length_s / s < _MOST_TICKS), length_s)
    return [
        f'<text class="time" x="{axes.x(begin + seconds)}" y="{_HEIGHT - 5}">{seconds} s</text>'
        for seconds in range(0, length_s + 1, step_s)
    ]


def _line(css_class: str, points: Sequence[tuple[float, float]], axes: Axes) -> str:
    steps = "".join(f"H{axes.x(at)}V{axes.y(value)}" for at, value in points)
    path = f"M{_LEFT} {axes.y(0)}{steps}H{axes.x(axes.end)}"
    area = f'<path class="{css_class} area" d="{path}V{axes.y(0)}Z"/>'
    return f'{area}<path class="{css_class}" d="{path}"/>'
