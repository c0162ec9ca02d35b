"""A producer: publishes events, and returns when the broker has them safely."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self

import structlog
from structlog.typing import FilteringBoundLogger

from .bus import topology
from .bus.loop import PikaLoop
from .bus.outgoing import event_message
from .bus.publisher import Message, Publisher
from .health import Health
from .settings import Settings

WINDOW = 2_000
"""Most events sent and not yet confirmed. As many bodies are held."""

_CHECK_EVERY_S = 0.1
_CLOSE_WITHIN_S = 2.0


class PublishError(Exception):
    """Not everything is confirmed; the message says why.

    ``confirmed`` is how many events are. The others may have arrived or not: publish all of them
    again, for consumers skip those that they have.
    """

    def __init__(self, why: str, confirmed: int) -> None:
        super().__init__(why)
        self.confirmed = confirmed


class Producer:
    """Publishes to the exchange ``events``, from one thread at a time.

    It connects when it first publishes, and again whenever the connection is lost; between two
    calls nothing runs, so after a pause it may have to. What was sent and not confirmed is sent
    again, so an event may arrive twice, with one id.
    """

    def __init__(self, settings: Settings, log: FilteringBoundLogger | None = None) -> None:
        """Of the settings, RABBITMQ_URL alone counts. Without ``log``, warnings go to stderr."""
        self._loop, self._health = PikaLoop(), Health()
        self._publisher = Publisher(
            settings.rabbitmq_urls,
            topology.declare_exchange,
            self._loop,
            self._health,
            log or _warnings(),
        )
        self._opened = self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    def publish(
        self,
        bodies: Iterable[bytes],
        timeout_s: float = 30.0,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Publish events, and return their number once each is confirmed.

        The bodies are taken from the iterable as there is room for them, so it can be longer than
        memory. While it blocks nothing is sent: give one that waits (a pipe) what there is by
        calls of their own. ``progress`` is called with the number confirmed so far, several times
        a second.

        Raises ValueError once it is closed; PublishError when nothing was confirmed for
        ``timeout_s``; and, after all before it is confirmed, InvalidEvent for a body that is no
        event, or what the iterable raised.
        """
        if self._closed:
            raise ValueError("this producer is closed: make another")
        if not self._opened:
            self._publisher.open()
            self._opened = True
        batch = _Batch(bodies, self._publisher, self._loop, timeout_s, progress)
        try:
            batch.send()
            self._loop.run()
        finally:
            batch.wanted = False
        if batch.outstanding:
            raise PublishError(self._why(timeout_s), batch.confirmed) from batch.error
        if batch.error is not None:
            raise batch.error
        return batch.confirmed

    def close(self) -> None:
        """Close the connection; nothing can be published afterwards."""
        if self._closed:
            return
        self._closed = True
        self._publisher.close()
        self._await_closed(self._loop.now_s() + _CLOSE_WITHIN_S)
        self._loop.run()
        self._loop.close()

    def _await_closed(self, until_s: float) -> None:
        if self._publisher.closed or self._loop.now_s() > until_s:
            self._loop.call_soon(self._loop.stop)
        else:
            self._loop.call_later(_CHECK_EVERY_S, lambda: self._await_closed(until_s))

    def _why(self, timeout_s: float) -> str:
        reasons = (self._publisher.trouble, *self._health.missing.values())
        why = next(filter(None, reasons), "RabbitMQ does not answer")
        return f"nothing was confirmed for {timeout_s:g} s: {why}"


class _Batch:
    """The events of one call."""

    def __init__(
        self,
        bodies: Iterable[bytes],
        publisher: Publisher,
        loop: PikaLoop,
        timeout_s: float,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._messages = self._messages_of(bodies)
        self._publisher, self._loop = publisher, loop
        self._timeout_s, self._progress = timeout_s, progress
        self._moved_s = loop.now_s()
        self._reported = 0
        self._scheduled = self._ended = self._stopped = False
        self.wanted = True
        self.outstanding = self.confirmed = 0
        self.error: Exception | None = None
        loop.call_later(_CHECK_EVERY_S, self._check)

    def send(self) -> None:
        """Send as many as there is room for; stop the loop when there are no more."""
        self._scheduled = False
        try:
            while self.outstanding < WINDOW and not self._ended:
                message = next(self._messages, None)
                self._ended = message is None
                if message is not None:
                    self.outstanding += 1
                    self._publisher.publish(message)
        except Exception as error:  # noqa: BLE001 - whatever the iterable raises is the caller's.
            self.error, self._ended = error, True
        self._moved_s = self._loop.now_s()  # The iterable may have taken its time.
        if self._ended and not self.outstanding:
            self._stop()

    def _messages_of(self, bodies: Iterable[bytes]) -> Iterator[Message]:
        is_wanted, confirmed = self._is_wanted, self._on_confirmed
        for body in bodies:
            yield event_message(body, is_wanted, confirmed)

    def _is_wanted(self) -> bool:
        return self.wanted

    def _on_confirmed(self) -> None:
        if not self.wanted:
            return
        self.outstanding -= 1
        self.confirmed += 1
        # Half a window is sent at a time, and from the loop: pika swallows what is raised here.
        if not self._scheduled and self.outstanding <= (0 if self._ended else WINDOW // 2):
            self._scheduled = True
            self._loop.call_soon(self.send)

    def _check(self) -> None:
        if not self.wanted:
            return
        now_s = self._loop.now_s()
        if self.confirmed != self._reported:
            self._reported, self._moved_s = self.confirmed, now_s
            self._report()
        elif now_s - self._moved_s > self._timeout_s:
            self._stop()
            return
        self._loop.call_later(_CHECK_EVERY_S, self._check)

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self.confirmed)

    def _stop(self) -> None:
        # Once: a second one would end the next call's run.
        if not self._stopped:
            self._stopped = True
            self._report()
            self._loop.call_soon(self._loop.stop)


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
