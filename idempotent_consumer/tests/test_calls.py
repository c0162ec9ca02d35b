"""How handlers are run, and what becomes of whatever they return or raise."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from structlog.contextvars import bind_contextvars, get_contextvars
from structlog.testing import LogCapture

from fakes.events import OutOfStock, Speechless, body
from idempotent_consumer.calls import Calls, Handler, Reject, RetryAfter, Returned, one_line
from idempotent_consumer.event import NO_EFFECTS, Event, Put, decode
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
    """Claims that outlast a call's time-out by as many seconds as their lease's number."""

    ended = False

    def claim_remaining_s(self, lease: int) -> float:
        return TIMEOUT_S + lease


class BrieflyHeld(Claims):
    """Claims that end in the loop's next step after they were checked."""

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
        """Call a coroutine handler, and wait for its end."""
        task = self.call(function)
        self.loop.agenda.run(enough=task.done)
        assert not task.cancelled(), "its event would stay in flight forever"
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


# What is raised.


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("no"),
        asyncio.CancelledError("no"),  # As a library raises it whose own task was cancelled.
        SystemExit(1),
        KeyboardInterrupt(),
        GeneratorExit("odd"),
        OutOfStock("pen"),
        Speechless(),
    ],
)
@pytest.mark.parametrize("how", ["pure", "on a thread", "coroutine"])
def test_whatever_a_handler_raises_is_its_failure(
    bench: Bench, error: BaseException, how: str
) -> None:
    """Otherwise it ends a thread or the process, and each process that takes the event next."""

    def fail(*_: object) -> None:
        raise error

    async def fail_on_the_loop(*_: object) -> None:
        raise error

    try:
        if how == "pure":
            returned = bench.calls.run(Handler(fail), EVENT)
        else:
            returned = bench.call(fail_on_the_loop if how == "coroutine" else fail).result()
    except Exception as raised:
        raise AssertionError("its call raises something") from raised
    assert returned.error.startswith(type(error).__name__)
    assert "(test_calls.py:" in returned.error
    assert (returned.effects, returned.raised) == (NO_EFFECTS, error)


# Coroutines.


def hanging(when_cancelled: Callable[[], Awaitable[object]]) -> Callable[..., Awaitable[object]]:
    """Return a coroutine handler that hangs, and does this when it is cancelled."""

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
    ("when_cancelled", "elapsed_s"), [(end, TIMEOUT_S), (fail, TIMEOUT_S), (go_on, TIMEOUT_S + 2)]
)
def test_a_coroutine_is_cancelled_at_its_time_out_and_has_failed(
    bench: Bench, when_cancelled: Callable[[], Awaitable[object]], elapsed_s: float
) -> None:
    """What it returns or raises instead says nothing about the call. Catching it is reported."""
    assert bench.wait(hanging(when_cancelled)) == Returned(NO_EFFECTS, TIMED_OUT, elapsed_s)
    reported = [
        (line["log_level"], line["event_id"], line["seconds"]) for line in bench.lines.entries
    ]
    assert reported == ([("warning", "1", 7.0)] if when_cancelled is go_on else [])
    assert all("caught its own cancellation" in line["event"] for line in bench.lines.entries)


def test_a_claim_is_checked_in_the_step_that_makes_its_call() -> None:
    """A process that freezes in between would make the call under another's claim."""
    bench = Bench(claims=BrieflyHeld)

    async def call(_event: Event, _timeout_s: float) -> None:
        assert not bench.ledger.ended

    assert bench.wait(call).error == ""


@pytest.mark.parametrize("when_cancelled", [end, go_on])
def test_a_call_whose_process_ends_has_neither_failed_nor_succeeded(
    bench: Bench, when_cancelled: Callable[[], Awaitable[object]]
) -> None:
    """Otherwise it would be recorded, or retried, by a run that is ending."""
    task = bench.call(hanging(when_cancelled))
    task.cancel()
    bench.loop.advance(2)
    assert task.cancelled()
    assert bench.calls.overdue() == 0


