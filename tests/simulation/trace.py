"""What happened in one run: lines for a reader, the faults that fired, the violations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable


class Trace:
    """The account of one run."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._lines: list[tuple[float, str, str, tuple[object, ...]]] = []
        self.fired: Counter[str] = Counter()
        self.violations: list[str] = []

    def note(self, who: str, what: str, *about: object) -> None:
        """Add a line."""
        self._lines.append((self._now_s(), who, what, about))

    def fault(self, kind: str, who: str = "", *about: object) -> None:
        """Count a fault that has fired, and add a line."""
        self.fired[kind] += 1
        self._lines.append((self._now_s(), who, f"FAULT {kind}", about))

    def has_fired(self, *kinds: str) -> bool:
        """Return whether one of these faults has happened."""
        return any(self.fired[kind] for kind in kinds)

    def violation(self, kind: str, *about: object) -> None:
        """Add something that must never happen."""
        text = " ".join([f"{kind}:", *map(_short, about)])
        self.violations.append(text)
        self._lines.append((self._now_s(), "", f"VIOLATION {text}", ()))

    def text(self) -> str:
        """Write the account for a reader."""
        return "\n".join(
            f"{at_s:10.4f} {who:10} {what} {' '.join(map(_short, about))}".rstrip()
            for at_s, who, what, about in self._lines
        )


def _short(about: object) -> str:
    if isinstance(about, dict):
        return " ".join(f"{key}={value!r:.60}" for key, value in about.items())
    text = about if isinstance(about, str) else repr(about)
    return text if len(text) <= 160 else f"{text[:150]}...({len(text)})"


class TraceLog:
    """The library's log, into the trace, as long as its process lives."""

    def __init__(self, trace: Trace, who: str, lives: Callable[[], bool]) -> None:
        self._trace, self._who, self._lives = trace, who, lives

    def bind(self, **_: object) -> TraceLog:
        """Return a log of the same process."""
        return self

    def info(self, line: str, **about: object) -> None:
        """Keep a line."""
        if self._lives():
            self._trace.note(self._who, line, about)

    warning = error = critical = debug = info
