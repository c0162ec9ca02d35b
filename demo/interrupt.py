"""Ctrl-C ends the demo once; what it has started is then taken down undisturbed."""

import signal
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def interrupt_once() -> None:
    """Let the first of the signals raise KeyboardInterrupt and every later one do nothing."""
    for number in _SIGNALS:
        signal.signal(number, _interrupt)


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
