"""A service: its handlers, and the run that ties them to RabbitMQ and etcd."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from random import SystemRandom
from traceback import walk_tb
from typing import Any, TypeVar, overload

from structlog.typing import FilteringBoundLogger

from . import amqp, etcd, names
from .bus import MAX_BYTES_IN_FLIGHT, Intake, Topology, prefetch
from .cache import MAX_ENTRIES, Cache
from .calls import Calls, ClaimedHandler, Handler, PureHandler
from .event import Decoder, Effects, Event
from .flow import Consumer
from .health import Health, HealthServer, PortTaken
from .leases import LONGEST_CALL_S
from .ledger import EtcdLedger, Ledger, NoLedger
from .log import Logs
from .metrics import SEND_EVERY_S, DuplicateAges, Metrics, Tally
from .publisher import Publisher
from .settings import Settings, SettingsError, read_delays
from .settle import Settler
from .system import System

FINISH_WITHIN_S = 7.0
"""Events in flight at SIGTERM are finished and settled within this time, or requeued."""

LAG_WARNING_S = 1.0
"""A loop that was blocked this long is warned about, and again whenever it is twice as long."""

_CLOSE_WITHIN_S = 2.0
_EXIT_WITHIN_S = 9.5
_TICK_S = 0.02

Pure = TypeVar("Pure", bound=PureHandler)
Claimed = TypeVar("Claimed", bound=ClaimedHandler)
M = TypeVar("M")
Model = type[M] | Callable[[dict[str, Any]], M]
"""A class is called with an event's args as its keywords, any other callable with the args."""

ModelledPure = Callable[[Event, M], Effects]
ModelledClaimed = Callable[[Event, M, float], Effects | Awaitable[Effects]]


class Service:
    """A name, and a handler for each event type it consumes.

    ``noun`` begins the names of its metrics: ``orders`` gives ``orders_processed`` and the others.
    ``exchange`` is a topic exchange, declared durable, that it consumes from and publishes to;
    ``bindings`` are the keys that bind its queue to it. ``decode`` turns a message into an event;
    by default the body is a JSON object with id, type and args.
    """

    def __init__(
        self,
        name: str,
        noun: str,
        *,
        exchange: str = names.EXCHANGE,
        bindings: Sequence[str] = (names.BINDING_KEY,),
        decode: Decoder | None = None,
    ) -> None:
        self.name, self.noun = names.check_service_name(name), names.check_noun(noun)
        self.exchange = names.check_exchange(exchange)
        self.bindings = names.check_bindings(bindings)
        if decode is not None and not callable(decode):
            raise TypeError(f"decode is a function of (body, properties), not {decode!r:.100}")
        self.decode = decode
        self.handlers: dict[str, Handler] = {}
        self.is_running = False
        """Whether a run has begun: then no handler can be registered any more."""

    @overload
    def handler(
        self, event_type: str, *, retry_delays: Sequence[str] | None = None
    ) -> Callable[[Pure], Pure]: ...

    @overload
    def handler(
        self, event_type: str, *, model: Model[M], retry_delays: Sequence[str] | None = None
    ) -> Callable[[ModelledPure[M]], ModelledPure[M]]: ...

    def handler(
        self, event_type: str, *, model: Any = None, retry_delays: Sequence[str] | None = None
    ) -> Any:
        """Register a pure handler: it returns effects, which are recorded with the event.

        It runs on the event loop, which also sends the heartbeats, so it must compute and not wait.
        With a ``model``, the handler's second argument is what the model makes of the args: a class
        is called with them as keyword arguments, any other callable with the dict. If the model
        raises, the event is parked as invalid. ``retry_delays``, as in ``["1s", "1m"]``, replace
        RETRY_DELAYS.
        """
        return self._registering(event_type, model=model, retry_delays=_delays(retry_delays))

    @overload
    def claimed_handler(
        self,
        event_type: str,
        timeout_s: float,
        *,
        at_once: int | None = None,
        retry_delays: Sequence[str] | None = None,
    ) -> Callable[[Claimed], Claimed]: ...

    @overload
    def claimed_handler(
        self,
        event_type: str,
        timeout_s: float,
        *,
        model: Model[M],
        at_once: int | None = None,
        retry_delays: Sequence[str] | None = None,
    ) -> Callable[[ModelledClaimed[M]], ModelledClaimed[M]]: ...

    def claimed_handler(
        self,
        event_type: str,
        timeout_s: float,
        *,
        model: Any = None,
        at_once: int | None = None,
        retry_delays: Sequence[str] | None = None,
    ) -> Any:
        """Register a handler with an outside effect: it runs under a claim.

        A coroutine function runs on the event loop and is cancelled after ``timeout_s``; a plain
        function runs on a thread, and must return or raise within it. At most CALLS_AT_ONCE calls
        run at a time, and at most ``at_once`` of this handler. ``retry_delays``, as in
        ``["1s", "1m"]``, replace RETRY_DELAYS. ``model`` works as for a pure handler. The effect
        happens at least once, so pass the event's id on to the receiver as an idempotency key.
        """
        if not 0 < timeout_s <= LONGEST_CALL_S:
            most = f"at most {LONGEST_CALL_S:,}"
            raise ValueError(f"timeout_s is {timeout_s}: write seconds, more than 0 and {most}")
        if at_once is not None and not (isinstance(at_once, int) and at_once >= 1):
            raise ValueError(f"at_once is {at_once}: write a whole number from 1")
        own = {"at_once": at_once, "retry_delays": _delays(retry_delays), "model": model}
        return self._registering(event_type, timeout_s=float(timeout_s), **own)

    def run(self, environ: Mapping[str, str] = os.environ) -> int:
        """Run until SIGTERM or SIGINT, on the main thread, and then end the process.

        No code after it runs. The exit code is 0, or 1 after a defect of the library, which is
        logged. It returns only 2, for a wrong setting, a port that is taken, or a service without a
        handler, after one line on standard error. If RabbitMQ or etcd is absent, it waits for them.
        """
        try:
            code = _Process(self, Settings.from_environ(environ), real_system()).run()
        except (SettingsError, PortTaken) as error:
            print(f"{self.name}: {error}", file=sys.stderr)
            return 2
        # Python's own exit would wait for name look-ups, and for a standard output nobody reads.
        os._exit(code)

    def _registering(self, event_type: str, **own: Any) -> Callable[[Any], Any]:
        if not isinstance(event_type, str):
            got = f"{event_type!r:.100}"
            raise TypeError(f'the event type is missing: write @service.handler("..."), not {got}')

        def register(function: Any) -> Any:
            handler = Handler(function, **own)
            if event_type in self.handlers:
                raise ValueError(f"{event_type!r} has a handler already")
            if self.is_running:  # Its retry queues are declared, and its claims' lease is known.
                raise RuntimeError("the service runs: import what registers handlers before run()")
            handler.check()
            self.handlers[event_type] = handler
            return function

        return register


