"""pika without confirms: it only learns that the broker has all when the connection has closed.

    python -m benchmarks.publishers.unconfirmed URL EVENTS

The broker answers the wish to close behind everything that it was sent before.
"""

import sys
from contextlib import ExitStack
from typing import Any

import pika
from pika.exceptions import ConnectionClosedByClient

from benchmarks.loading import PERSISTENT, new_events
from benchmarks.outcome import timed
from idempotent_consumer.names import EXCHANGE

_AT_ONCE = 500
"""Events between two looks at the socket: it sends these while the next are made ready."""


class Unconfirmed:
    """A publisher on pika's own loop."""

    def __init__(self, url: str, events: int) -> None:
        self._bodies, self._sent = new_events(events), 0
        self._timer = ExitStack()
        self._channel: Any = None
        self._connection: Any = pika.SelectConnection(
            pika.URLParameters(url),
            on_open_callback=lambda connection: connection.channel(on_open_callback=self._opened),
            on_close_callback=self._closed,
        )

    def run(self) -> None:
        """Publish everything, and tell what that took."""
        self._connection.ioloop.start()

    def _opened(self, channel: Any) -> None:
        self._channel = channel
        self._timer.enter_context(timed(len(self._bodies)))
        self._publish()

    def _publish(self) -> None:
        for body in self._bodies[self._sent : self._sent + _AT_ONCE]:
            self._channel.basic_publish(EXCHANGE, "new_order", body, PERSISTENT)
        self._sent += _AT_ONCE
        if self._sent < len(self._bodies):
            self._connection.ioloop.add_callback_threadsafe(self._publish)
        else:
            self._connection.close()

    def _closed(self, connection: Any, reason: Any) -> None:
        if not isinstance(reason, ConnectionClosedByClient):
            raise reason
        self._timer.close()
        connection.ioloop.stop()


if __name__ == "__main__":
    Unconfirmed(sys.argv[1], int(sys.argv[2])).run()
