"""Waits for a condition by retrying an assertion until a deadline.

No other module calls `time.sleep`. A test never sleeps "long enough": it says what has to become
true and by when, or which value has to stay the same and for how long.
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
    """Call `assertion` until it raises no AssertionError, and return its result.

    `also` names further errors that mean "not yet", such as OSError while a server restarts. After
    `timeout_s` the last of these is raised. It is called at least once, even if `timeout_s` is 0.
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
    """Let a fault last so long; not for waiting until something has happened."""
    time.sleep(max(0.0, duration_s))


def stands_still(read: Callable[[], T], for_s: float = 1.0, timeout_s: float = 30.0) -> T:
    """Wait until `read` has returned the same value for `for_s`, and return that.

    For work whose end cannot be named, such as what was under way when a fault began. Raises
    AssertionError if the value still changes after `timeout_s`.
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
