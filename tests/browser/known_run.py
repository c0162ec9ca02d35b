"""A run whose counts are known: notify is away for a while, then events are sent again."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

from browser.stack import Stack
from servers.wait import eventually

EVENTS, REPEATED = 70, 30
_AT_A_TIME = 5


@dataclass(frozen=True)
class KnownRun:
    """When it was, in Unix time and whole seconds."""

    began: int
    ended: int


class _Player:
    """Publishes a few events at a time, and goes on once Graphite shows them.

    So the lines rise in steps that can be seen, at the pace of the stack.
    """

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._expected: Counter[str] = Counter()

    def publish(self, ids: range, *counters: str) -> None:
        for first in range(ids.start, ids.stop, _AT_A_TIME):
            some = range(first, min(first + _AT_A_TIME, ids.stop))
            for number in some:
                self._stack.publish(f"order-{number}")
            self.expect(len(some), *counters)

    def expect(self, more: int, *counters: str) -> None:
        self._expected.update(dict.fromkeys(counters, more))
        eventually(self._counted, also=(OSError,))

    def _counted(self) -> None:
        counted = {name: self._stack.counters.count(name) for name in self._expected}
        assert counted == self._expected


def play(stack: Stack) -> KnownRun:
    """Play it, and return when Graphite shows all of it; raises AssertionError if it does not.

    70 events, of which 30 come while notify is stopped. Then 30 of them are sent once more.
    """
    player, began = _Player(stack), int(time.time())
    both = ("orders_processed", "notifications_processed")
    player.publish(range(20), *both)
    stack.compose("stop", "notify")
    player.publish(range(20, 50), "orders_processed")
    stack.compose("start", "notify")
    player.expect(30, "notifications_processed")
    player.publish(range(50, EVENTS), *both)
    player.publish(range(REPEATED), "orders_processed_skipped", "notifications_processed_skipped")
    return KnownRun(began, int(time.time()))
