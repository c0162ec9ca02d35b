"""Handlers as they are run, and calls in bounded number, each under its claim."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from structlog.contextvars import bind_contextvars, get_contextvars
from structlog.testing import LogCapture

from fakes.events import OutOfStock, Speechless, body
from idempotent_consumer.calls import Calls, Handler, Reject, RetryAfter, Returned, one_line
from idempotent_consumer.event import NO_EFFECTS, Effects, Event, Put, decode
from idempotent_consumer.ledger import NoLedger
from idempotent_consumer.metrics import Outcome
from idempotent_consumer.settings import Settings
from idempotent_consumer.testing.loop import Loop, Threads
from idempotent_consumer.testing.process import captured

EVENT = decode(body("1"))
TIMEOUT_S = 5.0
DEADLINE_S = 10.0
TIMED_OUT = "TimeoutError: it took longer than 5 s"


class Claims(NoLedger):
    """Claims that last as many seconds longer than a call may as their lease says."""

    ended = False

    def claim_remaining_s(self, lease: int) -> float:
        return TIMEOUT_S + lease


class BrieflyHeld(Claims):
    """Claims that end in the loop's next step once they have been looked at."""

    def claim_remaining_s(self, lease: int) -> float:
        asyncio.get_running_loop().call_soon(setattr, self, "ended", True)
        return super().claim_remaining_s(lease)


class Bench:
    """Calls on a loop of their own."""

    def __init__(self, at_once: int = 2, claims: type[Claims] = Claims) -> None:
        self.loop, self.lines = Loop(), LogCapture()
        log, threads = captured(self.lines), Threads(at_once)
        self.ledger = claims(Settings(), log)
        self.calls = Calls("order", self.ledger, log, self.loop.time, at_once, threads)

    def wait(self, function: Callable[..., Awaitable[object]]) -> Returned:
        """Await a coroutine handler under its time-out."""
        task = self.loop.create_task(self.calls.call(Handler(function, TIMEOUT_S), EVENT, 1))
        self.loop.agenda.run(enough=task.done)
        assert not task.cancelled(), "its event would stay in flight for ever"
        returned: Returned = task.result()
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


def hanging(when_cancelled: Callable[[], Awaitable[object]]) -> Callable[..., Awaitable[object]]:
    """Return a coroutine handler that ends only where it is cancelled, by doing this."""

    async def hang(_event: Event, _timeout_s: float) -> object:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            return await when_cancelled()
        raise AssertionError("it is cancelled before")

    return hang


async def end() -> None:
    raise asyncio.CancelledError


async def go_on() -> Put:
    await asyncio.sleep(2)
    return Put("/seen/1", b"x")


async def fail() -> None:
    raise ConnectionError("closed")


@pytest.mark.parametrize(
    "error", [ConnectionError("no"), SystemExit("no"), asyncio.CancelledError("no")]
)
def test_what_a_coroutine_raises_is_its_failure(bench: Bench, error: BaseException) -> None:
    """A library raises CancelledError where a task of its own was cancelled: this one goes on."""

    async def raise_it(_event: Event, _timeout_s: float) -> None:
        raise error

    returned = bench.wait(raise_it)
    assert returned.error.startswith(f"{type(error).__name__}: no (test_calls.py:")
    assert (returned.effects, returned.raised) == (NO_EFFECTS, error)


@pytest.mark.parametrize(
    ("when_cancelled", "elapsed_s"), [(end, TIMEOUT_S), (fail, TIMEOUT_S), (go_on, TIMEOUT_S + 2)]
)
def test_a_coroutine_is_cancelled_at_its_time_out_and_has_failed(
    bench: Bench, when_cancelled: Callable[[], Awaitable[object]], elapsed_s: float
) -> None:
    """What it returns or raises instead says nothing of the call; that it goes on is reported."""
    assert bench.wait(hanging(when_cancelled)) == Returned(NO_EFFECTS, TIMED_OUT, elapsed_s)
    reported = [
        (line["log_level"], line["event_id"], line["seconds"]) for line in bench.lines.entries
    ]
    assert reported == ([("warning", "1", 7.0)] if when_cancelled is go_on else [])
    assert all("caught its own cancellation" in line["event"] for line in bench.lines.entries)


