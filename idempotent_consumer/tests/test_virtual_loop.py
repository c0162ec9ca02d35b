"""The event loop on the simulated clock: asyncio's own parts run on it, and a process can end."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from contextvars import ContextVar
from functools import partial

import pytest

from idempotent_consumer.testing.loop import Agenda, Killed, Loop, Threads, Wire


def test_asyncios_own_parts_work_together() -> None:
    loop, order = Loop(), list[object]()

    async def work() -> None:
        queue, slots, lock = asyncio.Queue[int](), asyncio.Semaphore(2), asyncio.Lock()

        async def take() -> None:
            async with slots, lock:
                order.append((await queue.get(), loop.time()))

        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            for number in range(3):
                group.create_task(take())
                await queue.put(number)
                await asyncio.sleep(1)
        order.extend(await asyncio.gather(asyncio.sleep(1, "a"), asyncio.to_thread(lambda: "b")))

    loop.run_until_complete(work())
    assert order == [(0, 0.0), (1, 1.0), (2, 2.0), "a", "b"]


def test_each_task_has_a_context_of_its_own() -> None:
    name = ContextVar("name", default="")

    async def work() -> str:
        name.set("mine")
        await asyncio.sleep(1)
        return name.get()

    async def both() -> tuple[str, str]:
        return await asyncio.create_task(work()), name.get()

    assert Loop().run_until_complete(both()) == ("mine", "")


def test_a_run_that_cannot_end_raises() -> None:
    loop = Loop()
    with pytest.raises(RuntimeError, match="nothing is left to happen"):
        loop.run_until_complete(asyncio.Event().wait())
    loop.kill()


def test_an_exception_in_a_callback_or_in_a_task_that_nobody_awaits_ends_the_run() -> None:
    loop = Loop()

    async def fail() -> None:
        raise ValueError("wrong")

    loop.call_later(1, lambda: 1 / 0)
    loop.create_task(fail())
    loop.run_until_idle()
    with pytest.raises(ZeroDivisionError):
        loop.advance(2)
    loop._tasks.clear()  # They are kept until there are many.
    loop.call_soon(gc.collect)
    with pytest.raises(ValueError, match="wrong"):
        loop.run_until_idle()


def test_several_processes_share_an_agenda_and_each_has_its_own_clock() -> None:
    agenda, clocks_s = Agenda(), (0.0, 98_765.4321)
    seen: list[tuple[float, float, float]] = []

    async def run(clock_s: float) -> None:
        for _ in range(3):
            await asyncio.sleep(0.1)
            passed_s = asyncio.get_running_loop().time() - clock_s
            seen.append((clock_s, round(passed_s, 6), round(agenda.now_s, 6)))

    for clock_s in clocks_s:
        Loop(agenda, clock_s).create_task(run(clock_s))
    agenda.run()
    assert seen == [(clock_s, t, t) for t in (0.1, 0.2, 0.3) for clock_s in clocks_s]


def test_a_timer_is_never_early_by_the_clock_of_its_process() -> None:
    """Otherwise a loop that waits for the rest would wait in the same instant for ever."""
    agenda = Agenda()
    loop, early = Loop(agenda, 98_765.4321), list[float]()
    for number in range(10_000):
        when = loop.time() + number * 0.0137
        loop.call_at(when, lambda when=when: early.append(when) if loop.time() < when else None)
    agenda.run()
    assert early == []


def test_a_cancelled_timer_moves_no_clock() -> None:
    loop = Loop()
    loop.call_later(10, lambda: None).cancel()
    loop.agenda.run()
    assert loop.time() == 0.0


def test_a_frozen_process_does_its_steps_late_and_in_order() -> None:
    agenda, seen = Agenda(), list[tuple[str, float]]()
    frozen, other = Loop(agenda), Loop(agenda)
    for loop, delay_s, what in ((frozen, 2, "second"), (frozen, 1, "first"), (other, 1, "other")):
        loop.call_later(delay_s, lambda what=what: seen.append((what, agenda.now_s)))
    frozen.freeze(5)
    agenda.run()
    assert seen == [("other", 1.0), ("first", 5.0), ("second", 5.0)]


class Mortal(Loop):
    """A process that dies after its second action."""

    def act(self, when: str, what: object) -> None:
        super().act(when, what)
        if (when, what) == ("after", "the second"):
            self.kill()
            raise Killed


def test_a_process_that_dies_within_a_step_does_nothing_more(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    loop, seen = Mortal(), list[str]()

    def do(what: str) -> None:
        loop.act("before", what)
        seen.append(what)
        loop.act("after", what)

    async def helper() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.Event().wait())
        finally:
            do("what a dead process cleans up")

    async def work() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(helper())
            await asyncio.sleep(1)
            for what in ("the first", "the second", "the third"):
                do(what)

    loop.create_task(work())
    loop.call_later(2, seen.append, "what is due after its end")
    with caplog.at_level(logging.DEBUG):
        loop.agenda.run()
        gc.collect()
    assert (seen, caplog.text) == (["the first", "the second"], "")
    assert capfd.readouterr() == ("", "")


def test_a_job_takes_the_time_that_it_spends_on_its_thread() -> None:
    loop, threads, seen = Loop(), Threads(2), list[tuple[int, float]]()

    def job() -> float:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        loop.spend(10)
        return loop.time()

    async def call(number: int) -> None:
        assert await loop.run_in_executor(threads, job) == loop.time()
        seen.append((number, loop.time()))

    async def work() -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(3):
                group.create_task(call(number))
            await asyncio.sleep(1)
            seen.append((-1, loop.time()))

    loop.run_until_complete(work())
    assert seen == [(-1, 1.0), (0, 10.0), (1, 10.0), (2, 20.0)]


def test_a_job_ends_at_exactly_the_time_that_it_has_spent() -> None:
    """Otherwise a process might be killed after a call that has not ended by the agenda's clock."""
    loop = Loop(clock_s=98_765.4321)
    for number in range(100):
        ends_s = loop.agenda.now_s + number * 0.0137
        loop.run_until_complete(loop.run_in_executor(None, loop.spend, number * 0.0137))
        assert loop.agenda.now_s == ends_s


