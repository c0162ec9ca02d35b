"""The ledger that keeps nothing: every delivery is new, as the demo's first acts want it."""

from __future__ import annotations

import math
from collections.abc import Callable

from structlog.typing import FilteringBoundLogger

from ..effects import Checked
from ..event import Event
from ..loop import Loop
from ..settings import Settings
from .commit import Batch
from .ledger import OnAnswers
from .records import Answer, Kind, Record


class NoLedger:
    """Stands in for the ledger where ``ENABLE_ETCD`` is false: whatever is asked is granted."""

    def __init__(self, settings: Settings, loop: Loop, log: FilteringBoundLogger) -> None:
        self._batch_size, self._loop, self._log = settings.batch_size, loop, log

    def open(self, opened: Callable[[], None]) -> None:
        """There is nothing to reach."""
        self._log.warning(
            "ENABLE_ETCD is false: every delivery is processed, duplicates too, "
            "and effects are dropped"
        )
        opened()

    def key(self, event: Event, token: str) -> bytes:
        """Return a key that no other delivery has."""
        return token.encode()

    def is_done(self, digest: str) -> bool:
        """Nothing is known to be done."""
        return False

    @property
    def halted(self) -> bool:
        """There is nothing to lose."""
        return False

    def batch(self) -> Batch:
        """Return an empty batch, bounded by BATCH_SIZE alone."""
        return Batch(self._batch_size, 1_000_000)

    def why_never(self, effects: Checked) -> str | None:
        """Nothing is written, so everything fits."""
        return None

    def submit(self, batch: Batch, answered: OnAnswers) -> None:
        """Grant every ask; a look finds nothing."""
        for ask in batch.asks:
            for put in ask.effects.puts:
                self._log.info("effect dropped", key=put.key, bytes=len(put.value))
        answers = [Answer(ask, ask.kind is not Kind.LOOK) for ask in batch.asks]
        self._loop.call_soon(lambda: answered(answers))

    def read(self, key: bytes, found: Callable[[Record | None], None]) -> None:
        """There are no records."""

    def claim_remaining_s(self, lease: int) -> float:
        """Return that a claim which does not exist never ends."""
        return math.inf

    def close(self) -> None:
        """There is nothing to end."""
