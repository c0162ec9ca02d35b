"""The counters as Graphite has stored them, read through its render API."""

import time
from collections import defaultdict
from typing import Any
from urllib.parse import urlencode

from servers.web import fetch_json


class GraphiteCounters:
    """Reads counters as `servers.statsd.Counters` does, from `stats_counts.<name>`.

    A count is the sum of all flushes since `since` (Unix time in seconds, default now). It is
    exact while Graphite still keeps one point per flush, here for as long as server-config/ says.
    """

    def __init__(self, url: str, since: float | None = None) -> None:
        self._url = url.rstrip("/")
        self._since = int(time.time() if since is None else since)
        # A point that carbon moves from its memory to the file is in no answer for a moment
        # (carbon/writer.py takes it out before it writes), so what was shown once is kept.
        self._shown: defaultdict[str, dict[int, float]] = defaultdict(dict)

    def count(self, name: str) -> int:
        """Return the sum of a counter since then; 0 for one never seen. Raises OSError."""
        return round(sum(value for _, value in self.points(name)))

    def seen(self, name: str) -> bool:
        """Return whether the counter has a point since then, be it 0. Raises OSError."""
        return bool(self.points(name))

    def points(self, name: str) -> list[tuple[int, float]]:
        """Return the flushes of a counter since then: Unix time and increase. Raises OSError."""
        query = {
            "target": f"stats_counts.{name}",
            # Graphite gives the points after `from`: the second itself would be left out.
            "from": str(self._since - 1),
            # Its clock and carbon's may be ahead of ours by a moment.
            "until": str(int(time.time()) + 10),
            "format": "json",
            "noCache": "1",
        }
        answer: Any = fetch_json("GET", f"{self._url}/render?{urlencode(query)}")
        # A point without a value is a second without a flush.
        points = self._shown[name]
        for series in answer:
            points.update({at: value for value, at in series["datapoints"] if value is not None})
        return sorted(points.items())
