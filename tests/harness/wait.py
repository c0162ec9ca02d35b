"""Wait for a condition: retry an assertion until a deadline.

The only place where a sleep stands. A test never sleeps "long enough": it says what must become
true, and by when.
"""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(
    assertion: Callable[[], T],
    timeout_s: float = 30.0,
    *,
    also: tuple[type[Exception], ...] = (),
    interval_s: float = 0.05,
) -> T:
    """Call `assertion` until it raises no AssertionError, and return what it returned.

    `also` names further errors that mean "not yet", such as OSError while a server restarts.
    After `timeout_s` the last error is raised as it was; any other error is raised at once.
    It is called at least once, also with a timeout of zero.
    """
    not_yet: tuple[type[Exception], ...] = (AssertionError, *also)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return assertion()
        except not_yet:
            if time.monotonic() + interval_s > deadline:
                raise
        time.sleep(interval_s)