@pytest.mark.parametrize("after_s", [1.0, TIMEOUT_S - 0.1, TIMEOUT_S + 0.1])
def test_a_handler_that_cancels_its_own_task_ends_only_its_call(
    bench: Bench, after_s: float
) -> None:
    """aiohttp before 3.10.6 does so at its own time-out, and does not uncancel the task."""

    async def fail_at_its_own_time_out(_event: Event, _timeout_s: float) -> None:
        task: Any = asyncio.current_task()
        asyncio.get_running_loop().call_later(after_s, task.cancel)
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(TIMEOUT_S - 0.1)
        raise ConnectionError("slow")

    async def call_and_record() -> Returned | None:
        handler = Handler(fail_at_its_own_time_out, TIMEOUT_S)
        returned = await bench.calls.call(handler, EVENT, 1)
        await asyncio.sleep(1.0)
        return returned

    returned: Any = bench.loop.run_until_complete(call_and_record())
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
def test_what_one_task_of_a_handlers_group_raises_is_unwrapped(
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


def test_plain_handlers_run_on_threads_as_many_at_once_as_there_are_slots() -> None:
    """Each waits until all three run, on real threads, and what the service has bound is bound."""
    together, bound = threading.Barrier(3), list[Mapping[str, object]]()

    def handle(_event: Event, _timeout_s: float) -> None:
        together.wait(DEADLINE_S)
        bound.append(get_contextvars())

    async def main() -> list[Returned | None]:
        bind_contextvars(region="eu")
        loop, bench = asyncio.get_running_loop(), Bench()
        with ThreadPoolExecutor(3) as threads:
            calls = Calls("order", bench.ledger, captured(bench.lines), loop.time, 3, threads)
            handler = Handler(handle, DEADLINE_S)
            return await asyncio.gather(*(calls.call(handler, EVENT, 100) for _ in range(3)))

    assert [returned.error for returned in asyncio.run(main()) if returned] == [""] * 3
    assert bound == [{"region": "eu", "event_id": "1", "type": "new_order"}] * 3


def test_a_plain_handler_may_use_asyncio_run(bench: Bench) -> None:
    """In memory too, where its thread is a virtual one."""
    assert bench.call(lambda *_: asyncio.run(asyncio.sleep(0))).result().error == ""


# Time.


async def _succeed(_event: Event, _timeout_s: float) -> None: ...


def _return(_event: Event, _timeout_s: float) -> None: ...


@pytest.mark.parametrize("function", [_succeed, _return])
@pytest.mark.parametrize(
    ("left_s", "lease", "called"),
    [(TIMEOUT_S + 0.1, 1, True), (TIMEOUT_S, 1, False), (100.0, 0, False)],
)
def test_a_call_is_made_if_neither_its_claim_nor_the_process_can_end_during_it(
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
    """A restart would not free a thread, only repeat the calls under way."""
    bench = Bench(at_once=1)
    bench.call(lambda _event, _timeout_s: bench.loop.spend(2 * TIMEOUT_S))
    waiting = bench.call(lambda _event, _timeout_s: bench.loop.spend(2 * TIMEOUT_S))
    bench.loop.advance(3.5 * TIMEOUT_S)
    assert bench.calls.overdue() == 0
    bench.loop.advance(TIMEOUT_S)
    assert waiting.done()


# Exceptions.


class Busy(RetryAfter):
    """A service's own exception, whose constructor takes other arguments."""

    def __init__(self) -> None:
        super().__init__(30)


@pytest.mark.parametrize("error", [RetryAfter(30), RetryAfter("1.5", "busy"), Busy()])
def test_retry_after_may_come_out_of_a_process_pool(error: RetryAfter) -> None:
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - as a pool does it
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
    exec(code, module)  # noqa: S102 - a module without a name, in a file with an odd one
    assert bench.calls.run(Handler(module["fail"]), EVENT).error == "ValueError: no (a? b.py:1)"
