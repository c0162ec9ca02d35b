"""Without acks: take what a quorum queue delivers to a consumer that it does not wait for.

    python -m benchmarks.consumers.auto_ack URL QUEUE

The queue runs empty long before this process has read it all, so it counts by itself: how long
it took over what it found in the queue at its start, without the outer tenths. Then it ends.
"""

import sys
import time
from typing import Any

import pika

from benchmarks.outcome import tell


class AutoAck:
    """A consumer on pika's own loop."""

    def __init__(self, url: str, queue: str) -> None:
        self._queue = queue
        self._taken = self._first = self._last = 0
        self._started = (0.0, 0.0)
        self._channel: Any = None
        self._connection: Any = pika.SelectConnection(
            pika.URLParameters(url),
            on_open_callback=lambda connection: connection.channel(on_open_callback=self._opened),
            on_close_callback=lambda connection, _error: connection.ioloop.stop(),
        )

    def run(self) -> None:
        """Consume until nine tenths are taken."""
        self._connection.ioloop.start()

    def _opened(self, channel: Any) -> None:
        self._channel = channel
        channel.queue_declare(self._queue, passive=True, callback=self._counted)

    def _counted(self, frame: Any) -> None:
        found: int = frame.method.message_count
        self._first, self._last = found // 10, found - found // 10
        self._channel.basic_consume(self._queue, self._on_message, auto_ack=True)

    def _on_message(self, _channel: Any, _method: Any, _properties: Any, _body: bytes) -> None:
        self._taken += 1
        if self._taken == self._first:
            self._started = time.monotonic(), time.process_time()
        elif self._taken == self._last:
            self._tell()
            self._connection.close()

    def _tell(self) -> None:
        at_s, cpu_s = self._started
        events = self._last - self._first
        tell(
            events_per_s=events / (time.monotonic() - at_s),
            cpu_us=(time.process_time() - cpu_s) / events * 1e6,
        )


if __name__ == "__main__":
    AutoAck(sys.argv[1], sys.argv[2]).run()