def test_a_claim_is_looked_at_in_the_step_that_makes_its_call() -> None:
    """A process that freezes in between makes the call when the claim is another's."""
    bench = Bench(claims=BrieflyHeld)

    async def call(_event: Event, _timeout_s: float) -> None:
        assert not bench.ledger.ended

    assert bench.wait(call).error == ""


@pytest.mark.parametrize("when_cancelled", [end, go_on])
def test_a_call_whose_process_ends_has_neither_failed_nor_succeeded(
    bench: Bench, when_cancelled: Callable[[], Awaitable[object]]
) -> None:
    """What is asked for it next would be asked of a run that is ending."""
    task = bench.call(hanging(when_cancelled))
    task.cancel()
    bench.loop.advance(2)
    assert task.cancelled()
    assert bench.calls.overdue() == 0


@pytest.mark.parametrize("after_s", [1.0, TIMEOUT_S - 0.1, TIMEOUT_S + 0.1])
def test_a_handler_that_cancels_its_own_task_ends_no_more_than_its_call(
    bench: Bench, after_s: float
) -> None:
    """As aiohttp before 3.10.6 does at a time-out of its own, without taking it back."""

    async def fail_at_its_own_time_out(_event: Event, _timeout_s: float) -> None:
        task: Any = asyncio.current_task()
        asyncio.get_running_loop().call_later(after_s, task.cancel)
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(TIMEOUT_S - 0.1)
        raise ConnectionError("slow")

    async def call_and_record() -> Returned:
        handler = Handler(fail_at_its_own_time_out, TIMEOUT_S)
        returned = await bench.calls.call(handler, EVENT, 1)
        assert returned is not None
        await asyncio.sleep(1.0)
        return returned

    returned = bench.loop.run_until_complete(call_and_record())
    assert returned.error.startswith("ConnectionError: slow (test_calls.py:")


def test_a_handler_that_cancels_its_own_task_as_it_returns_has_failed(bench: Bench) -> None:
    async def cancel(_event: Event, _timeout_s: float) -> None:
        task: Any = asyncio.current_task()
        task.cancel()

    assert bench.wait(cancel).error.startswith("CancelledError:")


@pytest.mark.parametrize(
    ("error", "returned"),
    [
        (Reject("no"), (Outcome.REJECTED, 0.0, None)),
        (RetryAfter(30), (Outcome.FAILED, 30.0, None)),
        (ODD := KeyError("no"), (Outcome.FAILED, 0.0, ODD)),
    ],
)
def test_what_a_task_of_a_handler_raises_is_what_its_group_raises(
    bench: Bench, error: Exception, returned: tuple[object, ...]
) -> None:
    async def fail() -> None:
        raise error

    async def wait_for(*tasks: Callable[[], Awaitable[object]]) -> None:
        async with asyncio.TaskGroup() as group:
            for task in tasks:
                group.create_task(task())  # type: ignore[arg-type]

    async def handle(_event: Event, _timeout_s: float) -> None:
        await wait_for(lambda: asyncio.sleep(1), lambda: wait_for(fail))

    failed = bench.wait(handle)
    assert failed.error.startswith(one_line(error))
    assert (failed.outcome, failed.after_s, failed.raised) == returned


# Plain functions.


@pytest.mark.parametrize("leave", [SystemExit(1), KeyboardInterrupt(), GeneratorExit("odd")])
def test_an_exit_in_a_plain_handler_is_a_failure(bench: Bench, leave: BaseException) -> None:
    """It would end a thread, and its event would stay in flight."""

    def handle(_event: Event) -> Effects:
        raise leave

    assert bench.calls.run(Handler(handle), EVENT).error.startswith(type(leave).__name__)


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
            return await asyncio.gather(*(calls.call(handler, EVENT, 100) for _ in range(3)))

    assert [returned.error for returned in asyncio.run(main()) if returned] == [""] * 3


def test_what_the_service_has_bound_is_bound_on_its_threads_too(bench: Bench) -> None:
    """As in handlers on its loop, and by asyncio.to_thread."""

    async def main() -> Returned | None:
        bind_contextvars(region="eu")
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as threads:
            calls = Calls("order", bench.ledger, captured(bench.lines), loop.time, 1, threads)
            return await calls.call(Handler(handle, DEADLINE_S), EVENT, 100)

    bound = []

    def handle(_event: Event, _timeout_s: float) -> None:
        bound.append(get_contextvars())

    asyncio.run(main())
    assert bound == [{"region": "eu", "event_id": "1", "type": "new_order"}]


