"""A producer: publishes events, and returns when the broker has them safely."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator
from itertools import islice
from typing import Any, Self, TypeVar

import structlog
from structlog.typing import FilteringBoundLogger

from .bus import declare_exchange
from .health import Health
from .publisher import Publisher, event_message
from .service import real_system
from .settings import Settings

T = TypeVar("T")

WINDOW = 2_000
"""Most events sent and not yet confirmed. As many bodies are held."""

_CHECK_EVERY_S = 0.1


class PublishError(Exception):
    """Not everything is confirmed; the message says why.

    ``confirmed`` is the number of confirmed events. The others may have arrived or not: publish
    all events again, and consumers skip those that they have recorded.
    """

    def __init__(self, why: str, confirmed: int) -> None:
        super().__init__(why)
        self.confirmed = confirmed


class Producer:
    """Publishes to the exchange ``events``, from one thread at a time.

    It connects when it first publishes, and again whenever the connection is lost. Nothing runs
    between two calls, so after a pause it may have to connect again. It sends unconfirmed events
    again, so an event may arrive twice, with one id.

    Its methods block. In a coroutine write ``await asyncio.to_thread(producer.publish, bodies)``.
    """

    def __init__(self, settings: Settings, log: FilteringBoundLogger | None = None) -> None:
        """Use RABBITMQ_URL of the settings, and nothing else. Without ``log``, warn on stderr."""
        self._health = Health()
        self._publisher = Publisher(
            settings.rabbitmq_urls,
            declare_exchange,
            real_system(),
            self._health,
            log or _warnings(),
        )
        self._loop = asyncio.new_event_loop()
        self._publishing: asyncio.Task[None] | None = None
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def publish(
        self,
        bodies: Iterable[bytes],
        timeout_s: float = 30.0,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Publish events, and return their number once each is confirmed.

        The bodies are taken from the iterable as there is room for them, so all of them need not
        fit in memory. Nothing is sent while the iterable blocks: if it waits for its input (a
        pipe), publish what there is by a call of its own. ``progress`` is called with the number
        of events confirmed so far, several times a second.

        Raises ValueError after ``close``; RuntimeError if this thread runs an event loop;
        PublishError if nothing was confirmed for ``timeout_s``. For an invalid event it raises
        InvalidEvent, and it passes on what the iterable raises: both once all events before it
        are confirmed.
        """
        if self._closed:
            raise ValueError("this producer is closed: make another")
        return self._run(self._publish(iter(bodies), timeout_s, progress))

    def close(self) -> None:
        """Close the connection; nothing can be published afterwards.

        Returns after a second where the broker does not answer.
        """
        if self._closed:
            return
        if self._publishing is not None:
            self._run(self._close(self._publishing))
        self._loop.close()
        self._closed = True

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            work.close()
            raise RuntimeError(
                "a Producer blocks, and this thread runs an event loop: call it by "
                "await asyncio.to_thread(producer.publish, bodies)"
            )
        # Not by asyncio.Runner: on Ctrl-C that waits until the iterable returns, and at its end
        # for name look-ups under way.
        task = self._loop.create_task(work)
        try:
            return self._loop.run_until_complete(task)
        finally:
            task.cancel()  # Ctrl-C can end the loop's run and not the task.

    async def _publish(
        self, bodies: Iterator[bytes], timeout_s: float, progress: Callable[[int], None] | None
    ) -> int:
        if self._publishing is None:
            self._publishing = asyncio.get_running_loop().create_task(self._publisher.run())
        batch = _Batch(bodies, self._publisher)
        try:
            while batch.send():
                if await batch.confirms(self._publishing):
                    if progress is not None:
                        progress(batch.confirmed)
                elif batch.idle_s > timeout_s:
                    raise PublishError(self._why(timeout_s), batch.confirmed) from batch.error
        finally:
            batch.wanted = False
        if batch.error is not None:
            raise batch.error
        return batch.confirmed

    async def _close(self, publishing: asyncio.Task[None]) -> None:
        await self._publisher.close()
        await publishing

    def _why(self, timeout_s: float) -> str:
        reasons = (self._publisher.trouble, *self._health.missing.values())
        why = next(filter(None, reasons), "RabbitMQ does not answer")
        return f"nothing was confirmed for {timeout_s:g} s: {why}"


class _Batch:
    """The events of one call."""

    def __init__(self, bodies: Iterator[bytes], publisher: Publisher) -> None:
        self._bodies, self._publisher = bodies, publisher
        self._loop = asyncio.get_running_loop()
        self._unconfirmed: list[asyncio.Future[bool]] = []
        self._more = self.wanted = True
        self.confirmed = 0
        self.error: Exception | None = None

    def send(self) -> bool:
        """Send as many as there is room for; False when no more are to be confirmed."""
        room = WINDOW - len(self._unconfirmed)
        if self._more and room >= WINDOW // 2:
            before = len(self._unconfirmed)
            try:
                for body in islice(self._bodies, room):
                    message = event_message(body, lambda: self.wanted)
                    self._unconfirmed.append(self._publisher.send(message))
            except Exception as error:  # noqa: BLE001 - whatever the iterable raises
                self.error = error
            self._more = len(self._unconfirmed) == before + room
            self._moved_s = self._loop.time()  # The iterable may have taken its time.
        return bool(self._unconfirmed)

    async def confirms(self, publishing: asyncio.Task[None]) -> bool:
        """Wait a moment for confirms; return whether there were any. Raises a defect."""
        # Half a window is sent at a time, so that one confirm is waited for and not each.
        last = self._unconfirmed[-1 - WINDOW // 2 if self._more else -1]
        awaited: set[asyncio.Future[Any]] = {last, publishing}
        await asyncio.wait(awaited, timeout=_CHECK_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
        if publishing.done():
            publishing.result()
        unconfirmed = [each for each in self._unconfirmed if not each.done()]
        number = len(self._unconfirmed) - len(unconfirmed)
        if number:
            self._unconfirmed, self._moved_s = unconfirmed, self._loop.time()
            self.confirmed += number
        return number > 0

    @property
    def idle_s(self) -> float:
        """Since when nothing has been sent or confirmed."""
        return self._loop.time() - self._moved_s


def _warnings() -> Any:
    logging.getLogger("pika").setLevel(logging.CRITICAL)  # What it says is said here in one line.
    return structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr),
        processors=[
            structlog.processors.add_log_level,
            structlog.dev.ConsoleRenderer(colors=False),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
    )
