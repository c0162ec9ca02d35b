"""The machine's clock, when somebody sets it."""

from __future__ import annotations

import time

import pytest

DAY_S = 86_400.0


def jump(monkeypatch: pytest.MonkeyPatch, by_s: float) -> None:
    """Set the clock: forward, or back with a negative number."""
    now_s, now_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: now_s() + by_s)
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + int(by_s * 1e9))