def test_a_plain_handler_knows_no_event_loop(bench: Bench) -> None:
    """It runs on a thread of its own, where asyncio.run works."""
    found = []
    bench.call(lambda _event, _timeout_s: found.append(Loop().run_until_complete(go_on())))
    assert found == [Put("/seen/1", b"x")]


@pytest.mark.parametrize("error", [OutOfStock("pen"), Speechless()])
@pytest.mark.parametrize("is_coroutine", [True, False])
def test_nothing_that_a_handler_raises_is_raised_by_its_call(
    bench: Bench, is_coroutine: bool, error: Exception
) -> None:
    """It would end the process, and each one that takes the event next."""

    def fail(_event: Event, _timeout_s: float) -> None:
        raise error

    async def fail_on_the_loop(_event: Event, _timeout_s: float) -> None:
        raise error

    task = bench.call(fail_on_the_loop if is_coroutine else fail)
    assert task.exception() is None
    assert task.result().raised is error


# Time.


async def _succeed(_event: Event, _timeout_s: float) -> None: ...


def _return(_event: Event, _timeout_s: float) -> None: ...


@pytest.mark.parametrize("function", [_succeed, _return])
@pytest.mark.parametrize(
    ("left_s", "lease", "called"),
    [
        (TIMEOUT_S + 0.1, 1, True),
        (TIMEOUT_S, 1, False),
        (100.0, 0, False),
    ],
)
def test_a_call_is_made_where_neither_its_claim_nor_the_process_can_end_during_it(
    bench: Bench, function: Any, left_s: float, lease: int, called: bool
) -> None:
    bench.calls.end_by_s = bench.loop.time() + left_s
    assert bench.calls.has_time(Handler(function, TIMEOUT_S)) is (left_s > TIMEOUT_S)
    assert (bench.call(function, lease).result() is not None) is called


@pytest.mark.parametrize("is_coroutine", [True, False])
def test_a_call_that_hangs_is_overdue_until_it_returns(bench: Bench, is_coroutine: bool) -> None:
    def plain(_event: Event, _timeout_s: float) -> None:
        bench.loop.spend(4 * TIMEOUT_S)

    task = bench.call(hanging(lambda: asyncio.sleep(3 * TIMEOUT_S)) if is_coroutine else plain)
    bench.loop.advance(3 * TIMEOUT_S)
    assert bench.calls.overdue() == 0
    bench.loop.advance(0.1)
    assert bench.calls.overdue() == 1
    bench.loop.advance(TIMEOUT_S)
    assert task.done()
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


# Exceptions.


class Busy(RetryAfter):
    """One of a service's own, with a constructor that takes something else."""

    def __init__(self) -> None:
        super().__init__(30)


@pytest.mark.parametrize("error", [RetryAfter(30), RetryAfter("1.5", "busy"), Busy()])
def test_what_a_handler_raises_may_come_out_of_a_process_pool(error: RetryAfter) -> None:
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - as a pool does
    assert (type(copy), str(copy), copy.seconds) == (type(error), str(error), error.seconds)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("no"), "ValueError: no"),
        (ValueError("two\nlines\tand\r\nmore"), "ValueError: two lines and more"),
        (KeyError("k"), "KeyError: 'k'"),
        (RuntimeError(), "RuntimeError:"),
        (ValueError("a\ud800b"), "ValueError: a?b"),
        (ValueError("ä\udcff" * 10_000), "ValueError: " + "ä?" * 244),
    ],
)
def test_an_exception_is_written_in_one_short_line(error: Exception, expected: str) -> None:
    assert one_line(error) == expected
    assert len(expected.encode()) < 1000


def test_a_place_is_written_in_one_line_too(bench: Bench) -> None:
    code = compile("def fail(event): raise ValueError('no')", "a\udcff\nb.py", "exec")
    module: dict[str, Any] = {"__name__": None}
    exec(code, module)  # noqa: S102 - a module that has no name, in a file whose name is no text
    assert bench.calls.run(Handler(module["fail"]), EVENT).error == "ValueError: no (a? b.py:1)"