def test_an_exception_in_a_job_is_raised_where_it_is_awaited() -> None:
    async def work() -> None:
        with pytest.raises(SystemExit):
            await asyncio.get_running_loop().run_in_executor(Threads(1), sys.exit)
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 / 0)

    Loop().run_until_complete(work())


def test_code_on_the_loop_that_takes_time_delays_its_own_process_only() -> None:
    agenda, seen = Agenda(), list[tuple[str, float]]()
    busy, other = Loop(agenda), Loop(agenda)

    def work(loop: Loop, what: str, seconds: float = 0) -> None:
        loop.spend(seconds)
        seen.append((what, loop.time()))

    busy.call_later(1, work, busy, "busy", 3)
    busy.call_later(2, work, busy, "late")
    other.call_later(2, work, other, "other")
    agenda.run()
    assert seen == [("busy", 4.0), ("other", 2.0), ("late", 4.0)]


def test_a_loop_runs_inside_a_coroutine_of_another() -> None:
    async def outer() -> None:
        before = asyncio.current_task(), asyncio.get_running_loop()
        assert Loop().run_until_complete(asyncio.sleep(1, "done")) == "done"
        assert (asyncio.current_task(), asyncio.get_running_loop()) == before

    asyncio.run(outer())


def test_a_wire_brings_frames_in_order_and_a_burst_in_one_step() -> None:
    agenda, latencies = Agenda(), iter([2.0, 1.0, 0.5])
    wire = Wire(agenda, Loop(agenda), lambda: next(latencies))
    seen: list[tuple[str, float, int]] = []

    def note(what: str) -> None:
        seen.append((what, agenda.now_s, agenda.happened))

    for burst in ("ab", "c"):  # "b" takes less time, but comes in the same read as "a".
        for what in burst:
            wire.send(partial(note, what))
        agenda.run()
    assert seen == [("a", 2.0, 1), ("b", 2.0, 1), ("c", 2.5, 2)]


def test_sockets_are_refused_with_the_reason() -> None:
    async def reach() -> None:
        await asyncio.open_connection("localhost", 1)

    with pytest.raises(RuntimeError, match="no network in memory"):
        Loop().run_until_complete(reach())
