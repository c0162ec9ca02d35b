"""Wait for a condition: retry an assertion until a deadline.

The only place where a sleep stands. A test never sleeps "long enough": it says what must become
true, and by when; or that a value has to stand still, and for how long.
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


def lasts(duration_s: float) -> None:
    """Let a fault last, which is no wait for anything."""
    time.sleep(max(0.0, duration_s))


def stands_still(read: Callable[[], T], for_s: float = 1.0, timeout_s: float = 30.0) -> T:
    """Wait until what is read has not changed for so long, and return it.

    For what has no end that could be named, such as work under way when a fault began. Raises
    AssertionError with the last where it still changes after `timeout_s`.
    """
    last, since_s = read(), time.monotonic()

    def stood() -> T:
        nonlocal last, since_s
        now, now_s = read(), time.monotonic()
        if now != last:
            last, since_s = now, now_s
        if now_s - since_s < for_s:
            raise AssertionError(f"{now!r} has not stood still for {for_s:g} s")
        return now

    return eventually(stood, timeout_s)
