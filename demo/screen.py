"""What the demo prints: headings, commands, and a tick or a cross for each check."""

import os
import sys
import termios
import textwrap
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import IO, Literal, TextIO, cast

from rich.console import RenderableType

_WIDTH = 96
_BOLD, _DIM, _RED, _GREEN = "1", "2", "31", "32"


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

    Colours only where a terminal reads it and NO_COLOR is unset.
    """

    def __init__(self) -> None:
        self.story: list[Entry] = []
        self._out = Outlet(sys.stdout)
        self._width = _WIDTH
        self._colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self._tick, self._cross = _marks(sys.stdout.encoding)

    def heading(self, text: str, why: str) -> None:
        """Begin an act: its name, and why it matters."""
        self.story.append(Entry("heading", text, why))
        self._line("")
        self._line(self._coloured(_BOLD, text))
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
            self._line(self._coloured(_DIM, f"  {'  ' if continued else '$ '}{line}"))
            continued = line.endswith("\\")

    def check(self, passed: bool, text: str, seen: str = "") -> None:
        """Show what came out of one check, and what was seen."""
        self.story.append(Entry("passed" if passed else "failed", text, seen))
        mark = self._coloured(_GREEN, self._tick) if passed else self._coloured(_RED, self._cross)
        self._line(f"  {mark} {text}{': ' if seen else ''}{seen}")

    def log(self, title: str, text: str) -> None:
        """Show the end of a log."""
        self.story.append(Entry("log", title, text))
        self._line("")
        self._wrapped(title)
        self._line(textwrap.indent(text, "  | ", lambda _line: True))

    def watching(self, _panel: Callable[[], RenderableType]) -> AbstractContextManager[object]:
        """Keep a panel below the story while the block runs, where it can be kept up to date."""
        return nullcontext()

    def _wrapped(self, text: str) -> None:
        for line in text.splitlines() or [""]:
            filled = textwrap.fill(
                line, self._width, break_long_words=False, break_on_hyphens=False
            )
            self._line(filled)

    def _coloured(self, colour: str, text: str) -> str:
        return f"\033[{colour}m{text}\033[0m" if self._colours else text

    def _line(self, text: str) -> None:
        # Flushed, so that a pipe's reader can follow too.
        print(text, file=cast("IO[str]", self._out), flush=True)


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

    @property
    def encoding(self) -> str:
        """The stream's encoding."""
        return self._stream.encoding

    def write(self, text: str) -> int:
        """Write it, or nothing."""
        try:
            return self._stream.write(text)
        except OSError:
            return self._go_on_without()

    def flush(self) -> None:
        """Pass on what has been written."""
        try:
            self._stream.flush()
        except OSError:
            self._go_on_without()

    def _go_on_without(self) -> int:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        return 0


def _marks(encoding: str) -> tuple[str, str]:
    try:
        "✓✗".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return "[ok]", "[FAILED]"
    return "✓", "✗"
