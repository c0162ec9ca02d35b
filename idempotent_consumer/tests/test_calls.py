"""Handlers as they are run, and calls in bounded number, each under its claim."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from structlog.testing import LogCapture

from fakes.events import body
from idempotent_consumer.calls import Calls, Handler, Returned, one_line
from idempotent_consumer.event import NO_EFFECTS, Effects, Event, Put, decode
from idempotent_consumer.ledger import NoLedger
from idempotent_consumer.settings import Settings
from idempotent_consumer.testing.loop import Loop, Threads, complete
from idempotent_consumer.testing.process import captured

EVENT = decode(body("1"))
TIMEOUT_S = 5.0
DEADLINE_S = 10.0
TIMED_OUT = "TimeoutError: it took longer than 5 s"


class Bench:
    """Calls on a loop of their own, with claims that last for ever unless told otherwise."""

    def __init__(self, at_once: int = 2, ledger: type[NoLedger] = NoLedger) -> None:
        self.loop, self.lines = Loop(), LogCapture()
        log, threads = captured(self.lines), Threads(at_once)
        self.ledger = ledger(Settings(), log)
        self.calls = Calls("order", self.ledger, log, self.loop.time, at_once, threads)

    def wait(self, function: Callable[..., Awaitable[object]]) -> Returned:
        """Await a coroutine handler under its time-out."""
        returned: Returned = self.loop.run_until_complete(
            self.calls.wait(function, EVENT, TIMEOUT_S)
        )
        return returned

    def call(self, function: Callable[..., Any], lease: int = 1) -> Any:
        """Start a call; return its task."""
        call = self.calls.call(Handler(function, TIMEOUT_S), EVENT, lease)
        task = self.loop.create_task(call)
        self.loop.run_until_idle()
        return task


@pytest.fixture
def bench() -> Bench:
    return Bench()


# Coroutines.


def test_what_a_coroutine_returns_is_its_effects(bench: Bench) -> None:
    async def write(event: Event, timeout_s: float) -> Put:
        await asyncio.sleep(timeout_s - 1)
        return Put(f"/seen/{event.id}", b"x")

    returned = bench.wait(write)
    assert (returned.effects.puts, returned.error) == ((Put("/seen/1", b"x"),), "")
    assert returned.elapsed_s == TIMEOUT_S - 1


@pytest.mark.parametrize("error", [ConnectionError("no"), SystemExit("no")])
def test_what_a_coroutine_raises_is_its_failure(bench: Bench, error: BaseException) -> None:
    async def fail(_event: Event, _timeout_s: float) -> None:
        raise error

    assert bench.wait(fail) == Returned(NO_EFFECTS, f"{type(error).__name__}: no", 0.0)


def test_a_coroutine_is_cancelled_at_its_time_out_and_has_failed(bench: Bench) -> None:
    ended: list[str] = []

    async def hang(_event: Event, _timeout_s: float) -> None:
        try:
            await asyncio.sleep(100)
        finally:
            ended.append("cancelled")

    returned = bench.wait(hang)
    assert ended == ["cancelled"]
    assert returned == Returned(NO_EFFECTS, TIMED_OUT, TIMEOUT_S)
    assert bench.lines.entries == []


@pytest.mark.parametrize("ends", ["returns", "raises"])
def test_a_coroutine_that_swallows_its_cancellation_has_failed(bench: Bench, ends: str) -> None:
    """What it returns or raises instead says nothing of the call that was cut off."""

    async def swallow(_event: Event, _timeout_s: float) -> Put:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            if ends == "raises":
                raise ConnectionError("closed") from None
        return Put("/seen/1", b"x")

    assert bench.wait(swallow) == Returned(NO_EFFECTS, TIMED_OUT, TIMEOUT_S)


def test_a_coroutine_that_swallows_its_cancellation_is_reported(bench: Bench) -> None:
    async def swallow(_event: Event, _timeout_s: float) -> None:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            await asyncio.sleep(2)

    assert bench.wait(swallow).elapsed_s == TIMEOUT_S + 2
    (line,) = bench.lines.entries
    assert "caught its own cancellation" in line["event"]
    assert (line["log_level"], line["event_id"], line["seconds"]) == ("warning", "1", 7.0)


def test_a_coroutine_that_raises_cancelled_error_itself_has_failed(bench: Bench) -> None:
    """A library does so where a task of its own was cancelled: this process goes on."""

    async def raise_it(_event: Event, _timeout_s: float) -> None:
        raise asyncio.CancelledError("by itself")

    assert bench.wait(raise_it) == Returned(NO_EFFECTS, "CancelledError: by itself", 0.0)


@pytest.mark.parametrize("swallows", [False, True])
def test_a_call_whose_process_ends_has_neither_failed_nor_succeeded(
    bench: Bench, swallows: bool
) -> None:
    """What is asked for it next would be asked of a run that is ending."""

    async def hang(_event: Event, _timeout_s: float) -> None:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            if not swallows:
                raise

    task = bench.call(hang)
    task.cancel()
    bench.loop.run_until_idle()
    assert task.cancelled()
    assert bench.calls.overdue() == 0


# Plain functions.


@pytest.mark.parametrize("leave", [SystemExit(1), KeyboardInterrupt(), GeneratorExit("odd")])
def test_an_exit_in_a_plain_handler_is_a_failure_like_others(
    bench: Bench, leave: BaseException
) -> None:
    """It would end a thread, and its event would stay in flight."""

    def handle(_event: Event) -> Effects:
        raise leave

    assert bench.calls.run(handle, EVENT).error.startswith(type(leave).__name__)


def test_plain_handlers_run_on_threads_as_many_at_once_as_there_are_slots() -> None:
    """Each waits until all three run, on real threads."""
    together = threading.Barrier(3)

    def handle(_event: Event, _timeout_s: float) -> None:
        together.wait(DEADLINE_S)

    async def main() -> list[Returned | None]:
        loop, bench = asyncio.get_running_loop(), Bench()
        with ThreadPoolExecutor(3) as threads:
            calls = Calls("order", bench.ledger, captured(bench.lines), loop.time, 3, threads)
            handler = Handler(handle, DEADLINE_S)
            return await asyncio.gather(*(calls.call(handler, EVENT, 1) for _ in range(3)))

    assert [returned.error for returned in asyncio.run(main()) if returned] == [""] * 3


def test_a_plain_handler_knows_no_event_loop() -> None:
    """It runs on a thread of its own, where asyncio.run works."""
    bench, found = Bench(), []

    async def inner() -> str:
        return "run"

    def handle(_event: Event, _timeout_s: float) -> None:
        found.append(complete(inner()))

    bench.call(handle)
    assert found == ["run"]


# Time.


async def _succeed(_event: Event, _timeout_s: float) -> None: ...


def _return(_event: Event, _timeout_s: float) -> None: ...


@pytest.mark.parametrize("function", [_succeed, _return])
@pytest.mark.parametrize(("left_s", "called"), [(TIMEOUT_S + 0.1, True), (TIMEOUT_S, False)])
def test_a_call_is_made_where_it_can_last_as_long_as_it_may(
    bench: Bench, function: Any, left_s: float, called: bool
) -> None:
    bench.calls.end_by_s = bench.loop.time() + left_s
    assert bench.calls.has_time(Handler(function, TIMEOUT_S)) is called
    assert (bench.call(function).result() is not None) is called


@pytest.mark.parametrize("function", [_succeed, _return])
def test_a_call_is_not_made_under_a_claim_that_ends_too_soon(function: Any) -> None:
    class EndingLedger(NoLedger):
        def claim_remaining_s(self, lease: int) -> float:
            return TIMEOUT_S + lease

    bench = Bench(ledger=EndingLedger)
    assert bench.call(function, lease=0).result() is None
    assert bench.call(function, lease=1).result() is not None


def test_a_coroutine_that_does_not_end_is_overdue_until_it_does(bench: Bench) -> None:
    async def hang(_event: Event, _timeout_s: float) -> None:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            await asyncio.sleep(3 * TIMEOUT_S)

    task = bench.call(hang)
    bench.loop.advance(3 * TIMEOUT_S)
    assert bench.calls.overdue() == 0
    bench.loop.advance(0.1)
    assert bench.calls.overdue() == 1
    bench.loop.advance(TIMEOUT_S)
    assert task.done()
    assert bench.calls.overdue() == 0


def test_a_plain_call_that_does_not_return_is_overdue_until_it_does(bench: Bench) -> None:
    bench.call(lambda _event, _timeout_s: bench.loop.spend(4 * TIMEOUT_S))
    bench.loop.advance(3.1 * TIMEOUT_S)
    assert bench.calls.overdue() == 1
    bench.loop.advance(TIMEOUT_S)
    assert bench.calls.overdue() == 0


def test_a_call_that_waits_for_a_thread_is_not_overdue() -> None:
    """A restart would free no thread: it would only repeat the calls under way."""
    bench = Bench(at_once=1)
    bench.call(lambda _event, _timeout_s: bench.loop.spend(2 * TIMEOUT_S))
    waiting = bench.call(lambda _event, _timeout_s: bench.loop.spend(2 * TIMEOUT_S))
    bench.loop.advance(3.5 * TIMEOUT_S)
    assert bench.calls.overdue() == 0
    bench.loop.advance(TIMEOUT_S)
    assert waiting.done()


# An exception in one line.


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("no"), "ValueError: no"),
        (ValueError("two\nlines\tand\r\nmore"), "ValueError: two lines and more"),
        (KeyError("k"), "KeyError: 'k'"),
        (RuntimeError(), "RuntimeError:"),
        (ValueError("a\ud800b"), "ValueError: a?b"),
    ],
)
def test_an_exception_is_written_in_one_line(error: Exception, expected: str) -> None:
    assert one_line(error) == expected


def test_the_line_is_bounded_and_can_be_encoded() -> None:
    line = one_line(ValueError("ä\udcff" * 10_000))
    assert len(line) == 500
    line.encode()
