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


def version_number(version: str) -> tuple[int, ...]:
    """Read a version as numbers, as far as it has them: ``4.0.8`` or ``3.6.0-rc.1``."""
    parts = version.partition("-")[0].split(".")
    return tuple(int(part) for part in parts if part.isdecimal())


def version_finding(about: str, version: str, first_good: str) -> Finding:
    """Return whether a server is older than the first version without known faults."""
    if version_number(version) < version_number(first_good):
        return Finding(
            WARNING,
            about,
            f"version {version} has known faults, fixed in {first_good}",
            f"upgrade it to {first_good} or newer",
        )
    return ok(about, f"version {version}")
