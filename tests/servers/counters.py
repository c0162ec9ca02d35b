"""The metrics of services, as a statsd listener receives them and as Graphite stores them."""

import re
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from typing import Any
from urllib.parse import urlencode

from servers.web import fetch_json

_LARGEST_PACKET = 65_535
_RECEIVE_BUFFER = 8 << 20
_LINE = re.compile(r"([^:]+):(-?[0-9.]+(?:e-?\d+)?)\|(c|ms|g)(?:\|@([0-9.]+))?")


class StatsdListener:
    """Receives statsd packets on 127.0.0.1: sums counters, keeps timers and gauges.

    Names include the prefix. Only its own thread writes. Made by `listen_statsd`.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        # The kernel drops packets that do not fit. It may grant less than this.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._counters: dict[str, float] = {}
        self._timers_ms: dict[str, list[float]] = {}
        self._gauges: dict[str, float] = {}
        self._thread = threading.Thread(target=self._receive, name="statsd", daemon=True)
        self._thread.start()

    def settings(self) -> dict[str, str]:
        """Return the variables that point a service at this listener."""
        return {"STATSD_HOST": "127.0.0.1", "STATSD_PORT": str(self.port)}

    def count(self, name: str) -> int:
        """Return the sum of a counter; 0 if it was never seen."""
        return round(self._counters.get(name, 0))

    def seen(self, name: str) -> bool:
        """Return whether the counter was ever sent, even as 0."""
        return name in self._counters

    def counts(self) -> dict[str, int]:
        return {name: round(value) for name, value in self._counters.copy().items()}

    def timers_ms(self, name: str) -> list[float]:
        """Return a timer's values in milliseconds, in order of arrival."""
        return list(self._timers_ms.get(name, ()))

    def gauge(self, name: str) -> int:
        """Return a gauge's last value; 0 if it was never seen."""
        return round(self._gauges.get(name, 0))

    def close(self) -> None:
        # An empty packet wakes the thread: closing a socket does not wake its reader.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as waker:
            waker.sendto(b"", ("127.0.0.1", self.port))
        self._thread.join()
        self._socket.close()

    def _receive(self) -> None:
        while packet := self._socket.recv(_LARGEST_PACKET):
            for line in packet.decode(errors="replace").splitlines():
                # `name:value|type` with an optional `|@rate`; anything else is ignored.
                if found := _LINE.fullmatch(line):
                    self._take(*found.groups(default="1"))

    def _take(self, name: str, value: str, kind: str, rate: str) -> None:
        if kind == "c":
            self._counters[name] = self._counters.get(name, 0) + float(value) / float(rate)
        elif kind == "ms":
            self._timers_ms.setdefault(name, []).append(float(value))
        else:
            self._gauges[name] = float(value)


def listen_statsd() -> AbstractContextManager[StatsdListener]:
    """Listen on a free port during the block."""
    return closing(StatsdListener())


class GraphiteCounters:
    """Reads counters from Graphite's `stats_counts.<name>`, with the methods of `StatsdListener`.

    A count is the sum of all flushes since `since` (Unix time in seconds, default now). It is
    exact as long as Graphite keeps one point per flush, for a time that server-config/ sets.
    """

    def __init__(
        self, url: str, since: float | None = None, fetch: Callable[[str, str], Any] = fetch_json
    ) -> None:
        self._url, self._fetch = url.rstrip("/"), fetch
        self._since = int(time.time() if since is None else since)
        # While carbon moves a point from memory to the file, no answer has it (carbon/writer.py
        # removes it before it writes). So every point that was shown once is kept here.
        self._shown: defaultdict[str, dict[int, float]] = defaultdict(dict)

    def count(self, name: str) -> int:
        """Return the sum of a counter; 0 if it was never seen. Raises OSError."""
        return round(sum(value for _, value in self._points(f"stats_counts.{name}")))

    def seen(self, name: str) -> bool:
        """Return whether the counter has a point, even of 0. Raises OSError."""
        return bool(self._points(f"stats_counts.{name}"))

    def gauge(self, name: str) -> int:
        """Return a gauge's last value; 0 if it was never seen. Raises OSError."""
        points = self._points(f"stats.gauges.{name}")
        return round(points[-1][1]) if points else 0

    def _points(self, target: str) -> list[tuple[int, float]]:
        """Return the flushes since `since`: Unix time, and the increase or a gauge's value."""
        query = {
            "target": target,
            # Graphite gives the points after `from`, without that second itself.
            "from": str(self._since - 1),
            # Graphite's clock may be slightly ahead of ours.
            "until": str(int(time.time()) + 10),
            "format": "json",
            "noCache": "1",
        }
        answer = self._fetch("GET", f"{self._url}/render?{urlencode(query)}")
        points = self._shown[target]
        # A point without a value is a second without a flush.
        for series in answer:
            points.update({at: value for value, at in series["datapoints"] if value is not None})
        return sorted(points.items())
