"""The simulated clock, and everything that is to happen on it."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Protocol


class Owner(Protocol):
    """A process whose callbacks happen only while it lives, and later while it is frozen."""

    alive: bool
    frozen_until_s: float

    def between_steps(self) -> None:
        """Stand between two steps: the place to die or to freeze."""
        ...

    def run(self, callback: Callable[[], None]) -> None:
        """Do one step."""
        ...


class Agenda:
    """What is to happen, in the order of its time and, within an instant, of its entry."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.happened = 0
        self._entries: list[tuple[float, int, Owner | None, Callable[[], None]]] = []
        self._numbers = count()

    def time_s(self) -> float:
        """Return the clock's time."""
        return self.now_s

    def later(
        self, delay_s: float, callback: Callable[[], None], owner: Owner | None = None
    ) -> None:
        """Let something happen after a delay: in the world, or in a process."""
        heapq.heappush(self._entries, (self.now_s + delay_s, next(self._numbers), owner, callback))

    def run(self, until_s: float, enough: Callable[[], bool]) -> None:
        """Let everything happen up to a time, or until it is enough."""
        while self._entries and self._entries[0][0] <= until_s and not enough():
            self._next()
        if not enough():
            self.now_s = max(self.now_s, until_s)

    def _next(self) -> None:
        due_s, number, owner, callback = heapq.heappop(self._entries)
        self.now_s = max(self.now_s, due_s)
        if owner is None:
            self.happened += 1
            callback()
            return
        if owner.alive and owner.frozen_until_s <= self.now_s:
            owner.between_steps()
        if not owner.alive:
            return
        if owner.frozen_until_s > self.now_s:
            # It keeps its number, so that what had to wait happens in the order of its entry.
            heapq.heappush(self._entries, (owner.frozen_until_s, number, owner, callback))
            return
        self.happened += 1
        owner.run(callback)
