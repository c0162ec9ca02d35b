"""Publish events with many confirms outstanding, across broker restarts.

pika's blocking channel waits for each confirm by itself: about 1,000 events/s. Under load a test
needs more, so this is the asynchronous way: one `_Session` per connection, all on the caller's
thread.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pika

Event = Mapping[str, Any]

EXCHANGE = "events"

_WINDOW = 500  # confirms outstanding at once
_RECONNECT_S = 0.2
_PACE_S = 0.02


class Publishing:
    """What is to be published, and what has been confirmed, over all connections."""

    def __init__(self, events: Iterable[Event], rate_per_s: float | None) -> None:
        self._events: Iterator[Event] = iter(events)
        self._rate_per_s = rate_per_s
        self._started = time.monotonic()
        self._sent = 0
        self.paced = rate_per_s is not None
        self.exhausted = False
        self.confirmed: list[Event] = []

    def next(self) -> Event | None:
        """Return the next event; None when it is not due yet, or when `exhausted`."""
        if self._rate_per_s is not None:
            due = (time.monotonic() - self._started) * self._rate_per_s
            if self._sent >= due:
                return None
        event = next(self._events, None)
        self.exhausted = event is None
        self._sent += event is not None
        return event

    def run(self, url: str, timeout_s: float) -> list[Event]:
        """Publish everything and return the confirmed events, in the order of their confirms.

        An event whose outcome is unknown (its connection was lost first) is not sent again and
        not confirmed, and so is one that no queue was bound for. Raises TimeoutError.
        """
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            _Session(url, self).run(left)
            if self.exhausted and time.monotonic() < deadline:
                return self.confirmed
        raise TimeoutError(f"{timeout_s:g} s: {self._sent} sent, {len(self.confirmed)} confirmed")


class _Session:
    """One connection: sends while it lives, and ends when all it has sent is answered.

    pika has no type marker, so its objects are Any here.
    """

    def __init__(self, url: str, publishing: Publishing) -> None:
        self._publishing = publishing
        self._outstanding: dict[int, Event] = {}
        self._returned: set[int] = set()
        self._tag = 0
        self._channel: Any = None
        parameters = pika.URLParameters(url)
        parameters.heartbeat = 10
        parameters.stack_timeout = 5
        self._connection: Any = pika.SelectConnection(
            parameters,
            on_open_callback=self._opened,
            on_open_error_callback=self._lost,
            on_close_callback=self._lost,
        )

    def run(self, timeout_s: float) -> None:
        """Run until everything is answered, the connection is lost, or the time is over."""
        loop = self._connection.ioloop
        loop.call_later(timeout_s, self._abort)
        try:
            loop.start()
        finally:
            loop.close()

    def _abort(self) -> None:
        if not self._connection.is_closed:
            # pika's close() waits for the broker's answer, and a frozen one gives none; without
            # this the socket would stay open. `_lost` follows.
            self._connection._terminate_stream(TimeoutError("publishing took too long"))  # noqa: SLF001

    def _opened(self, connection: Any) -> None:
        connection.channel(on_open_callback=self._channel_opened)

    def _channel_opened(self, channel: Any) -> None:
        self._channel = channel
        channel.add_on_close_callback(self._channel_lost)
        channel.add_on_return_callback(self._unroutable)
        # As the services declare it: a test may publish before any of them has ever run.
        channel.exchange_declare(
            EXCHANGE, exchange_type="topic", durable=True, callback=self._declared
        )

    def _declared(self, _frame: Any) -> None:
        self._channel.confirm_delivery(self._answered, callback=self._ready)

    def _ready(self, _frame: Any) -> None:
        self._fill()

    def _fill(self) -> None:
        while len(self._outstanding) < _WINDOW and not self._publishing.exhausted:
            event = self._publishing.next()
            if event is None:
                break
            self._send(event)
        if self._publishing.exhausted and not self._outstanding:
            self._connection.close()
        elif self._publishing.paced and not self._publishing.exhausted:
            self._connection.ioloop.call_later(_PACE_S, self._pace)

    def _pace(self) -> None:
        if self._channel.is_open:
            self._fill()

    def _send(self, event: Event) -> None:
        self._tag += 1
        self._outstanding[self._tag] = event
        properties = pika.BasicProperties(
            content_type="application/json", delivery_mode=2, message_id=str(self._tag)
        )
        self._channel.basic_publish(
            EXCHANGE, str(event.get("type", "")), encode(event), properties, mandatory=True
        )

    def _answered(self, frame: Any) -> None:
        method = frame.method
        last = method.delivery_tag
        # Tags are sent in order, so the first outstanding one is the lowest.
        first = next(iter(self._outstanding), last) if method.multiple else last
        for tag in range(first, last + 1):
            event = self._outstanding.pop(tag, None)
            landed = method.NAME == "Basic.Ack" and tag not in self._returned
            if event is not None and landed:
                self._publishing.confirmed.append(event)
        if not self._publishing.paced or self._publishing.exhausted:
            self._fill()

    def _unroutable(self, _channel: Any, _method: Any, properties: Any, _body: bytes) -> None:
        # The broker returns an event that no queue takes before it confirms it.
        self._returned.add(int(properties.message_id))

    def _channel_lost(self, _channel: Any, _reason: Any) -> None:
        if self._connection.is_open:
            self._connection.close()

    def _lost(self, connection: Any, _reason: Any) -> None:
        wait_s = 0 if self._publishing.exhausted else _RECONNECT_S
        connection.ioloop.call_later(wait_s, connection.ioloop.stop)


def encode(event: Event) -> bytes:
    """Return the event's body as it is published."""
    return json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()
