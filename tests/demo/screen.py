"""What the demo prints: headings, commands, and a tick or a cross for each check."""

import os
import sys
import textwrap

_WIDTH = 96
_BOLD, _DIM, _RED, _GREEN = "1", "2", "31", "32"


class Screen:
    """Writes to standard output; colours only where a terminal reads it and NO_COLOR is unset."""

    def __init__(self) -> None:
        self._colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self._tick, self._cross = _marks(sys.stdout.encoding)

    def heading(self, text: str, why: str) -> None:
        """Begin an act: its name, and why it matters."""
        self._line("")
        self._line(self._coloured(_BOLD, text))
        self.say(why)

    def say(self, text: str) -> None:
        """Tell something; long lines are wrapped, but not inside of a word or a URL."""
        for line in text.splitlines() or [""]:
            self._line(textwrap.fill(line, _WIDTH, break_long_words=False, break_on_hyphens=False))

    def typed(self, command: str) -> None:
        """Show the command that does, typed by hand, what is done now."""
        continued = False
        for line in command.splitlines():
            self._line(self._coloured(_DIM, f"  {'  ' if continued else '$ '}{line}"))
            continued = line.endswith("\\")

    def check(self, passed: bool, text: str) -> None:
        """Show what came out of one check."""
        mark = self._coloured(_GREEN, self._tick) if passed else self._coloured(_RED, self._cross)
        self._line(f"  {mark} {text}")

    def log(self, title: str, text: str) -> None:
        """Show the end of a log."""
        self._line("")
        self.say(title)
        self._line(textwrap.indent(text, "  | ", lambda _line: True))

    def _coloured(self, colour: str, text: str) -> str:
        return f"\033[{colour}m{text}\033[0m" if self._colours else text

    def _line(self, text: str) -> None:
        try:
            # Flushed, so that a pipe's reader can follow too.
            print(text, flush=True)
        except OSError:
            # The reader or the terminal is gone. What has been started is still taken down.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _marks(encoding: str) -> tuple[str, str]:
    try:
        "✓✗".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return "[ok]", "[FAILED]"
    return "✓", "✗"
