"""Publish at a steady rate that waits for nobody.

    python -m benchmarks.publishers.open_loop URL QUEUE EVENTS_PER_S EVENTS

Event number n is due n / EVENTS_PER_S seconds after the start, and is published then or, where
something held this process up, as soon after that as can be. Its id is its number. In the end it
tells its start, on the monotonic clock that all processes of a machine share (clock_gettime(2)),
and how late it was itself, so that nobody takes its own delays for those of what it measures.
"""

import asyncio
import selectors
import sys
from typing import Any

import pika
from pika.adapters.asyncio_connection import AsyncioConnection

from benchmarks.figures import percentile
from benchmarks.loading import PERSISTENT, body
from benchmarks.outcome import tell

_AT_ONCE = 100
"""Events at most between two looks at the socket: what is late goes out while more becomes due."""

_EARLY_S = 0.005
"""A long wait ends by so much too soon, and a short one follows: Linux may let select(2) sleep a
thousandth of its time longer."""


class OpenLoop:
    """A publisher on asyncio's loop with select(2), whose timers wake within microseconds.

    epoll(7), which pika's own loop and asyncio's usual one wait with, counts in milliseconds.
    """

    def __init__(self, url: str, queue: str, per_s: float, events: int) -> None:
        self._queue, self._per_s, self._events = queue, per_s, events
        self._start_s = 0.0
        self._late_s: list[float] = []
        self._channel: Any = None
        self._loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
        self._connection: Any = AsyncioConnection(
            pika.URLParameters(url),
            on_open_callback=lambda connection: connection.channel(on_open_callback=self._opened),
            on_close_callback=lambda *_: self._loop.stop(),
            custom_ioloop=self._loop,
        )

    def run(self) -> None:
        """Publish everything; raises RuntimeError if the connection is lost before that."""
        self._loop.run_forever()
        if len(self._late_s) < self._events:
            raise RuntimeError(f"{len(self._late_s)} of {self._events} published")
        tell(
            start_s=self._start_s,
            took_s=self._due_s(self._events - 1) + self._late_s[-1] - self._start_s,
            late_ms=1000 * (percentile(self._late_s, 500) or self._late_s[0]),
        )

    def _opened(self, channel: Any) -> None:
        self._channel = channel
        self._start_s = self._loop.time()
        self._publish()

    def _due_s(self, number: int) -> float:
        return self._start_s + number / self._per_s

    def _publish(self) -> None:
        first = len(self._late_s)
        for number in range(first, min(first + _AT_ONCE, self._events)):
            late_s = self._loop.time() - self._due_s(number)
            if late_s < 0:
                break
            self._channel.basic_publish("", self._queue, body(number), PERSISTENT)
            self._late_s.append(late_s)
        if len(self._late_s) < self._events:
            due_s = self._due_s(len(self._late_s))
            early_s = _EARLY_S if due_s - self._loop.time() > 2 * _EARLY_S else 0.0
            self._loop.call_at(due_s - early_s, self._publish)
        else:
            self._connection.close()


if __name__ == "__main__":
    OpenLoop(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])).run()