def _delays(texts: Sequence[str] | None) -> tuple[tuple[str, int], ...] | None:
    """Read a handler's retry delays. Raises ValueError, or TypeError for anything but strings."""
    if texts is None:
        return None
    found = tuple(texts)
    if isinstance(texts, str) or not all(isinstance(text, str) for text in found):
        raise TypeError(f'retry_delays is {texts!r}: write a list, as in ["1s", "1m"]')
    try:
        return read_delays(found)
    except ValueError as error:
        raise ValueError(f"retry_delays: {error}") from None


class Running:
    """One run of a service: the same code in a process, in a test and in a simulation.

    It is made on a running event loop, and handed to those parts of it that need many others.
    ``cache_entries`` bounds the cache of done events, ``max_bytes`` the unacked deliveries.
    """

    def __init__(
        self,
        service: Service,
        settings: Settings,
        system: System,
        metrics: Metrics,
        log: FilteringBoundLogger,
        cache_entries: int = MAX_ENTRIES,
        max_bytes: int = MAX_BYTES_IN_FLIGHT,
    ) -> None:
        loop = self._loop = asyncio.get_running_loop()
        self.service, self.settings, self.system, self.log = service, settings, system, log
        self._metrics, self._stopping = metrics, asyncio.Event()
        service.is_running = True
        self.tasks, name = asyncio.TaskGroup(), service.name
        self.process = f"{system.random.getrandbits(128):032x}"
        """Its records' tokens begin with this."""
        self.health = health = Health()
        self.tally = Tally(service.noun, metrics, log)
        longest_call_s = max((each.timeout_s for each in service.handlers.values()), default=0.0)
        if longest_call_s:
            self.tally.count("sent", 0)
            self.tally.breakers()
        self.ledger: Ledger = NoLedger(settings, log)
        if settings.enable_etcd:
            cache = Cache(cache_entries)
            clock = system.elapsed_s or loop.time
            self.ledger = EtcdLedger(
                name, settings, system, health, log, cache, longest_call_s, self.tasks, clock
            )
        unacked, returned = prefetch(settings.batch_size), self.tally.returned
        own = [each for h in service.handlers.values() for each in h.retry_delays or ()]
        delays = tuple(dict.fromkeys([*settings.retry_delays, *own]))
        topology = Topology(name, service.exchange, service.bindings, delays)
        urls, at_once = settings.rabbitmq_urls, settings.calls_at_once
        self.intake = Intake(topology, urls, unacked, system, health, log, returned, max_bytes)
        self.publisher = Publisher(urls, topology.declare, system, health, log)
        threads = system.threads(at_once)  # They start when they are needed.
        self.calls = Calls(name, self.ledger, log, loop.time, at_once, threads)
        self.duplicates = DuplicateAges(self.ledger, self.tally, system.now_s, self.tasks)
        self.settler = Settler(self)
        self.consumer = Consumer(self)

    async def run(self) -> None:
        """Consume until ``stop``, and settle what is in flight.

        All tasks are in one group: a defect in one ends all, and is raised as an exception group.
        """
        try:
            async with self.tasks as tasks:
                tasks.create_task(self._consume())
                tasks.create_task(self._beat())
                tasks.create_task(self._end())
        except* _Stopped:
            pass
        await self.ledger.close()

    def stop(self, why: str) -> None:
        """Take no more. ``run`` returns once everything in flight is settled, or after 7 s."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self.log.info(
            "stopping: taking no more, settling what is in hand",
            signal=why,
            in_hand=self.intake.in_hand,
        )
        self.health.lacks("running", "stopping")
        self.intake.stop()
        self.calls.end_by_s = self._loop.time() + FINISH_WITHIN_S

    def defect_of(self, context: dict[str, Any]) -> BaseException | None:
        """Return the defect in what the loop's exception handler was given, or log the error.

        It need not be a defect here: async handlers share the loop, and their clients can fail.
        """
        error: BaseException | None = context.get("exception")
        if error is not None and _is_own(error):
            return error
        self.log.error(
            "something that a handler left to the event loop has failed, and the service goes on",
            what=context["message"],
            exc_info=error,
        )
        return None

    async def _consume(self) -> None:
        self.log.info("starting", process=self.process)
        await self.ledger.open()
        for forever in (
            self.intake.run,
            self.publisher.run,
            self.consumer.consume,
            self.consumer.catch_up_now_and_then,
        ):
            self.tasks.create_task(forever())

    async def _beat(self) -> None:
        """Show that the loop turns, warn if it was blocked, and send the metrics."""
        warn_from_s = LAG_WARNING_S
        while True:
            self.health.beat()
            overdue = self.calls.overdue()
            if overdue and not self.health.hanging:
                self.log.error("calls do not return; a restart frees their events", calls=overdue)
            self.health.hanging = overdue > 0
            if self.tally.open_breakers:
                self.tally.breakers()  # statsd may forget a gauge that is not repeated.
            self._metrics.send()
            due_s = self._loop.time() + SEND_EVERY_S
            await asyncio.sleep(SEND_EVERY_S)
            lag_s = self._loop.time() - due_s
            if lag_s >= warn_from_s:
                warn_from_s = 2 * lag_s
                self.log.warning(
                    "the event loop was blocked: heartbeats and all events waited",
                    seconds=round(lag_s, 3),
                )

    async def _end(self) -> None:
        """Once stopped, finish what is in flight and close; the rest is requeued."""
        await self._stopping.wait()
        while self.consumer.busy and self._loop.time() < self.calls.end_by_s:
            await asyncio.sleep(_TICK_S)
        # No probe is sent any more: held events are requeued.
        self.calls.end_by_s = self._loop.time()
        self.consumer.ack_past_gaps()
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_WITHIN_S):
                await asyncio.gather(self.intake.close(), self.publisher.close())
        raise _Stopped


def _is_own(error: BaseException) -> bool:
    """Return whether an error arose in this library, when asyncio, pika or gRPC had called it.

    One in pika itself counts too: its connection may be broken, and is most likely ours. One in
    gRPC does not: all clients of a process share its poller, which raises now and then and goes on.
    """
    names = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
    packages = [name.partition(".")[0] for name in names]
    called = [each for each in packages if each not in ("asyncio", "pika", "grpc")]
    return called[0] == __package__ if called else "pika" in packages


class _Threads(ThreadPoolExecutor):
    """Threads that start when they are needed. If the system has no more, jobs wait for those."""

    def _adjust_thread_count(self) -> None:
        with suppress(RuntimeError):
            super()._adjust_thread_count()


def real_system() -> System:
    """Return this machine's system: real sockets, clocks, randomness and threads."""
    # Only Linux has a clock that goes on while the machine is suspended.
    boot = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    elapsed_s = partial(time.clock_gettime, boot)
    return System(
        amqp.Connection, etcd.open_channel, time.time, SystemRandom(), _Threads, elapsed_s
    )


