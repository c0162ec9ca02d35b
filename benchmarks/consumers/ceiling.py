"""The ceiling: take and ack what a quorum queue delivers, and do nothing with it.

    python -m benchmarks.consumers.ceiling URL QUEUE PREFETCH

The same pika connection as the library's, the same prefetch, and like there one multiple ack
for what one read from the socket brought. Nothing is decoded and nothing is recorded.
"""

import sys
from typing import Any

import pika


class Ceiling:
    """A consumer on pika's own loop."""

    def __init__(self, url: str, queue: str, prefetch: int) -> None:
        self._queue, self._prefetch = queue, prefetch
        self._channel: Any = None
        self._unacked = 0  # The last tag that waits for the ack, 0 for none.
        self._connection: Any = pika.SelectConnection(
            pika.URLParameters(url),
            on_open_callback=lambda connection: connection.channel(on_open_callback=self._opened),
        )

    def run(self) -> None:
        """Consume until a signal ends the process."""
        self._connection.ioloop.start()

    def _opened(self, channel: Any) -> None:
        self._channel = channel
        channel.basic_qos(prefetch_count=self._prefetch, callback=self._consume)

    def _consume(self, _frame: Any) -> None:
        self._channel.basic_consume(self._queue, self._on_message)

    def _on_message(self, _channel: Any, method: Any, _properties: Any, _body: bytes) -> None:
        if not self._unacked:
            # Comes round when everything of this read has been handed over.
            self._connection.ioloop.add_callback_threadsafe(self._ack)
        self._unacked = method.delivery_tag

    def _ack(self) -> None:
        self._channel.basic_ack(self._unacked, multiple=True)
        self._unacked = 0


if __name__ == "__main__":
    Ceiling(sys.argv[1], sys.argv[2], int(sys.argv[3])).run()
