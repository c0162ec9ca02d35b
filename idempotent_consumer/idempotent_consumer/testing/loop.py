"""A simulated clock, and asyncio event loops that run on it. No real time passes."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import math
from asyncio import events
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextvars import Context
from functools import partial
from itertools import count
from typing import Any, NoReturn

_Base: Any = asyncio.BaseEventLoop
"""Typed as Any: type checkers would want every overload of its methods."""

Callback = Callable[[], object]


class Killed(BaseException):
    """Raised where a process dies within a step. Code may catch it only to clean up."""


class Agenda:
    """The clock and the steps to come, by their time and, within an instant, as they were added.

    A step belongs to the process whose loop is given with it, or to the world: a server, the
    network. ``happened`` counts the steps so far.
    """

    def __init__(self) -> None:
        self.now_s, self.happened = 0.0, 0
        self.defects: list[BaseException] = []
        self._entries: list[tuple[float, int, Loop | None, Any]] = []
        self._numbers = count()

    def time(self) -> float:
        return self.now_s

    def later(self, delay_s: float, callback: Callback, loop: Loop | None = None) -> None:
        """Call back after a delay, in the world or as a step of a process."""
        step = callback if loop is None else asyncio.Handle(callback, (), loop)
        self.add(self.now_s + delay_s, loop, step)

    def add(self, due_s: float, loop: Loop | None, step: Any) -> None:
        """Add a step: a callback of the world, or an asyncio handle of a process."""
        heapq.heappush(self._entries, (due_s, next(self._numbers), loop, step))

    def run(self, until_s: float = math.inf, enough: Callable[[], bool] = lambda: False) -> None:
        """Run the steps up to a time, until ``enough`` returns true, or until none is left.

        Raises the first defect: what a process's loop would pass to its exception handler.
        """
        entries = self._entries
        with _outer_loop_set_aside():
            while entries and entries[0][0] <= until_s and not enough():
                due_s, _, loop, step = heapq.heappop(entries)
                if loop is not None and (step.cancelled() or not loop.alive):
                    continue
                self.now_s = max(self.now_s, due_s)
                if loop is None:
                    self.happened += 1
                    step()
                else:
                    loop.step(step)
                if self.defects:
                    raise self.defects.pop(0)
        if until_s < math.inf and not enough():
            self.now_s = max(self.now_s, until_s)


@contextlib.contextmanager
def _outer_loop_set_aside() -> Iterator[None]:
    """Let loops run inside another one's coroutine: a test can be one."""
    outer = events._get_running_loop()  # noqa: SLF001 - asyncio's hook for event loops
    swap = getattr(asyncio.tasks, "_swap_current_task", None) if outer else None
    task = swap(outer, None) if swap else None  # From Python 3.12 on.
    try:
        yield
    finally:
        events._set_running_loop(outer)  # noqa: SLF001
        if swap:
            swap(outer, task)


