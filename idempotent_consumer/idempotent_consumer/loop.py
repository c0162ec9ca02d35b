"""The one thread that owns everything, as the rest of the library sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Loop(Protocol):
    """An event loop: timers, and callbacks handed over by other threads.

    pika's I/O loop stands behind it in a service, a seeded scheduler can in a simulation.
    """

    def now_s(self) -> float:
        """Return seconds on a clock that never goes back. Any thread."""
        ...

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call on the loop's thread after a delay; nothing takes it back."""
        ...

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call on the loop's thread as soon as it is free. Any thread: the way back to this one."""
        ...
