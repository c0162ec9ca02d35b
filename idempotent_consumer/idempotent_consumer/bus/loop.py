"""pika's I/O loop as the library's loop."""

from __future__ import annotations

import time
from collections.abc import Callable

from pika.adapters.select_connection import IOLoop


class PikaLoop:
    """Runs every connection, timer and callback of a service on one thread."""

    def __init__(self) -> None:
        self.ioloop = IOLoop()

    def now_s(self) -> float:
        """Return seconds on a clock that never goes back. Any thread."""
        return time.monotonic()

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call on the loop's thread after a delay."""
        self.ioloop.call_later(delay_s, callback)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call on the loop's thread as soon as it is free. Any thread."""
        self.ioloop.add_callback_threadsafe(callback)

    def run(self) -> None:
        """Run until ``stop``; an exception in a callback ends it and is raised here."""
        self.ioloop.start()

    def stop(self) -> None:
        """End ``run`` when the callbacks under way have returned."""
        self.ioloop.stop()

    def close(self) -> None:
        """Give its files back; it cannot run again."""
        self.ioloop.close()
