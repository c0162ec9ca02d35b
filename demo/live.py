"""The screen on a terminal: the story scrolls by, and below it a panel stays and moves."""

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import IO, cast

from rich.console import Console, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.text import Text

from demo.screen import Screen

_REFRESHED_PER_S = 5
_ROOM = 3
"""At the end of a line, for the ^C that a terminal shows: a broken line would break the panel."""

_NOT_FOR_THESE = ("", "dumb", "unknown")


class LiveScreen(Screen):
    """Tells the same lines; they stay in the terminal's history, as does the panel at its end."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console or Console(
            file=cast("IO[str]", self._out), force_terminal=True, highlight=False
        )
        self._width = min(self._width, self._console.width)

    def watching(self, panel: Callable[[], RenderableType]) -> AbstractContextManager[object]:
        """Draw the panel five times a second, by a thread that the play does not wait for."""
        return Live(
            get_renderable=lambda: Constrain(panel(), self._width - _ROOM),
            console=self._console,
            refresh_per_second=_REFRESHED_PER_S,
            vertical_overflow="crop",
        )

    def _line(self, text: str) -> None:
        # Not wrapped: a command has to be copied as one line.
        self._console.print(Text.from_ansi(text), soft_wrap=True)


def open_screen() -> Screen:
    """Return the live screen on a terminal that can move its cursor, else the one of lines."""
    terminal = sys.stdout.isatty() and os.environ.get("TERM", "") not in _NOT_FOR_THESE
    unicode = sys.stdout.encoding.lower().startswith("utf")
    return LiveScreen() if terminal and unicode else Screen()
