"""The broker as a test uses it: publish, count, read out, clean up."""

import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pika
from pika.exceptions import ChannelClosedByBroker

from servers.publisher import EXCHANGE, Event, Publishing
from servers.server import RabbitMQ
from servers.wait import eventually

_NOT_FOUND = 404
_STEADY_WITHIN_S = 10.0


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
    routing_key: str


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
        return Publishing(events, rate_per_s).run(self._rabbitmq.url, timeout_s)

    def publish_aside(
        self,
        events: Iterable[Event],
        *,
        rate_per_s: float | None = None,
        timeout_s: float = 120.0,
    ) -> Future[list[Event]]:
        """Do the same on a thread of its own, while the test breaks something.

        A daemon: where a test has failed with the broker away, it does not hold up the exit.
        """
        published: Future[list[Event]] = Future()

        def publish() -> None:
            try:
                confirmed = self.publish(events, rate_per_s=rate_per_s, timeout_s=timeout_s)
            except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it.
                published.set_exception(error)
            else:
                published.set_result(confirmed)

        threading.Thread(target=publish, name="publisher", daemon=True).start()
        return published

    def publish_raw(self, body: bytes, properties: Any = None, *, routing_key: str = "raw") -> None:
        """Publish one body as it is, with pika's BasicProperties.

        Raises pika's UnroutableError or NackError unless a queue has taken it.
        """
        with self._channel() as channel:
            channel.confirm_delivery()
            channel.basic_publish(EXCHANGE, routing_key, body, properties, mandatory=True)

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

        Waits up to 10 s for an instant at which nothing moves: while events are published, ask for
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
        with self._channel() as channel, _absence(queue):
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
        with self._channel() as channel, _absence(queue):
            while True:
                method, properties, body = channel.basic_get(queue, auto_ack=True)
                if method is None:
                    return
                yield Message(body, properties.headers or {}, method.routing_key)

    def queues(self) -> list[str]:
        """Return the names of all queues."""
        # Without statistics the list is read from the broker's metadata, so it is current.
        answer: Any = self._rabbitmq.management("GET", "/api/queues?disable_stats=true")
        return [queue["name"] for queue in answer]

    def delete_queues(self, *prefixes: str) -> None:
        """Delete every queue whose name starts so."""
        names = [name for name in self.queues() if name.startswith(prefixes)]
        with self._channel() as channel:
            for name in names:
                channel.queue_delete(name)

    @contextmanager
    def _channel(self) -> Iterator[Any]:
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