class _Stopped(Exception):
    """Ends a run's task group, and nothing else."""


class _Process:
    """A service's run as a process: with signals, logs, a health port and an exit code."""

    def __init__(self, service: Service, settings: Settings, system: System) -> None:
        if not service.handlers:
            raise SettingsError(
                "it has no handler, so it would drop every event: register one with "
                "@service.handler before run()"
            )
        self._stop_signals = _StopSignals()
        self._service, self._settings, self._system = service, settings, system
        self._logs = Logs(service.name, settings.log_level, settings.log_format)
        self._log = self._logs.logger
        self._metrics = Metrics(settings.statsd_host, settings.statsd_port, settings.statsd_prefix)
        self._ended = threading.Event()
        self._defect: BaseException | None = None

    def run(self) -> int:
        """Run until a signal, and return the exit code. Raises PortTaken and SettingsError."""
        code = 0
        try:
            # Never closed, since os._exit follows: closing it would wait for name look-ups.
            asyncio.Runner().run(self._run())
        except (PortTaken, SettingsError):
            raise
        except BaseException as error:  # noqa: BLE001 - a defect is logged, whatever it is
            code = 1
            self._log.critical(
                "ended by a defect; what is not settled goes back", exc_info=self._defect or error
            )
        self._metrics.close()
        self._log.info("stopped")
        self._logs.close()
        self._ended.set()
        return code

    async def _run(self) -> None:
        running = Running(self._service, self._settings, self._system, self._metrics, self._log)
        # By now everything that is missing has been reported to Health.
        if port := self._settings.health_port:
            HealthServer(running.health, port, lambda: running.duplicates.document)
        loop, task = asyncio.get_running_loop(), asyncio.current_task()

        def on_exception(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            defect = running.defect_of(context)
            if defect is not None and task is not None:
                self._defect = defect
                task.cancel()

        loop.set_exception_handler(on_exception)
        # Python's default has few threads: calls to asyncio.to_thread would wait for each other,
        # and the look-up of RabbitMQ's name for them.
        loop.set_default_executor(_Threads(self._settings.calls_at_once + 32))
        threading.Thread(
            target=self._await_signal, args=(loop, running), name="signals", daemon=True
        ).start()
        # Events leave no reference cycles: the collector runs rarely, and skips what exists now.
        gc.freeze()
        gc.set_threshold(50_000)
        await running.run()

    def _await_signal(self, loop: asyncio.AbstractEventLoop, running: Running) -> None:
        loop.call_soon_threadsafe(running.stop, self._stop_signals.wait())
        if not self._ended.wait(_EXIT_WITHIN_S):
            self._log.error("a handler does not return: what is not settled goes back")
            self._logs.close()
            os._exit(0)


class _StopSignals:
    """SIGTERM and SIGINT, for a thread that waits for them while a handler may hold the loop.

    They are handled, not blocked: a handler's child process would inherit the mask, and ignore
    both. Signal handlers are reset by exec.
    """

    def __init__(self) -> None:
        self._received, self._sent = socket.socketpair()
        self._sent.setblocking(False)
        before = {number: signal.signal(number, self._on_signal) for number in _STOP_SIGNALS}
        # Written at once. Python calls handlers only when the main thread next runs Python code.
        signal.set_wakeup_fd(self._sent.fileno(), warn_on_full_buffer=False)

        def reset() -> None:
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)

        # A forked child that does not exec shares the socket.
        os.register_at_fork(after_in_child=reset)

    def wait(self) -> str:
        """Wait for one of them, and return its name."""
        while True:
            (number,) = self._received.recv(1)
            if number in _STOP_SIGNALS:  # The socket receives every signal that has a handler.
                return signal.Signals(number).name

    def _on_signal(self, number: int, _frame: object) -> None:
        # asyncio takes over the wake-up descriptor if a handler calls loop.add_signal_handler.
        with suppress(BlockingIOError):
            self._sent.send(bytes([number]))


_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
