"""The broker as a test uses it: publish, count, read out, clean up."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
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
_SILENT_S = 1.0
_PREFETCH_AT_MOST = 65_535
_WINDOW = 500  # confirms outstanding at once
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
        """Publish events in order, reconnecting where needed, and return the confirmed ones.

        Up to 500 are on their way at once, `rate_per_s` slows them down. An event of unknown
        outcome is not sent again and not confirmed; one that no queue takes is not confirmed.
        Raises TimeoutError.
        """
        publishing = _Publishing(_paced(events, rate_per_s), timeout_s)
        while not publishing.exhausted:
            try:
                with self.channel(blocked_connection_timeout=None, heartbeat=10) as channel:
                    publishing.run(channel)
            except (AMQPError, AMQPConnectorException, OSError):
                lasts(_RECONNECT_S)
            publishing.check_time()
        return publishing.confirmed

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
        """Return the number of ready messages: exact, and cheap.

        Raises AssertionError where the queue is absent or has no leader: `eventually` waits for it.
        """
        return self._declared(queue)[0]

    def consumers(self, queue: str) -> int:
        """Return the number of consumers: exact, and cheap. Raises AssertionError likewise."""
        return self._declared(queue)[1]

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
        one of the two. Raises AssertionError, CommandFailedError.
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
        before, channels = self._declared(queue), self._channels()
        unacked, after = self._held(queue, channels), self._declared(queue)
        # A queue keeps a consumer whose channel is gone, and what that held, until it has noticed.
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
        """Take all messages out of a queue and return them in order.

        Waits 30 s until `expect` have come, then takes what else is there. Raises AssertionError
        when they do not come in time: those taken by then are in its message, and gone.
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
                ready = channel.queue_declare(queue, passive=True).method.message_count
                if not ready:
                    # The count of a queue that has just been recovered lags behind.
                    method, properties, body = channel.basic_get(queue, auto_ack=True)
                    if method is None:
                        return
                    yield Message(body, properties.headers or {})
                    continue
                # One get for each would take minutes of a quorum queue with tens of thousands. No
                # more is sent than is taken, so that nothing is requeued.
                ready = min(ready, _PREFETCH_AT_MOST)
                channel.basic_qos(prefetch_count=ready)
                sent = channel.consume(queue, inactivity_timeout=_SILENT_S)
                for method, properties, body in islice(sent, ready):
                    if method is None:  # Somebody else has taken it.
                        break
                    yield Message(body, properties.headers or {})
                channel.basic_ack(multiple=True)
                channel.cancel()

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
    """What is to be published, and what has been confirmed, over one connection after the other.

    pika's blocking channel waits for each confirm by itself: about 1,000 events/s. Under load a
    test needs more, so this sends on the channel inside it, and hears of many confirms at once.
    """

    def __init__(self, stream: Iterator[Event | None], timeout_s: float) -> None:
        self._stream, self._timeout_s = stream, timeout_s
        self._started_s, self.exhausted = time.monotonic(), False
        self.confirmed: list[Event] = []

    def check_time(self) -> None:
        if time.monotonic() - self._started_s > self._timeout_s:
            raise TimeoutError(f"{self._timeout_s:g} s: {len(self.confirmed)} confirmed")

    def run(self, blocking: Any) -> None:
        """Send until there is no more and all is answered; raises pika's errors, TimeoutError."""
        channel, outstanding, returned = blocking._impl, dict[int, Event](), set[int]()  # noqa: SLF001

        def on_return(_channel: Any, _method: Any, properties: Any, _body: bytes) -> None:
            # The broker returns an event that no queue takes before it confirms it.
            returned.add(int(properties.message_id))

        def on_answer(frame: Any) -> None:
            last = frame.method.delivery_tag
            # Tags are sent in order, so the first outstanding one is the lowest.
            first = next(iter(outstanding), last) if frame.method.multiple else last
            answered = {tag: outstanding.pop(tag, None) for tag in range(first, last + 1)}
            if frame.method.NAME == "Basic.Ack":
                landed = (event for tag, event in answered.items() if tag not in returned)
                self.confirmed.extend(filter(None, landed))

        def listen() -> None:
            self.check_time()
            blocking.connection.process_data_events(_PACE_S)

        # As the services declare it: a test may publish before any of them has ever run.
        blocking.exchange_declare(EXCHANGE, "topic", durable=True)
        channel.add_on_return_callback(on_return)
        channel.confirm_delivery(on_answer)
        tags = count(1)
        for event in self._stream:
            if event is not None:
                outstanding[tag := next(tags)] = event
                properties = pika.BasicProperties(
                    content_type="application/json", delivery_mode=2, message_id=str(tag)
                )
                key = str(event.get("type", ""))
                channel.basic_publish(EXCHANGE, key, encode(event), properties, mandatory=True)
            if event is None:
                listen()
            while len(outstanding) == _WINDOW:
                listen()
        self.exhausted = True
        while outstanding:
            listen()


def _paced(events: Iterable[Event], rate_per_s: float | None) -> Iterator[Event | None]:
    """Yield each event when it is due, and None as long as it is not."""
    started_s = time.monotonic()
    for number, event in enumerate(events):
        while rate_per_s and number >= (time.monotonic() - started_s) * rate_per_s:
            yield None
        yield event


def encode(event: Event) -> bytes:
    return json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()
