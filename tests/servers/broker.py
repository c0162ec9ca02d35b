"""RabbitMQ as a test uses it: publish, count, read, clean up."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pika
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import AMQPError, ChannelClosedByBroker

from servers.servers import RabbitMQ
from servers.wait import eventually, lasts

Event = Mapping[str, Any]

EXCHANGE = "events"

_NOT_FOUND = 404
_STEADY_WITHIN_S = 30.0
_WINDOW = 500  # unconfirmed at once
_RECONNECT_S = 0.2
_PACE_S = 0.01


class Depth(NamedTuple):
    """How many messages a queue holds."""

    ready: int
    unacked: int


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
        self, events: Iterable[Event], *, rate_per_s: float | None = None, timeout_s: float = 120.0
    ) -> list[Event]:
        """Publish events in order, and return those that a queue has taken and confirmed.

        Up to 500 are unconfirmed at once; `rate_per_s` slows publishing down. A lost connection is
        opened again, but an event of unknown outcome is not sent again. Raises TimeoutError.
        """
        publishing = _Publishing(events, rate_per_s, timeout_s)
        while True:
            try:
                with self.channel(blocked_connection_timeout=None, heartbeat=10) as channel:
                    publishing.run(channel)
                    return publishing.confirmed
            except (AMQPError, AMQPConnectorException, OSError):
                lasts(_RECONNECT_S)
            publishing.check_time()

    def publish_raw(
        self,
        *bodies: bytes,
        properties: Any = None,
        exchange: str = EXCHANGE,
        routing_key: str = "raw",
    ) -> None:
        """Publish bodies as they are, with pika's BasicProperties.

        Raises pika's UnroutableError or NackError if no queue has taken one of them.
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
        """Return the number of ready messages: exact, and cheap.

        Raises AssertionError if the queue is absent or has no leader, so `eventually` waits for it.
        """
        return self._declared(queue)[0]

    def consumers(self, queue: str) -> int:
        """Return the number of consumers, at the same cost and with the same errors."""
        return self._declared(queue)[1]

    def unacked(self, queue: str) -> int:
        """Return how many messages of a queue are delivered and not acked.

        `rabbitmqctl list_queues` and the management API show a quorum queue's counts as of its
        last tick, up to 5 s ago. A channel knows exactly how many it holds, but not from which
        queue. So this adds up all channels except those that consume only from other queues. It
        takes 0.5 s of CPU, and twice that if anything is held. Raises CommandFailedError.
        """
        return self._held(queue, self._channels())

    def depth(self, queue: str) -> Depth:
        """Return the ready and the unacked messages of a queue at one instant.

        Waits up to 30 s until the numbers stand still. While events are being published, ask for
        one of the two instead. Raises AssertionError, CommandFailedError.
        """
        self.ready(queue)
        return eventually(lambda: self._steady_depth(queue), _STEADY_WITHIN_S)

    def assert_drained(self, *queues: str) -> None:
        """Raise AssertionError if a queue holds a message, ready or unacked."""
        for queue in queues:
            # The cheap question first: it is asked many times while a queue empties.
            if ready := self.ready(queue):
                raise AssertionError(f"queue {queue}: {ready} ready")
            if any(depth := self._steady_depth(queue)):
                raise AssertionError(f"queue {queue}: {depth}")

    def _steady_depth(self, queue: str) -> Depth:
        before, channels = self._declared(queue), self._channels()
        unacked, after = self._held(queue, channels), self._declared(queue)
        # A queue may not have noticed yet that a consumer's channel is gone.
        listed = sum(channel["consumer_count"] for channel in channels)
        if before != after or after[1] > listed:
            raise AssertionError(f"queue {queue} moves: {before}, {unacked} unacked, then {after}")
        return Depth(after[0], unacked)

    def _declared(self, queue: str) -> tuple[int, int]:
        """Return the ready messages and the consumers, as the queue's Raft leader knows them."""
        with self.channel() as channel, _absence(queue):
            answer = channel.queue_declare(queue, passive=True).method
            return answer.message_count, answer.consumer_count

    def _channels(self) -> list[dict[str, Any]]:
        return self._list("channels", "pid", "consumer_count", "messages_unacknowledged")

    def _held(self, queue: str, channels: list[dict[str, Any]]) -> int:
        held = {each["pid"]: each["messages_unacknowledged"] for each in channels}
        if not any(held.values()):
            return 0
        consumed: dict[str, set[str]] = {}
        for consumer in self._list("consumers", "channel_pid", "queue_name"):
            consumed.setdefault(consumer["channel_pid"], set()).add(consumer["queue_name"])
        return sum(number for pid, number in held.items() if queue in consumed.get(pid, {queue}))

    def _list(self, what: str, *columns: str) -> list[dict[str, Any]]:
        answer = self._rabbitmq.ctl(f"list_{what}", *columns, "--formatter=json")
        found: list[dict[str, Any]] = json.loads(answer)
        return found

    def drain(self, queue: str, *, expect: int = 0) -> list[Message]:
        """Take all messages out of a queue and return them in order: some 1,400 a second.

        Waits up to 30 s until at least `expect` have come. If fewer come, it raises AssertionError
        with those that it has taken.
        """
        messages: list[Message] = []

        def enough() -> None:
            messages.extend(self._take_all(queue))
            assert len(messages) >= expect, f"{len(messages)} of {expect} in {queue}: {messages}"

        eventually(enough)
        return messages

    def _take_all(self, queue: str) -> Iterator[Message]:
        with self.channel() as channel, _absence(queue):
            while True:
                method, properties, body = channel.basic_get(queue, auto_ack=True)
                if method is None:
                    return
                yield Message(body, properties.headers or {})

    def queues(self) -> list[str]:
        # Without statistics the list is read from the broker's metadata, so it is current.
        answer: Any = self._rabbitmq.management("GET", "/api/queues?disable_stats=true")
        return [queue["name"] for queue in answer]

    def delete_queues(self, *prefixes: str) -> None:
        names = [name for name in self.queues() if name.startswith(prefixes)]
        with self.channel() as channel:
            for name in names:
                channel.queue_delete(name)

    @contextmanager
    def channel(self, **options: Any) -> Iterator[Any]:
        """Open one of pika's blocking channels, for what has no method here."""
        parameters = pika.URLParameters(self._rabbitmq.url)
        usual = {"socket_timeout": 5, "stack_timeout": 10, "blocked_connection_timeout": 30}
        for name, value in {**usual, **options}.items():
            setattr(parameters, name, value)
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
            raise AssertionError(f"queue {queue}: {error.reply_text}") from error
        raise


