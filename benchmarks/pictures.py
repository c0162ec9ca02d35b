"""The pictures: throughput by batch size, and latency by load."""

from collections.abc import Sequence
from math import floor, log10
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from .figures import Spread, per_s
from .percentiles import PER_MILLE, Percentiles, by_rate
from .results import Results
from .subjects import BATCH_SIZES, CEILING, bare_name, order_name, sized

_BLUE, _ORANGE, _RED, _GREY = "#0b62a4", "#d9730d", "#b3261e", "#555555"
_STYLE = {
    "font.size": 15,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "lines.linewidth": 2.5,
    "lines.markersize": 8,
    "svg.hashsalt": "benchmarks",  # Else each picture has other ids inside, and differs.
}


def draw(directory: Path, results: Results) -> None:
    """Write `throughput.svg` and `latency.svg` into a directory."""
    with mpl.rc_context(_STYLE):
        _throughput(results, directory / "throughput.svg")
        _latency(results, directory / "latency.svg")


def _throughput(results: Results, path: Path) -> None:
    rounds = results.sweep
    figure, axes = _empty("Events recorded per second, by batch size")
    ceiling = per_s(rounds, CEILING)
    axes.axhline(ceiling.median, color=_GREY, linestyle="--")
    axes.axhspan(ceiling.least, ceiling.greatest, color=_GREY, alpha=0.12, linewidth=0)
    axes.annotate(
        "RabbitMQ and pika alone (the ceiling)",
        (BATCH_SIZES[0], ceiling.greatest),
        xytext=(0, 6),
        textcoords="offset points",
        color=_GREY,
    )
    lines = (("no effect", bare_name, _BLUE), ("one effect", order_name, _ORANGE))
    for label, name, color in lines:
        spreads = [per_s(rounds, name(sized(size))) for size in BATCH_SIZES]
        _line(axes, BATCH_SIZES, spreads, label, color)
    axes.set_xscale("log", base=2)
    axes.set_xticks(BATCH_SIZES, [str(size) for size in BATCH_SIZES])
    axes.set_xlabel("most events in one transaction (BATCH_SIZE)")
    axes.set_ylim(0, 1.15 * ceiling.greatest)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _finish(figure, axes, path)


def _latency(results: Results, path: Path) -> None:
    found = by_rate(results.loads)
    figure, axes = _empty("Milliseconds from due to recorded in etcd, by load")
    for name, color in zip(PER_MILLE, (_BLUE, _ORANGE, _RED), strict=True):
        points = [(load.per_s, ms) for load in found if (ms := load.ms[name]) is not None]
        if points:
            _line(axes, [per_s for per_s, _ in points], [ms for _, ms in points], name, color)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([load.per_s for load in found], [_rate(load) for load in found])
    axes.set_xlabel("events per second, at a steady rate")
    lowest, _ = axes.get_ylim()
    axes.set_ylim(bottom=10 ** floor(log10(lowest)))
    axes.grid(which="minor", axis="y", color="#eeeeee")
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter(FuncFormatter(_milliseconds))
    axes.xaxis.set_minor_locator(NullLocator())
    _finish(figure, axes, path)


def _rate(load: Percentiles) -> str:
    return f"{load.per_s:,}" if load.kept else f"{load.per_s:,}\n(not reached)"


def _milliseconds(value: float, _position: int | None) -> str:
    """Label 1, 2, 5, 10 and so on, and leave the other lines of a logarithmic scale bare."""
    return f"{value:g}" if f"{value:e}"[0] in "125" else ""


def _empty(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=17, pad=14)
    return figure, axes


def _line(axes: Axes, xs: Sequence[int], spreads: Sequence[Spread], label: str, color: str) -> None:
    medians = [spread.median for spread in spreads]
    below = [max(0.0, spread.median - spread.least) for spread in spreads]
    above = [max(0.0, spread.greatest - spread.median) for spread in spreads]
    axes.errorbar(
        xs,
        medians,
        yerr=(below, above),
        label=label,
        color=color,
        marker="o",
        capsize=4,
        elinewidth=1.5,
    )


def _finish(figure: Figure, axes: Axes, path: Path) -> None:
    axes.legend(frameon=False)
    figure.savefig(path, facecolor="white", metadata={"Date": None})
