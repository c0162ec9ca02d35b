"""What the demo prints: headings, commands, and a tick or a cross for each check.

On a terminal the story scrolls by, and below it a panel stays and moves.
"""

import os
import sys
import termios
import textwrap
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import IO, Any, Literal, TextIO, cast

from rich.console import Console, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.text import Text

_WIDTH = 96
_REFRESHED_PER_S = 5
_ROOM = 3
"""At the end of a line, for the ^C that a terminal shows: a broken line would break the panel."""

_NOT_FOR_THESE = ("", "dumb", "unknown")


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
    """Writes lines to standard output, and keeps the story that they tell.

    `live` is the terminal that keeps a panel below them; both then stay in its history, in colours
    unless NO_COLOR is set.
    """

    def __init__(self, live: Console | None = None) -> None:
        self.story: list[Entry] = []
        self._live, self._out = live, cast("IO[str]", Outlet(sys.stdout))
        self._width = min(_WIDTH, live.width) if live else _WIDTH
        self._tick, self._cross = _marks(sys.stdout.encoding)

    def heading(self, text: str, why: str) -> None:
        """Begin an act: its name, and why it matters."""
        self.story.append(Entry("heading", text, why))
        self._line("")
        self._line((text, "bold"))
        self._wrapped(why)

    def say(self, text: str) -> None:
        """Tell something; long lines are wrapped, but not inside of a word or a URL."""
        self.story.append(Entry("said", text))
        self._wrapped(text)

    def typed(self, command: str) -> None:
        """Show the command that does, typed by hand, what is done now."""
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
        """Keep a panel below the story while the block runs, where it can be kept up to date.

        A thread draws it five times a second, and the play does not wait for it.
        """
        if self._live is None:
            return nullcontext()
        return Live(
            get_renderable=lambda: Constrain(panel(), self._width - _ROOM),
            console=self._live,
            refresh_per_second=_REFRESHED_PER_S,
            vertical_overflow="crop",
        )

    def _wrapped(self, text: str) -> None:
        wrapper = textwrap.TextWrapper(self._width, break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines() or [""]:
            self._line(wrapper.fill(line))

    def _line(self, *parts: str | tuple[str, str]) -> None:
        """Write parts as one line; those with a style have it on a live screen."""
        line = Text.assemble(*parts)
        if self._live:
            # Not wrapped: a command has to be copied as one line.
            self._live.print(line, soft_wrap=True)
        else:
            # Flushed, so that a pipe's reader can follow too.
            print(line.plain, file=self._out, flush=True)


def open_screen() -> Screen:
    """Return a live screen on a terminal that can move its cursor, else one of lines."""
    terminal = sys.stdout.isatty() and os.environ.get("TERM", "") not in _NOT_FOR_THESE
    if not terminal or not sys.stdout.encoding.lower().startswith("utf"):
        return Screen()
    out = cast("IO[str]", Outlet(sys.stdout))
    return Screen(Console(file=out, force_terminal=True, highlight=False))


def wait_for_enter() -> None:
    """Read a line from the terminal, which does not show it: that would break the panel."""
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSADRAIN, silent)
    try:
        sys.stdin.readline()
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


class Outlet:
    """A stream whose reader may leave: what has been started is still taken down then."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write it, or nothing."""
        self._try(self._stream.write, text)

    def flush(self) -> None:
        """Pass on what has been written."""
        self._try(self._stream.flush)

    def _try(self, do: Callable[..., object], *arguments: Any) -> None:
        try:
            do(*arguments)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def _marks(encoding: str) -> tuple[str, str]:
    try:
        "✓✗".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return "[ok]", "[FAILED]"
    return "✓", "✗"
