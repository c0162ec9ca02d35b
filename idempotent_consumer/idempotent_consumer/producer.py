"""A producer: publishes events, and returns when the broker has confirmed them."""

from __future__ import annotations

import asyncio
import logging
import os
import selectors
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import structlog
from structlog.typing import FilteringBoundLogger

from .bus import MAX_BYTES_IN_FLIGHT, declare_exchange
from .event import NOTHING, Header, Outgoing, check_headers
from .health import Health
from .names import EXCHANGE, check_exchange
from .publisher import Message, Publisher, event_message
from .service import real_system
from .settings import Settings

WINDOW = 2_000
"""Most unconfirmed events; fewer if they have more than `MAX_BYTES_IN_FLIGHT`."""

_CHECK_EVERY_S = 0.1


class PublishError(Exception):
    """Not every event is confirmed; the message says why.

    ``confirmed`` is the number of confirmed events. The others may have arrived or not: publish
    all events again, and consumers skip those that they have recorded.
    """

    # The default is for a process pool, which copies an exception by its message and adds the rest.
    def __init__(self, why: str, confirmed: int = 0) -> None:
        super().__init__(why)
        self.confirmed = confirmed


class Producer:
    """Publishes to an exchange. Threads may share it, and their calls take turns.

    It connects when it first publishes, and again when the connection is lost. Nothing runs between
    two calls. Unconfirmed events are sent again, so an event may arrive twice, with the same id.

    Its methods block. In a coroutine write ``await asyncio.to_thread(producer.publish, bodies)``.
    A forked child has to make its own: there ``publish`` raises and ``close`` does nothing.
    """

    def __init__(
        self,
        settings: Settings,
        log: FilteringBoundLogger | None = None,
        *,
        exchange: str = EXCHANGE,
    ) -> None:
        """Use only RABBITMQ_URL of the settings. Without ``log``, warnings go to stderr."""
        self._exchange = check_exchange(exchange)
        declare = partial(declare_exchange, exchange=exchange)
        self._make = partial(Publisher, settings.rabbitmq_urls, declare, real_system())
        self._log = log or _warnings()
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def publish(
        self,
        bodies: Iterable[bytes],
        timeout_s: float = 30.0,
        progress: Callable[[int], None] | None = None,
        *,
        headers: Mapping[str, Header] = NOTHING,
    ) -> int:
        """Publish events, and return their number once all are confirmed.

        Each body is the JSON of an event, as bytes. Each message gets the ``headers``. ``progress``
        is called several times a second with the number of events confirmed so far.

        The bodies are taken one by one, so they need not fit in memory together. Nothing is sent
        while the iterable blocks: if it waits for input (a pipe), make a call for what there is.

        Raises ValueError after ``close``; ValueError or TypeError for wrong headers; TypeError if
        ``bodies`` is not an iterable of bodies; RuntimeError in a thread that runs an event loop,
        and in a forked child; PublishError if nothing was confirmed for ``timeout_s``, or another
        thread published for that long. Once all events before it are confirmed, raises TypeError
        for a body that is not bytes, InvalidEvent for an invalid event, and what the iterable
        raises.
        """
        if os.getpid() != self._pid:
            raise RuntimeError("this Producer was made in another process: make one after the fork")
        if _running_loop() is not None:
            raise RuntimeError(
                "a Producer blocks, and this thread runs an event loop: call it by "
                "await asyncio.to_thread(producer.publish, bodies)"
            )
        if isinstance(bodies, (bytes, str, Mapping)):
            got = type(bodies).__name__
            raise TypeError(f"publish takes a list of bodies, not one {got}: write publish([body])")
        batch = _Batch(
            self._exchange, check_headers(headers), timeout_s, progress or (lambda _: None)
        )
        if not self._lock.acquire(timeout=min(max(0.0, timeout_s), threading.TIMEOUT_MAX)):
            raise PublishError(f"another thread has been publishing for {timeout_s:g} s")
        try:
            self._run_until_published(bodies, batch)
        finally:
            self._lock.release()
        if batch.error is not None:
            raise batch.error
        return batch.confirmed

    def close(self) -> None:
        """Close it, once no other thread publishes. May be called in a coroutine.

        If the broker does not answer, this takes a second. Raises RuntimeError within ``publish``:
        in its iterable, or in ``progress``.
        """
        if _running_loop() is self._loop:
            raise RuntimeError("this Producer is publishing: close it when publish has returned")
        if os.getpid() == self._pid:
            with self._lock:
                self._end()

    def _begin(self) -> None:
        """Make what a call runs: at first, and again after a call that was interrupted."""
        self._health = Health()
        self._publisher = self._make(self._health, self._log)
        # poll, not epoll: what is registered there belongs to one process, also after a fork.
        selector = selectors.PollSelector()
        self._loop = asyncio.SelectorEventLoop(selector)
        self._publishing = self._loop.create_task(_run(self._publisher))
        end = partial(_end, self._publisher, self._publishing, self._loop, selector, self._pid)
        self._end = weakref.finalize(self, end)  # At the end of the program too.

    def _run_until_published(self, bodies: Iterable[bytes], batch: _Batch) -> None:
        """Run the loop for one call, on the thread whose turn it is."""
        if not self._end.alive:
            raise ValueError("this producer is closed: make another")
        if self._publishing.done() or self._publishing.cancelling():
            end = self._end
            self._begin()  # First, since the end of the old one can be interrupted too.
            end()
        # Not with asyncio.Runner: on Ctrl-C it waits until the iterable returns, and at its end
        # for name look-ups that are under way.
        task = self._loop.create_task(self._publish(bodies, batch))
        try:
            self._loop.run_until_complete(task)
        except BaseException:
            # Ctrl-C can end the loop's run but not the task, and leave anything half done.
            task.cancel()
            self._publishing.cancel()
            raise

    async def _publish(self, bodies: Iterable[bytes], batch: _Batch) -> None:
        """Publish the bodies up to the batch's ``error``. Raises a defect."""
        try:
            unconfirmed_bytes = 0
            for message in batch.messages(bodies):
                self._publisher.send(message)
                batch.unconfirmed.append(message)
                unconfirmed_bytes += len(message.body)
                number = len(batch.unconfirmed)
                if number == WINDOW or unconfirmed_bytes > MAX_BYTES_IN_FLIGHT:
                    # Half a window at a time, so as not to wait for each confirm.
                    await self._confirm(batch, number // 2)
                    unconfirmed_bytes = sum(len(each.body) for each in batch.unconfirmed)
            await self._confirm(batch, 0)
        except PublishError as error:
            batch.error = error
        finally:
            batch.wanted = False

    async def _confirm(self, batch: _Batch, left: int) -> None:
        """Wait until only ``left`` events are unconfirmed. Raises PublishError, and a defect."""
        now_s = asyncio.get_running_loop().time
        moved_s = now_s()
        while len(batch.unconfirmed) > left:
            last = batch.unconfirmed[-1 - left].confirmed
            awaited: set[asyncio.Future[Any]] = {last, self._publishing}
            await asyncio.wait(awaited, timeout=_CHECK_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
            if self._publishing.done() and (defect := self._publishing.result()) is not None:
                raise defect
            unconfirmed = [each for each in batch.unconfirmed if not each.confirmed.done()]
            if number := len(batch.unconfirmed) - len(unconfirmed):
                batch.unconfirmed, moved_s = unconfirmed, now_s()
                batch.confirmed += number
                batch.progress(batch.confirmed)
            elif now_s() - moved_s > batch.timeout_s:
                reasons = (self._publisher.trouble, *self._health.missing.values())
                why = next(filter(None, reasons), "RabbitMQ does not answer")
                why = f"nothing was confirmed for {batch.timeout_s:g} s: {why}"
                raise PublishError(why, batch.confirmed) from batch.error


@dataclass(eq=False)
class _Batch:
    """The events of one call. ``error`` says what ended it: a body, the iterable or a time-out."""

    exchange: str
    headers: Mapping[str, Header]
    timeout_s: float
    progress: Callable[[int], None]
    unconfirmed: list[Message] = field(default_factory=list)
    confirmed: int = 0
    wanted: bool = True
    error: Exception | None = None

    def messages(self, bodies: Iterable[bytes]) -> Iterator[Message]:
        """Yield the messages to send, up to the error."""
        try:
            for body in bodies:
                event = Outgoing(body, self.headers)
                yield event_message(event, self.exchange, lambda: self.wanted)
        except Exception as error:  # noqa: BLE001 - whatever the iterable raises
            self.error = error


async def _run(publisher: Publisher) -> BaseException | None:
    """Run a publisher until it is closed. Return what it raises, without exception groups, or None.

    If this task raised a KeyboardInterrupt, it would end the loop's run of a later call.
    """
    try:
        await publisher.run()
    except BaseException as error:  # noqa: BLE001 - a log's, or what a signal's handler raises
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        return error
    return None


def _end(
    publisher: Publisher,
    publishing: asyncio.Task[BaseException | None],
    loop: asyncio.AbstractEventLoop,
    selector: selectors.BaseSelector,
    pid: int,
) -> None:
    """Close what a producer has opened; a forked child closes its copy, not its parent's.

    Does nothing while ``publish`` runs, on a daemon thread or on a thread that was not forked.
    """
    if loop.is_running():
        return
    if os.getpid() != pid:
        # What is sent here would leave by the parent's socket, so a dead one takes its place.
        dead, peer = socket.socketpair()
        with dead, peer:
            dead.setblocking(False)
            for key in selector.get_map().values():
                os.dup2(dead.fileno(), key.fd)

    def end() -> None:
        with closing(loop):
            try:
                loop.run_until_complete(publisher.close())
            finally:  # If that is interrupted, by Ctrl-C for instance, it goes on here.
                loop.run_until_complete(asyncio.wait({publishing}))

    if _running_loop() is None:
        end()
    else:  # One thread runs one loop.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(end).result()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _warnings() -> Any:
    logging.getLogger("pika").setLevel(logging.CRITICAL)  # Its errors are logged here in one line.
    renderer = structlog.dev.ConsoleRenderer(colors=False)
    return structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr),
        processors=[structlog.processors.add_log_level, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
    )
