"""The broker as a test uses it: publish, count, read out, clean up."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import pika
from pika.exceptions import ChannelClosedByBroker

from servers.servers import RabbitMQ
from servers.wait import eventually

Event = Mapping[str, Any]

EXCHANGE = "events"

_NOT_FOUND = 404
_STEADY_WITHIN_S = 30.0
_SILENT_S = 1.0
_PREFETCH_AT_MOST = 65_535
_WINDOW = 500  # confirms outstanding at once
_RECONNECT_S = 0.2
_PACE_S = 0.02


class QueueUnavailableError(AssertionError):
    """The queue is absent or leaderless; an AssertionError, so that `eventually` waits for it."""


class QueueChangesError(AssertionError):
    """Messages moved while the queue was read, so its counts are not of one instant."""


class Depth(NamedTuple):
    """How many messages a queue holds."""

    ready: int
    unacked: int


class _Declared(NamedTuple):
    """What a passive declare tells, as the queue's Raft leader knows it."""

    ready: int
    consumers: int


@dataclass(frozen=True)
class Message:
    """A message as read from a queue."""

    body: bytes
    headers: Mapping[str, Any]


class Broker:
    """A client for tests. Every call has a connection of its own, so threads may share one."""

    def __init__(self, rabbitmq: RabbitMQ) -> None:
        self._rabbitmq = rabbitmq

    def publish(
        self,
        events: Iterable[Event],
        *,
        rate_per_s: float | None = None,
        timeout_s: float = 120.0,
    ) -> list[Event]:
        """Publish events in order, reconnecting where needed, and return the confirmed ones.

        Up to 500 are on their way at once, `rate_per_s` slows them down. An event of unknown
        outcome is not sent again and not confirmed; one that no queue takes is not confirmed.
        Raises TimeoutError.
        """
        return _Publishing(self._rabbitmq.url, events, rate_per_s).run(timeout_s)

    def publish_raw(
        self,
        *bodies: bytes,
        properties: Any = None,
        exchange: str = EXCHANGE,
        routing_key: str = "raw",
    ) -> None:
        """Publish bodies as they are, with pika's BasicProperties.

        Raises pika's UnroutableError or NackError unless a queue has taken each.
        """
        with self.channel() as channel:
            channel.confirm_delivery()
            for body in bodies:
                channel.basic_publish(exchange, routing_key, body, properties, mandatory=True)

    def bind(self, queue: str, routing_key: str = "#") -> None:
        """Declare a quorum queue and bind it to the exchange, as a service does."""
        with self.channel() as channel:
            channel.exchange_declare(EXCHANGE, "topic", durable=True)
            channel.queue_declare(queue, durable=True, arguments={"x-queue-type": "quorum"})
            channel.queue_bind(queue, EXCHANGE, routing_key)

    def ready(self, queue: str) -> int:
        """Return the number of ready messages: exact, and cheap. Raises QueueUnavailableError."""
        return self._declared(queue).ready

    def consumers(self, queue: str) -> int:
        """Return the number of consumers: exact, and cheap. Raises QueueUnavailableError."""
        return self._declared(queue).consumers

    def unacked(self, queue: str) -> int:
        """Return how many messages of a queue are delivered and not acked.

        `rabbitmqctl list_queues` and the management API show a quorum queue's counts as of its
        last tick, up to 5 s ago. A channel always knows what it holds, though not from which queue:
        this is what all channels hold but those that consume from other queues only (0.5 s of CPU,
        twice where anything is held). Raises CommandFailedError.
        """
        return self._held(queue, self._channels())

    def depth(self, queue: str) -> Depth:
        """Return the ready and unacked messages of a queue, of one instant.

        Waits up to 30 s for an instant at which nothing moves: while events are published, ask for
        one of the two. Raises QueueUnavailableError, QueueChangesError, CommandFailedError.
        """
        self.ready(queue)
        return eventually(lambda: self._steady_depth(queue), _STEADY_WITHIN_S)

    def assert_drained(self, *queues: str) -> None:
        """Raise AssertionError unless every queue holds nothing, neither ready nor unacked."""
        for queue in queues:
            # The cheap question first: this is asked again and again while a queue empties.
            if ready := self.ready(queue):
                raise AssertionError(f"queue {queue}: {ready} ready")
            if any(depth := self._steady_depth(queue)):
                raise AssertionError(f"queue {queue}: {depth}")

    def _steady_depth(self, queue: str) -> Depth:
        before = self._declared(queue)
        channels = self._channels()
        unacked = self._held(queue, channels)
        after = self._declared(queue)
        # A queue keeps a consumer whose channel is gone, and what that held, until it has noticed.
        listed = sum(channel["consumer_count"] for channel in channels)
        if before != after or after.consumers > listed:
            raise QueueChangesError(f"queue {queue}: {before}, {unacked} unacked, then {after}")
        return Depth(after.ready, unacked)

    def _declared(self, queue: str) -> _Declared:
        with self.channel() as channel, _absence(queue):
            answer = channel.queue_declare(queue, passive=True).method
            return _Declared(answer.message_count, answer.consumer_count)

    def _channels(self) -> list[dict[str, Any]]:
        return self._list("channels", "pid", "consumer_count", "messages_unacknowledged")

    def _held(self, queue: str, channels: list[dict[str, Any]]) -> int:
        held = {each["pid"]: each["messages_unacknowledged"] for each in channels}
        if not any(held.values()):
            return 0
        consumed: dict[str, set[str]] = {}
        for consumer in self._list("consumers", "channel_pid", "queue_name"):
            consumed.setdefault(consumer["channel_pid"], set()).add(consumer["queue_name"])
        return sum(count for pid, count in held.items() if queue in consumed.get(pid, {queue}))

    def _list(self, what: str, *columns: str) -> list[dict[str, Any]]:
        answer = self._rabbitmq.ctl(f"list_{what}", *columns, "--formatter=json")
        found: list[dict[str, Any]] = json.loads(answer)
        return found

    def drain(self, queue: str, *, expect: int = 0, timeout_s: float = 30.0) -> list[Message]:
        """Take all messages out of a queue and return them in order.

        Waits until `expect` have come, then takes what else is there. Raises AssertionError
        when they do not come in time: those taken by then are in its message, and gone.
        """
        messages: list[Message] = []

        def enough() -> None:
            messages.extend(self._take_all(queue))
            if len(messages) < expect:
                raise AssertionError(f"{len(messages)} of {expect} in {queue}: {messages}")

        eventually(enough, timeout_s)
        return messages

    def _take_all(self, queue: str) -> Iterator[Message]:
        with self.channel() as channel, _absence(queue):
            while True:
                ready = channel.queue_declare(queue, passive=True).method.message_count
                if not ready:
                    # The count of a queue that has just been recovered lags behind.
                    method, properties, body = channel.basic_get(queue, auto_ack=True)
                    if method is None:
                        return
                    yield Message(body, properties.headers or {})
                    continue
                ready = min(ready, _PREFETCH_AT_MOST)
                # No more is sent than is taken, so that nothing is requeued.
                channel.basic_qos(prefetch_count=ready)
                sent = channel.consume(queue, inactivity_timeout=_SILENT_S)
                for method, properties, body in islice(sent, ready):
                    if method is None:  # Somebody else has taken it.
                        break
                    yield Message(body, properties.headers or {})
                channel.basic_ack(multiple=True)
                channel.cancel()

    def queues(self) -> list[str]:
        """Return the names of all queues."""
        # Without statistics the list is read from the broker's metadata, so it is current.
        answer: Any = self._rabbitmq.management("GET", "/api/queues?disable_stats=true")
        return [queue["name"] for queue in answer]

    def delete_queues(self, *prefixes: str) -> None:
        """Delete every queue whose name starts so."""
        names = [name for name in self.queues() if name.startswith(prefixes)]
        with self.channel() as channel:
            for name in names:
                channel.queue_delete(name)

    @contextmanager
    def channel(self) -> Iterator[Any]:
        """Open one of pika's blocking channels, for what has no method here."""
        parameters = pika.URLParameters(self._rabbitmq.url)
        parameters.socket_timeout = 5
        parameters.stack_timeout = 10
        parameters.blocked_connection_timeout = 30
        connection = pika.BlockingConnection(parameters)
        try:
            yield connection.channel()
        finally:
            if connection.is_open:
                connection.close()


