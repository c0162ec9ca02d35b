"""Batches on their way to the ledger, several at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from .bus.bus import COMMITS_IN_FLIGHT
from .ledger.commit import Batch
from .ledger.ledger import Ledger
from .ledger.records import Answer, Ask
from .tally import Tally


class Pipeline:
    """The asks that wait, and the batches being committed, ``COMMITS_IN_FLIGHT`` at the most.

    While these wait for etcd's disk the next deliveries arrive and are decoded; what gathers
    meanwhile is the next batch. ``answered`` gets the answers as they come, in no order.
    """

    def __init__(
        self, ledger: Ledger, tally: Tally, answered: Callable[[list[Answer]], None]
    ) -> None:
        self._ledger, self._tally, self._answered = ledger, tally, answered
        self._waiting: deque[Ask] = deque()
        self._commits = 0

    def add(self, ask: Ask) -> None:
        """Let an ask wait for the next batch."""
        self._waiting.append(ask)

    def commit(self) -> None:
        """Send what waits, as far as it may be sent."""
        while self._waiting and self._commits < COMMITS_IN_FLIGHT:
            batch = self._ledger.batch()
            while self._waiting and batch.take(self._waiting[0]):
                self._waiting.popleft()
            self._submit(batch)

    def _submit(self, batch: Batch) -> None:
        """Commit a batch. Its answers may come in parts; it ends with the last of them."""
        self._commits += 1
        missing, started_s = len(batch.asks), time.perf_counter()

        def answered(answers: list[Answer]) -> None:
            nonlocal missing
            missing -= len(answers)
            if not missing:
                self._commits -= 1
                self._tally.timing("commit", time.perf_counter() - started_s)
            self._answered(answers)

        self._ledger.submit(batch, answered)
