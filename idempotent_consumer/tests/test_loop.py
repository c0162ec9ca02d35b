"""The loop's clock, where somebody sets the machine's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fakes.clock import DAY_S, jump
from fakes.deadline import ends_in_time
from idempotent_consumer.bus.loop import PikaLoop


@pytest.fixture
def loop() -> Iterator[PikaLoop]:
    loop = PikaLoop()
    yield loop
    loop.close()


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])
def test_the_loops_clock_goes_on_when_the_machines_jumps(
    loop: PikaLoop, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    before_s = loop.now_s()
    jump(monkeypatch, jump_s)
    assert 0 <= loop.now_s() - before_s < DAY_S / 2


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])
def test_timers_are_due_neither_sooner_nor_later(
    loop: PikaLoop, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    called = []

    def soon() -> None:
        called.append("soon")
        loop.stop()

    loop.call_later(DAY_S / 2, lambda: called.append("half a day later"))
    loop.call_later(0.05, soon)
    jump(monkeypatch, jump_s)
    ends_in_time(loop.run)
    assert called == ["soon"]