@contextmanager
def _absence(queue: str) -> Iterator[None]:
    try:
        yield
    except ChannelClosedByBroker as error:
        if error.reply_code == _NOT_FOUND:
            raise QueueUnavailableError(f"queue {queue}: {error.reply_text}") from error
        raise


class _Publishing:
    """What is to be published, and what has been confirmed, over one connection after the other.

    pika's blocking channel waits for each confirm by itself: about 1,000 events/s. Under load a
    test needs more, so this is the asynchronous way, all on the caller's thread. pika has no type
    marker, so its objects are Any here.
    """

    def __init__(self, url: str, events: Iterable[Event], rate_per_s: float | None) -> None:
        self._events, self._rate_per_s = iter(events), rate_per_s
        self._parameters = pika.URLParameters(url)
        self._parameters.heartbeat = 10
        self._parameters.stack_timeout = 5
        self._started, self._sent, self._exhausted = time.monotonic(), 0, False
        self._confirmed: list[Event] = []

    def run(self, timeout_s: float) -> list[Event]:
        """Publish everything and return the confirmed events, in the order of their confirms.

        Raises TimeoutError.
        """
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            self._connect(left)
            if self._exhausted and time.monotonic() < deadline:
                return self._confirmed
        raise TimeoutError(f"{timeout_s:g} s: {self._sent} sent, {len(self._confirmed)} confirmed")

    def _connect(self, timeout_s: float) -> None:
        """Send on one connection until all is answered, it is lost, or the time is over."""
        self._outstanding: dict[int, Event] = {}
        self._returned: set[int] = set()
        self._tag = 0
        self._connection: Any = pika.SelectConnection(
            self._parameters,
            on_open_callback=self._opened,
            on_open_error_callback=self._lost,
            on_close_callback=self._lost,
        )
        loop = self._connection.ioloop
        loop.call_later(timeout_s, self._abort)
        try:
            loop.start()
        finally:
            loop.close()

    def _next(self) -> Event | None:
        """Return the next event; None when it is not due yet, or when there is no more."""
        if self._rate_per_s is not None:
            due = (time.monotonic() - self._started) * self._rate_per_s
            if self._sent >= due:
                return None
        event = next(self._events, None)
        self._exhausted = event is None
        self._sent += event is not None
        return event

    def _abort(self) -> None:
        if not self._connection.is_closed:
            # pika's close() waits for the broker's answer, and a frozen one gives none; without
            # this the socket would stay open. `_lost` follows.
            self._connection._terminate_stream(TimeoutError("publishing took too long"))  # noqa: SLF001

    def _opened(self, connection: Any) -> None:
        connection.channel(on_open_callback=self._channel_opened)

    def _channel_opened(self, channel: Any) -> None:
        self._channel: Any = channel
        channel.add_on_close_callback(self._channel_lost)
        channel.add_on_return_callback(self._unroutable)
        # As the services declare it: a test may publish before any of them has ever run.
        channel.exchange_declare(
            EXCHANGE, exchange_type="topic", durable=True, callback=self._declared
        )

    def _declared(self, _frame: Any) -> None:
        self._channel.confirm_delivery(self._answered, callback=self._pace)

    def _pace(self, _frame: Any = None) -> None:
        """Send what is due, now and every 20 ms."""
        if self._channel.is_open:
            self._fill()
            self._connection.ioloop.call_later(_PACE_S, self._pace)

    def _fill(self) -> None:
        while len(self._outstanding) < _WINDOW and not self._exhausted:
            event = self._next()
            if event is None:
                break
            self._send(event)
        if self._exhausted and not self._outstanding and self._connection.is_open:
            self._connection.close()

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
                self._confirmed.append(event)
        self._fill()

    def _unroutable(self, _channel: Any, _method: Any, properties: Any, _body: bytes) -> None:
        # The broker returns an event that no queue takes before it confirms it.
        self._returned.add(int(properties.message_id))

    def _channel_lost(self, _channel: Any, _reason: Any) -> None:
        if self._connection.is_open:
            self._connection.close()

    def _lost(self, connection: Any, _reason: Any) -> None:
        wait_s = 0 if self._exhausted else _RECONNECT_S
        connection.ioloop.call_later(wait_s, connection.ioloop.stop)


def encode(event: Event) -> bytes:
    """Return the event's body as it is published."""
    return json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()
