"""A deadline for what is not to wait for anybody."""

from __future__ import annotations

import threading
from collections.abc import Callable

DEADLINE_S = 20.0
CALLS = 300
"""So many calls miss the deadline where each of them waits for a tenth of a second or longer."""


def ends_in_time(work: Callable[[], object]) -> None:
    """Do some work on a thread of its own; raises AssertionError where it misses the deadline."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(DEADLINE_S)
    if thread.is_alive():
        raise AssertionError(f"it has not ended within {DEADLINE_S:.0f} s")
