"""The dashboard in the browser: its graphs as they are drawn, and the numbers behind them.

And one graph of the four counters over a whole run, as the README shows it.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from browser.chromium import Chromium
from browser.stack import KnownRun
from servers.servers import REPOSITORY
from servers.wait import eventually
from servers.web import fetch_json

DEFINITION: dict[str, Any] = json.loads(
    (REPOSITORY / "server-config/graphite-dashboard.json").read_text()
)
NAME = DEFINITION["name"]

Series = dict[str, list[float]]
"""A graph's lines: the text of its legend, and the values that are there."""

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

# While a graph is drawn again its class is another one, and the image that was there stays.
_IMAGES = """
return Array.from(document.querySelectorAll("img[class^=graph-img]"),
                  (image) => [image.src, image.complete ? image.naturalWidth : 0])
"""
_SHOW_PAST = """
TimeRange.relativeStartQuantity = arguments[0]
TimeRange.relativeStartUnits = "seconds"
timeRangeUpdated()
"""


class Dashboard:
    """The dashboard's page, once it is open."""

    def __init__(self, chromium: Chromium, graphite: str) -> None:
        self._chromium = chromium
        self._url = f"{graphite}/dashboard/{NAME}"

    def open(self) -> None:
        """Open the page and wait until all of its graphs are drawn."""
        self._chromium.open(self._url, 1200, 1195)
        eventually(self._drawn)

    def show_past(self, seconds: int) -> None:
        """Choose how far back it shows, as its "Relative Time Range" does."""
        self._chromium.run(_SHOW_PAST, str(seconds))
        eventually(lambda: self._drawn(f"-{seconds}seconds"))

    def remove_first_and_save(self) -> None:
        """Remove a graph, and save the rest under the same name."""
        self._chromium.run("graphStore.removeAt(0); sendSaveRequest(arguments[0])", NAME)

    def graphs(self) -> dict[str, Series]:
        """Return each graph by its title: what its image shows, as numbers."""
        return {_query(url)["title"][0]: _series(url) for url in self._images()}

    def _drawn(self, since: str | None = None) -> None:
        # The page brings the dashboard along, and loads it once more, as its name is in the URL.
        assert not self._chromium.run("return Ext.Ajax.isLoading()")
        images = self._images()
        assert images
        assert set(images.values()) == {DEFINITION["graphSize"]["width"]}
        assert since is None or all(_query(url)["from"] == [since] for url in images)

    def _images(self) -> dict[str, int]:
        """Return the URL of each graph's image, and its width in pixels; 0 until it is there."""
        return {str(url): int(width) for url, width in self._chromium.run(_IMAGES)}


def _query(url: str) -> dict[str, list[str]]:
    return parse_qs(urlsplit(url).query)


def _series(url: str) -> Series:
    answer = fetch_json("GET", f"{url}&format=json")
    return {
        line["target"]: [value for value, _ in line["datapoints"] if value is not None]
        for line in answer
    }


def counters_url(graphite: str, run: KnownRun) -> str:
    """Return the URL of the image."""
    targets = [
        f'lineWidth(color(alias(integral(stats_counts.{name}),"{name}"),"{color}"),{width})'
        for name, color, width in _LINES
    ]
    times = {"from": run.began - 3, "until": run.ended + 4}
    query = urlencode({**_APPEARANCE, **times, "target": targets}, doseq=True)
    return f"{graphite}/render?{query}"