class _Publishing:
    """The events to publish and those confirmed, over one connection after another.

    pika's blocking channel waits for each confirm: about 1,000 events/s. That is too slow for a
    test under load, so this sends on the channel inside it, and takes many confirms at once.
    """

    def __init__(self, events: Iterable[Event], rate_per_s: float | None, timeout_s: float) -> None:
        self._events, self._rate_per_s, self._timeout_s = iter(events), rate_per_s, timeout_s
        self._started_s, self._sent = time.monotonic(), 0
        self.confirmed: list[Event] = []

    def check_time(self) -> None:
        if time.monotonic() - self._started_s > self._timeout_s:
            raise TimeoutError(f"{self._timeout_s:g} s: {len(self.confirmed)} confirmed")

    def run(self, blocking: Any) -> None:
        """Send the remaining events and wait for confirms; raises pika's errors, TimeoutError."""
        channel, unconfirmed, returned = blocking._impl, dict[int, Event](), set[int]()  # noqa: SLF001

        def on_return(_channel: Any, _method: Any, properties: Any, _body: bytes) -> None:
            # The broker returns an event that no queue takes before it confirms it.
            returned.add(int(properties.message_id))

        def on_confirm(frame: Any) -> None:
            last, several = frame.method.delivery_tag, frame.method.multiple
            for tag in [tag for tag in unconfirmed if tag <= last] if several else [last]:
                event = unconfirmed.pop(tag)
                if frame.method.NAME == "Basic.Ack" and tag not in returned:
                    self.confirmed.append(event)

        def listen() -> None:
            self.check_time()
            blocking.connection.process_data_events(_PACE_S)

        # As the services declare it: a test may publish before any of them has ever run.
        blocking.exchange_declare(EXCHANGE, "topic", durable=True)
        channel.add_on_return_callback(on_return)
        channel.confirm_delivery(on_confirm)
        for tag, event in enumerate(self._events, start=1):
            unconfirmed[tag] = event
            properties = pika.BasicProperties(
                content_type="application/json", delivery_mode=2, message_id=str(tag)
            )
            channel.basic_publish(
                EXCHANGE, event["type"], encode(event), properties, mandatory=True
            )
            self._sent += 1
            while len(unconfirmed) == _WINDOW or self._is_ahead():
                listen()
        while unconfirmed:
            listen()

    def _is_ahead(self) -> bool:
        if self._rate_per_s is None:
            return False
        return self._sent >= (time.monotonic() - self._started_s) * self._rate_per_s


def encode(event: Event) -> bytes:
    return json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()
