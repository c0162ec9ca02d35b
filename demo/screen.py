"""What the demo prints: headings, commands, and a tick or a cross for each check.

On a terminal, the story scrolls by above a panel that stays at the bottom and is kept up to date.
"""

import getpass
import io
import os
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.text import Text

_WIDTH = 96
_REFRESHED_PER_S = 5
_ROOM = 3
"""Left free at the end of a line for the terminal's ^C: a wrapped line would break the panel."""

_CANNOT_MOVE_CURSOR = ("", "dumb", "unknown")


@dataclass(frozen=True)
class Entry:
    """One thing that was told, and when (Unix time in seconds).

    `more` is a heading's reason, what a check has seen, or the text of a log.
    """

    kind: Literal["heading", "said", "typed", "passed", "failed", "log"]
    text: str
    more: str = ""
    at: float = field(default_factory=time.time)


class Screen:
    """Writes lines to a console and keeps the story that they tell.

    A console on a terminal also shows a panel below them, and colours unless NO_COLOR is set. The
    default console writes plain lines to standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.story: list[Entry] = []
        self._console = console or Console(force_terminal=False, width=_WIDTH)
        self._width = min(_WIDTH, self._console.width)
        unicode = self._console.encoding.startswith("utf")
        self._tick, self._cross = ("✓", "✗") if unicode else ("[ok]", "[FAILED]")

    def heading(self, text: str, why: str) -> None:
        """Begin an act: its name, and why it matters."""
        self.story.append(Entry("heading", text, why))
        self._line("")
        self._line((text, "bold"))
        self._wrapped(why)

    def say(self, text: str) -> None:
        """Tell something. Long lines are wrapped, but never inside a word or a URL."""
        self.story.append(Entry("said", text))
        self._wrapped(text)

    def typed(self, command: str) -> None:
        """Show the command that a user would type for the step that is done now."""
        self.story.append(Entry("typed", command))
        continued = False
        for line in command.splitlines():
            self._line((f"  {'  ' if continued else '$ '}{line}", "dim"))
            continued = line.endswith("\\")

    def check(self, passed: bool, text: str, seen: str = "") -> None:
        self.story.append(Entry("passed" if passed else "failed", text, seen))
        mark = (self._tick, "green") if passed else (self._cross, "red")
        self._line("  ", mark, f" {text}{': ' if seen else ''}{seen}")

    def log(self, title: str, text: str) -> None:
        self.story.append(Entry("log", title, text))
        self._line("")
        self._wrapped(title)
        self._line(textwrap.indent(text, "  | ", lambda _line: True))

    def watching(self, panel: Callable[[], RenderableType]) -> AbstractContextManager[object]:
        """Keep a panel below the story while the block runs, if this is a terminal.

        A thread draws it five times a second, and the play does not wait for that.
        """
        if not self._console.is_terminal:
            return nullcontext()
        return Live(
            get_renderable=lambda: Constrain(panel(), self._width - _ROOM),
            console=self._console,
            refresh_per_second=_REFRESHED_PER_S,
            vertical_overflow="crop",
        )

    def _wrapped(self, text: str) -> None:
        wrapper = textwrap.TextWrapper(self._width, break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines() or [""]:
            self._line(wrapper.fill(line))

    def _line(self, *parts: str | tuple[str, str]) -> None:
        """Write parts, which may have a style, as one line."""
        # If the reader has gone (Rich exits for a broken pipe), the demo goes on without it: what
        # it has started is still taken down.
        with suppress(OSError, SystemExit):
            # Not wrapped: a user must be able to copy a command as one line.
            self._console.print(Text.assemble(*parts), soft_wrap=True)


def open_screen() -> Screen:
    """Return a screen with a panel if standard output is a terminal that can move its cursor."""
    console = Console(force_terminal=True)
    can_move = os.environ.get("TERM", "") not in _CANNOT_MOVE_CURSOR
    is_live = sys.stdout.isatty() and can_move and console.encoding.startswith("utf")
    return Screen(console if is_live else None)


def wait_for_enter() -> None:
    """Read a line from the terminal without an echo, which would break the panel."""
    with suppress(EOFError):
        getpass.getpass("", stream=io.StringIO())
