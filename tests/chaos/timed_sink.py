"""A receiver that knows who calls it, and from when to when."""

import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from integration.sink import Call, Sink

_LOOK_EVERY_S = 0.02


@dataclass(eq=False)
class Span:
    """One call: its id, who made it, and its time on `time.monotonic`.

    It ends when it is answered, or when its caller has hung up, as the kernel does for one that
    was killed. A frozen caller hangs up as little as one that waits. ``held``: it has met a hold,
    so it does not end by being answered before the release.
    """

    key: str
    caller: str
    began_s: float
    ended_s: float | None = None
    answered: bool = False
    held: bool = False

    def overlaps(self, other: "Span") -> bool:
        """Return whether both were under way at one instant."""
        first, second = sorted((self, other), key=lambda span: span.began_s)
        return first.ended_s is None or second.began_s < first.ended_s


class TimedSink(Sink):
    """Takes a while for each call, and notes when each began and ended. Made by `listen_timed`."""

    def __init__(self, latency_s: float) -> None:
        self._latency_s = latency_s
        self._let_through: set[str] = set()
        self._spans: list[Span] = []
        super().__init__()

    def url_for(self, caller: str) -> str:
        """Where a process of this name POSTs, so that its calls are known to be its own."""
        return f"{self.url}/{caller}"

    @property
    def spans(self) -> list[Span]:
        """Every call so far, in order of arrival."""
        with self._lock:
            return list(self._spans)

    def under_way(self, caller: str) -> set[str]:
        """Return the ids of the calls of one process that have not ended."""
        return {span.key for span in self.spans if span.caller == caller and span.ended_s is None}

    def number_under_way(self, caller: str) -> int:
        """Return how many calls of one process have not ended."""
        return len(self.under_way(caller))

    def held(self, caller: str) -> set[str]:
        """Return the ids of the calls of one process that wait for `release`.

        One that was about to be answered when the hold began is still under way, and not held.
        """
        return {
            span.key
            for span in self.spans
            if span.caller == caller and span.held and span.ended_s is None
        }

    def hold(self) -> None:
        """Leave calls without an answer until `release`."""
        self._let_through.clear()
        super().hold()

    def let_through(self, caller: str) -> None:
        """Answer the calls of one process all the same."""
        self._let_through.add(caller)

    def serve(self, call: Call, caller: socket.socket, answer: Callable[[int], None]) -> None:
        """Take a call, hold it if so told, and answer it unless its caller hangs up before."""
        span = Span(call.key, call.path.rpartition("/")[2], time.monotonic())
        status = self.note(call)
        with self._lock:
            self._spans.append(span)
        due_s = span.began_s + self._latency_s
        gone = False
        while not gone and (time.monotonic() < due_s or self._holds(span)):
            span.held = self._holds(span)
            gone = _hangs_up(caller, _LOOK_EVERY_S)
        if not gone:
            answer(status)
        span.answered, span.ended_s = not gone, time.monotonic()

    def _holds(self, span: Span) -> bool:
        return not self._open.is_set() and span.caller not in self._let_through


def _hangs_up(caller: socket.socket, within_s: float) -> bool:
    poll = select.poll()
    poll.register(caller, select.POLLIN)
    readable = poll.poll(within_s * 1000)
    try:
        # A caller that has sent its request sends nothing more, so there is an end to be read.
        return bool(readable) and not caller.recv(1, socket.MSG_PEEK)
    except OSError:
        return True


@contextmanager
def listen_timed(latency_s: float = 0.05) -> Iterator[TimedSink]:
    """Listen on a free port for as long as the block runs."""
    sink = TimedSink(latency_s)
    try:
        yield sink
    finally:
        sink.close()