class Loop(_Base):  # type: ignore[misc]
    """The event loop of one process. Each callback is one step, which the agenda runs.

    A killed process runs no further step, and a frozen one runs them later. ``clock_s`` is what
    its own clock shows at the agenda's zero. A defect (an exception in a callback, or in a task
    that nobody awaits) is raised by ``Agenda.run``.
    """

    def __init__(self, agenda: Agenda | None = None, clock_s: float = 0.0) -> None:
        super().__init__()
        self.agenda = Agenda() if agenda is None else agenda
        self.alive, self.in_step = True, False
        self.frozen_until_s = -math.inf
        self._clock_s, self._spent_s = clock_s, 0.0
        self._tasks: list[asyncio.Task[Any]] = []
        self._tasks_unpruned = 100
        self._threads = Threads(1)

    # What tests do.

    def run_until_complete(self, future: Any) -> Any:
        """Run until a coroutine or future is done, and return its result.

        Raises RuntimeError if no step is left before that.
        """
        done = future if asyncio.isfuture(future) else self.create_task(future)
        self.agenda.run(enough=done.done)
        if not done.done():
            raise RuntimeError("nothing is left to happen, and this has not ended")
        return done.result()

    def run_until_idle(self) -> None:
        """Run every step that is due now."""
        self.agenda.run(self.agenda.now_s)

    def advance(self, seconds: float) -> None:
        self.agenda.run(self.agenda.now_s + seconds)

    def freeze(self, seconds: float) -> None:
        """Run no step for a time, as after SIGSTOP. What becomes due meanwhile runs afterwards."""
        self.frozen_until_s = self.agenda.now_s + seconds

    def spend(self, seconds: float) -> None:
        """Let the running code take time, on the loop's thread or a virtual one."""
        self._spent_s += seconds

    def kill(self) -> None:
        """End the process at once, as SIGKILL does."""
        self.alive = False
        if not self.in_step:
            self._unwind()

    def __del__(self) -> None:
        # It is older than its coroutines, so it is finalized first, and can end them quietly.
        self.kill()

    # A subclass kills or freezes the process here.

    def between_steps(self) -> None:
        """Run between two steps."""

    def act(self, when: str, what: Any) -> None:
        """Run "before" or "after" each action that the outside can see; raises Killed if dead.

        ``what`` is the ``etcd.Call`` or the ``broker.Sent``.
        """
        if not self.alive:
            raise Killed

    # asyncio.

    def time(self) -> float:
        return self._clock_s + self.agenda.now_s + self._spent_s

    def call_soon(
        self, callback: Any, *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        step = asyncio.Handle(callback, args, self, context)
        if self.alive:
            self.agenda.add(self.agenda.now_s, self, step)
        return step

    call_soon_threadsafe = call_soon

    def call_at(
        self, when: float, callback: Any, *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        step = asyncio.TimerHandle(when, callback, args, self, context)
        if self.alive:
            due_s = when - self._clock_s
            if due_s + self._clock_s < when:
                # Rounded down: a loop that waits for the rest would stay in this instant for ever.
                due_s += math.ulp(when)
            self.agenda.add(due_s, self, step)
        return step

    def create_task(self, coro: Any, **options: Any) -> Any:
        if len(self._tasks) > self._tasks_unpruned:
            self._tasks = [task for task in self._tasks if not task.done()]
            self._tasks_unpruned = 2 * len(self._tasks) + 100
        task = super().create_task(coro, **options)
        self._tasks.append(task)
        return task

    def run_in_executor(
        self, executor: Executor | None, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """Run a function on one of an executor's virtual threads."""
        threads = executor if isinstance(executor, Threads) else self._threads
        return threads.run(self, partial(func, *args))

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Take an exception that nothing else handles."""
        if self.alive:
            self.on_defect(context.get("exception") or RuntimeError(context["message"]))

    def on_defect(self, error: BaseException) -> None:
        self.agenda.defects.append(error)

    def is_closed(self) -> bool:
        return not self.alive

    close = kill
    get_debug = staticmethod(bool)  # Returns False. Each future asks, so it has to be fast.

    async def _no_sockets(self, *_: Any, **_options: Any) -> NoReturn:
        raise RuntimeError("there is no network in memory: give the code under test a fake of it")

    create_connection = create_server = getaddrinfo = sock_connect = _no_sockets

    # What the agenda calls.

    def step(self, step: asyncio.Handle) -> None:
        agenda = self.agenda
        if self.frozen_until_s <= agenda.now_s:
            self.between_steps()
        if self.frozen_until_s > agenda.now_s:
            # Each gets a new number, so postponed steps keep the order in which they were due.
            agenda.add(self.frozen_until_s, self, step)
            return
        if not self.alive:
            return
        agenda.happened += 1
        self.in_step = True
        events._set_running_loop(self)  # noqa: SLF001 - asyncio's hook for event loops
        try:
            step._run()  # noqa: SLF001 - as event loops do
        finally:
            self.in_step = False
        if self._spent_s:
            self.frozen_until_s = max(self.frozen_until_s, agenda.now_s + self.take_spent_s())
        if not self.alive:
            self._unwind()

    def take_spent_s(self) -> float:
        spent_s, self._spent_s = self._spent_s, 0.0
        return spent_s

    def _unwind(self) -> None:
        """End every coroutine now. The garbage collector would do so at some other time."""
        tasks, self._tasks = self._tasks, []
        with _outer_loop_set_aside():
            events._set_running_loop(self)  # noqa: SLF001
            for task in tasks:
                coroutine: Any = task.get_coro()
                # A coroutine may end with any exception. One that keeps catching Killed is left.
                with contextlib.suppress(BaseException):
                    for _ in range(100):
                        coroutine.throw(Killed())


class Threads(Executor):
    """Virtual threads: a job runs in one step, and its result comes when its time is over.

    Its time is what it spends by ``Loop.spend``, none by default. A job starts when a thread is
    free, ``starts_after_s()`` later.
    """

    def __init__(self, threads: int, starts_after_s: Callable[[], float] = lambda: 0.0) -> None:
        self._free, self._starts_after_s = threads, starts_after_s
        self._waiting: deque[tuple[Loop, Callback]] = deque()

    def run(self, loop: Loop, job: Callable[[], Any]) -> asyncio.Future[Any]:
        """Run a job once a thread is free. Until then its future can be cancelled."""
        result: asyncio.Future[Any] = loop.create_future()
        self._waiting.append((loop, partial(self._start, loop, job, result)))
        self._start_next()
        return result

    def _start_next(self) -> None:
        if self._free and self._waiting:
            self._free -= 1
            loop, start = self._waiting.popleft()
            loop.agenda.later(self._starts_after_s(), start, loop)

    def _start(self, loop: Loop, job: Callable[[], Any], result: asyncio.Future[Any]) -> None:
        resolve: Callback = int
        if not result.cancelled():
            events._set_running_loop(None)  # noqa: SLF001 - another thread has no loop
            try:
                resolve = partial(result.set_result, job())
            except Killed:
                raise
            except BaseException as error:  # noqa: BLE001 - as an executor does
                resolve = partial(result.set_exception, error)

        def end() -> None:
            self._free += 1
            if not result.cancelled():
                resolve()
            self._start_next()

        if spent_s := loop.take_spent_s():
            loop.agenda.later(spent_s, end, loop)
        else:
            end()


class Wire:
    """One direction of a connection: frames arrive in order, each after a delay.

    Frames that arrive in one instant are one read of the socket, and so one step of the receiving
    ``loop``, or of the world.
    """

    def __init__(self, agenda: Agenda, loop: Loop | None, latency_s: Callable[[], float]) -> None:
        self._agenda, self._loop, self.latency_s = agenda, loop, latency_s
        self._frames: deque[tuple[float, Callback]] = deque()
        self._cut = self._paused = False
        self._idle_at_s = 0.0

    def send(self, frame: Callback) -> None:
        if self._cut:
            return
        now_s = self._agenda.now_s
        # A burst is one segment, unless an earlier one is still under way.
        arrives_s = max(self._idle_at_s, now_s + self.latency_s())
        if not (self._frames and self._frames[-1][0] == arrives_s):
            self._idle_at_s = arrives_s
            self._agenda.later(arrives_s - now_s, self._arrive, self._loop)
        self._frames.append((arrives_s, frame))

    def pause(self, paused: bool) -> None:
        """Stop reading what arrives, or go on."""
        self._paused = paused
        if not paused and self._frames:
            delay_s = max(0.0, self._frames[0][0] - self._agenda.now_s)
            self._agenda.later(delay_s, self._arrive, self._loop)

    def cut(self, keep: int, end: Callback = int, noticed_s: float = 0.0) -> int:
        """Lose all frames under way but the first ``keep``; return how many were lost.

        ``end`` is called ``noticed_s`` after those have arrived, even if nothing is read.
        """
        self._cut = True
        lost = max(0, len(self._frames) - keep)
        for _ in range(lost):
            self._frames.pop()
        idle_in_s = max(0.0, self._frames[-1][0] - self._agenda.now_s) if self._frames else 0.0
        self._agenda.later(idle_in_s + noticed_s, end, self._loop)
        return lost

    @property
    def under_way(self) -> int:
        return len(self._frames)

    def _arrive(self) -> None:
        # With a margin: now plus a delay is not always, to the last bit, the time computed before.
        now_s = self._agenda.now_s + 1e-9
        while self._frames and self._frames[0][0] <= now_s and not self._paused:
            self._frames.popleft()[1]()
