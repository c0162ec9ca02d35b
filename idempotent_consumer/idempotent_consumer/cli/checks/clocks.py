"""Clocks: no decision goes by the time of day, but people and replays read it."""

from __future__ import annotations

from datetime import datetime

from .finding import UNKNOWN, WARNING, Finding, ok

_MUCH_S = 5.0
"""The servers tell their time to the second, and take a while to do so."""


def check(about: str, date: datetime | None, now_s: float) -> Finding:
    """Compare a server's clock with this machine's."""
    if date is None:
        return Finding(UNKNOWN, about, "its clock was not seen")
    ahead_s = date.timestamp() - now_s
    if abs(ahead_s) <= _MUCH_S:
        return ok(about, "its clock agrees with this machine's")
    return Finding(
        WARNING,
        about,
        f"its clock is {abs(ahead_s):.0f} s "
        f"{'ahead of' if ahead_s > 0 else 'behind'} this machine's: the times of "
        "records and the ages of dead letters mislead",
        "synchronise the clocks (NTP)",
    )
