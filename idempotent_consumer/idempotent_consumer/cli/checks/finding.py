"""What a check finds."""

from __future__ import annotations

from typing import NamedTuple

OK, UNKNOWN, WARNING, PROBLEM = "ok", "unknown", "warning", "problem"
"""From fine to what breaks the guarantee; unknown is what could not be looked at."""


class Finding(NamedTuple):
    """One line of the doctor's: how bad, of what, what it is, and what to do about it."""

    level: str
    about: str
    what: str
    do: str = ""


def ok(about: str, what: str) -> Finding:
    """Return that something is as it should be."""
    return Finding(OK, about, what)
