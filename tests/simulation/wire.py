"""One direction of a TCP connection."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from simulation.agenda import Agenda, Owner


class Wire:
    """Brings frames in their order, each after a delay, until it is cut.

    What arrives in one instant is one read of the socket, and so one step of its ``owner``.
    """

    def __init__(self, agenda: Agenda, owner: Owner | None, latency_s: Callable[[], float]) -> None:
        self._agenda, self._owner, self._latency_s = agenda, owner, latency_s
        self._frames: deque[tuple[float, Callable[[], None]]] = deque()
        self._last_s = 0.0
        self._cut = False

    @property
    def idle_at_s(self) -> float:
        """Return when the last frame under way arrives."""
        return self._last_s

    def send(self, frame: Callable[[], None]) -> None:
        """Let a frame arrive, unless the wire is cut."""
        if self._cut:
            return
        now_s = self._agenda.now_s
        # A burst is sent in one segment, unless one before it is still under way.
        arrives_s = max(self._last_s, now_s + self._latency_s())
        if self._frames and self._frames[-1][0] == arrives_s:
            self._frames.append((arrives_s, frame))
            return
        self._last_s = arrives_s
        self._frames.append((arrives_s, frame))
        self._agenda.later(arrives_s - now_s, self._arrive, self._owner)

    def hold(self, until_s: float) -> None:
        """Let nothing more arrive before a time."""
        self._last_s = max(self._last_s, until_s)
        if self._frames:
            self._frames = deque((max(at_s, until_s), frame) for at_s, frame in self._frames)
            self._agenda.later(max(0.0, until_s - self._agenda.now_s), self._arrive, self._owner)

    def cut(self, keep: int) -> int:
        """Lose what is under way but for the first ``keep`` frames; return how many were lost."""
        self._cut = True
        lost = max(0, len(self._frames) - keep)
        for _ in range(lost):
            self._frames.pop()
        self._last_s = self._frames[-1][0] if self._frames else 0.0
        return lost

    @property
    def under_way(self) -> int:
        """Return how many frames are under way."""
        return len(self._frames)

    def _arrive(self) -> None:
        # Compared a little late: a delay added to the clock is not always the time it came from.
        while self._frames and self._frames[0][0] <= self._agenda.now_s + 1e-9:
            self._frames.popleft()[1]()
