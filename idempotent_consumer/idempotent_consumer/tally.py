"""What became of each delivery: one counter, and one log line or a share of one."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping

from structlog.typing import FilteringBoundLogger

from .event import Event
from .metrics import Metrics

_LINES_AT_ONCE = 10
"""Up to so many deliveries settled together get a line each, more get one line for all."""


class Outcome(enum.StrEnum):
    """How a delivery ended. The value is the end of its counter's name."""

    PROCESSED = "processed"
    SKIPPED = "processed_skipped"
    IGNORED = "ignored"
    CONFLICTED = "conflicted"
    INVALID = "invalid"
    FAILED = "failed"
    RETRIED = "retried"
    RETURNED = "returned"


_SAY = {
    Outcome.PROCESSED: "processed",
    Outcome.SKIPPED: "skipped: a duplicate",
    Outcome.IGNORED: "ignored: no handler for its type",
    Outcome.CONFLICTED: "parked: its id was used before with another body",
    Outcome.INVALID: "parked: no valid event",
    Outcome.FAILED: "parked: it failed once more than it is retried",
    Outcome.RETRIED: "failed: it comes back later",
}


_TROUBLE = {Outcome.CONFLICTED, Outcome.INVALID, Outcome.FAILED, Outcome.RETRIED}
"""Told as warnings: somebody may have to do something."""


class Tally:
    """Counts outcomes and logs them, in small numbers singly and in large ones together."""

    def __init__(self, noun: str, metrics: Metrics, log: FilteringBoundLogger) -> None:
        self._noun, self._metrics, self._log = noun, metrics, log
        self._lines: list[tuple[Outcome, Mapping[str, object]]] = []
        self._settled: Counter[Outcome] = Counter()
        for name in ("received", *(outcome.value for outcome in Outcome)):
            self.count(name, 0)

    def count(self, name: str, by: int = 1) -> None:
        """Add to one of the service's counters, which starts with its noun."""
        self._metrics.count(f"{self._noun}_{name}", by)

    def timing(self, name: str, elapsed_s: float) -> None:
        """Note how long one step took."""
        self._metrics.timing(f"{self._noun}_{name}", elapsed_s)

    def settled(self, outcome: Outcome, about: Event | dict[str, object]) -> None:
        """Count a delivery that has been settled; what it was about goes into its line."""
        self._settled[outcome] += 1
        if len(self._lines) <= _LINES_AT_ONCE:
            line = about.about if isinstance(about, Event) else about
            self._lines.append((outcome, line))

    def returned(self, deliveries: int) -> None:
        """Count deliveries that went back to the broker with their channel."""
        self.count(Outcome.RETURNED.value, deliveries)
        if deliveries:
            self._log.warning(
                "deliveries went back to the broker and will come again", deliveries=deliveries
            )

    def flush(self) -> None:
        """Write what has been settled since the last call."""
        if not self._settled:
            return
        for outcome, number in self._settled.items():
            self.count(outcome.value, number)
        if len(self._lines) <= _LINES_AT_ONCE:
            for outcome, about in self._lines:
                say = self._log.warning if outcome in _TROUBLE else self._log.info
                say(_SAY[outcome], **about)
        else:
            numbers = {outcome.value: number for outcome, number in self._settled.items()}
            if _TROUBLE.isdisjoint(self._settled):
                self._log.info("settled a batch", **numbers)
            else:
                self._log.warning("settled a batch", **numbers)
        self._settled.clear()
        self._lines.clear()
