"""A loop whose clock the test moves."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from itertools import count


class ManualLoop:
    """The library's Loop: nothing runs, and no time passes, but at the test's word."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self._now_s = now_s
        self._ready: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def now_s(self) -> float:
        """Return the clock's time."""
        return self._now_s

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call with the next ``run_until_idle``; from any thread."""
        self._ready.append(callback)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call once the clock has moved that far; timers of one instant run in their order."""
        heapq.heappush(self._timers, (self._now_s + delay_s, next(self._numbers), callback))

    @property
    def next_timer_s(self) -> float | None:
        """Return when the next timer is due, or None where there is none."""
        return self._timers[0][0] if self._timers else None

    def run_until_idle(self) -> None:
        """Call what is ready and what is due, until nothing is."""
        while self._ready or (self._timers and self._timers[0][0] <= self._now_s):
            if self._ready:
                self._ready.popleft()()
            else:
                heapq.heappop(self._timers)[2]()

    def advance(self, seconds: float) -> None:
        """Let time pass, and call each timer at its own instant."""
        until_s = self._now_s + seconds
        self.run_until_idle()
        while self._timers and self._timers[0][0] <= until_s:
            self._now_s = max(self._now_s, self._timers[0][0])
            self.run_until_idle()
        self._now_s = until_s
        self.run_until_idle()

    def freeze(self, seconds: float) -> None:
        """Let time pass while nothing runs, as SIGSTOP does; what has become due runs later."""
        self._now_s += seconds
