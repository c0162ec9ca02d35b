"""How a program of the demo ends: on Ctrl-C, or with one line that says why it cannot go on.

Nothing interrupts it while it takes down what it has started.
"""

import signal
import sys
from collections.abc import Callable

from demo.steps import CannotPlayError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_program(name: str, program: Callable[[], int]) -> int:
    """Run a program and return its exit code: 2 if it cannot run, 130 if it was interrupted.

    The first signal raises KeyboardInterrupt in it; all further signals are ignored.
    """
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    try:
        return program()
    except (CannotPlayError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130


def ignore_interrupts() -> None:
    """Ignore all further signals."""
    for number in _SIGNALS:
        # Not SIG_IGN, which the commands that we still run would inherit.
        signal.signal(number, lambda *_: None)


def _interrupt(*_: object) -> None:
    ignore_interrupts()
    raise KeyboardInterrupt
