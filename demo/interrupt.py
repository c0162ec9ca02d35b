"""How a program of the demo ends: Ctrl-C ends it once, and what it cannot do it says in a line.

What it has started is taken down undisturbed then.
"""

import signal
import sys
from collections.abc import Callable
from types import FrameType

from demo.steps import CannotPlayError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_program(name: str, program: Callable[[], int]) -> int:
    """Run it, and return its exit code: 2 where it cannot run, 130 where it is interrupted.

    The first of the signals raises KeyboardInterrupt in it, and every later one does nothing.
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


def interrupt_no_more() -> None:
    """Pass over all further signals."""
    for number in _SIGNALS:
        # Not SIG_IGN, which the commands that we still run would inherit.
        signal.signal(number, _nothing)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    interrupt_no_more()
    raise KeyboardInterrupt


def _nothing(_number: int, _frame: FrameType | None) -> None:
    pass
