"""One graph of the four counters over a whole run, as the README shows it."""

from __future__ import annotations

from urllib.parse import urlencode

from browser.known_run import KnownRun

WIDTH = 1600
_APPEARANCE = {
    "title": "Events counted since the start",
    "width": WIDTH,
    "height": 620,
    "margin": 20,
    "lineMode": "staircase",
    "fontSize": 20,
    "bgcolor": "ffffff",
    "fgcolor": "333333",
    "majorGridLineColor": "dddddd",
    "minorGridLineColor": "f2f2f2",
}
# In the order of drawing: where two lines are one, the thin one lies on the thick one.
_LINES = (
    ("orders_processed", "2266cc", 12),
    ("notifications_processed", "ff9922", 5),
    ("orders_processed_skipped", "99bbee", 12),
    ("notifications_processed_skipped", "cc5500", 5),
)


def counters_url(graphite: str, run: KnownRun) -> str:
    """Return the URL of the image."""
    targets = [
        f'lineWidth(color(alias(integral(stats_counts.{name}),"{name}"),"{color}"),{width})'
        for name, color, width in _LINES
    ]
    times = {"from": run.began - 3, "until": run.ended + 4}
    query = urlencode({**_APPEARANCE, **times, "target": targets}, doseq=True)
    return f"{graphite}/render?{query}"
