"""What publishes: the publishers that are measured, and those that give consumers their load.

    python -m benchmarks.publishers library|unconfirmed URL EVENTS
    python -m benchmarks.publishers open_loop URL QUEUE EVENTS_PER_S EVENTS

Each prints in the end, as JSON, what it took. The first two send the same bodies, persistent, to
the exchange `events`.
"""

import json
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

import pika
from pika import frame, spec
from pika.exceptions import ConnectionClosedByClient

from idempotent_consumer import Producer, Settings
from idempotent_consumer.names import EXCHANGE

PERSISTENT = pika.BasicProperties(content_type="application/json", delivery_mode=2)

_UNCONFIRMED_AT_ONCE = 500
"""Events between two looks at the socket: it sends these while the next are made ready."""


def body(event_id: object) -> bytes:
    """Return the body of an event."""
    return b'{"id":"%s","type":"new_order","args":{"item":"tea","quantity":1}}' % (
        str(event_id).encode()
    )


def new_events(number: int) -> list[bytes]:
    """Return the bodies of so many events with fresh ids."""
    return [body(uuid.uuid4()) for _ in range(number)]


class Firehose:
    """Publishes bodies of one size to one queue, persistent, with hardly any CPU time.

    pika's channel takes 16 µs of it an event (measured), which on two cores is a large part of
    what there is for those that are measured; this way it is half a one. Such events differ only
    in their bodies: all else is encoded once, by pika, and goes out over pika's own socket.
    Without confirms: whoever uses it counts what has arrived.
    """

    def __init__(self, url: str, queue: str, size_bytes: int) -> None:
        # No heartbeats: between two publishings nobody would send them.
        self._connection = pika.BlockingConnection(pika.URLParameters(f"{url}?heartbeat=0"))
        number = self._connection.channel().channel_number
        self._socket = self._connection._impl._transport._sock  # noqa: SLF001
        # An event that is due goes out at once, whatever TCP still waits for.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        content = frame.Body(number, b"\0" * size_bytes).marshal()
        self._after = content[-1:]
        self._before = (
            frame.Method(number, spec.Basic.Publish(routing_key=queue)).marshal()
            + frame.Header(number, size_bytes, PERSISTENT).marshal()
            + content[: -size_bytes - 1]
        )

    def publish(self, bodies: Sequence[bytes]) -> None:
        """Send events; raises OSError."""
        self._socket.setblocking(True)
        between = self._after + self._before
        self._socket.sendall(self._before + between.join(bodies) + self._after)
        self._socket.setblocking(False)

    def close(self) -> None:
        """Close the connection: the broker answers that behind everything that it was sent."""
        self._connection.close()


def pour(url: str, queue: str, bodies: Sequence[bytes]) -> None:
    """Send events of one size, if any, to a queue."""
    if bodies:
        firehose = Firehose(url, queue, len(bodies[0]))
        firehose.publish(bodies)
        firehose.close()


@contextmanager
def timed(events: int) -> Iterator[None]:
    """Print how fast the block works off so many events, and what CPU time each of them costs."""
    started_s, cpu_s = time.monotonic(), time.process_time()
    yield
    took_s = time.monotonic() - started_s
    cpu_us = (time.process_time() - cpu_s) / events * 1e6
    print(json.dumps({"events/s": events / took_s, "CPU µs an event": cpu_us}))


def library(url: str, events: str) -> None:
    """Publish by the library's producer, and tell what it took from first publish to last confirm.

    Everything that it sent is confirmed before it returns.
    """
    bodies = new_events(int(events))
    with Producer(Settings.from_environ({"RABBITMQ_URL": url})) as producer:
        producer.publish(bodies[:1])  # It connects at its first event.
        with timed(len(bodies) - 1):
            producer.publish(bodies[1:])


def unconfirmed(url: str, events: str) -> None:
    """Publish by pika without confirms, and tell what that took.

    It only learns that the broker has all when the connection has closed: the broker answers the
    wish to close behind everything that it was sent before.
    """
    bodies, sent, timer = new_events(int(events)), 0, ExitStack()

    def opened(channel: Any) -> None:
        def publish() -> None:
            nonlocal sent
            for each in bodies[sent : sent + _UNCONFIRMED_AT_ONCE]:
                channel.basic_publish(EXCHANGE, "new_order", each, PERSISTENT)
            sent += _UNCONFIRMED_AT_ONCE
            if sent < len(bodies):
                connection.ioloop.add_callback_threadsafe(publish)
            else:
                connection.close()

        timer.enter_context(timed(len(bodies)))
        publish()

    def closed(_connection: Any, reason: Any) -> None:
        if not isinstance(reason, ConnectionClosedByClient):
            raise reason
        timer.close()
        connection.ioloop.stop()

    connection = pika.SelectConnection(
        pika.URLParameters(url),
        on_open_callback=lambda connection: connection.channel(on_open_callback=opened),
        on_close_callback=closed,
    )
    connection.ioloop.start()


def open_loop(url: str, queue: str, per_s: str, events: str) -> None:
    """Publish at a steady rate that waits for nobody.

    Event number n is due n / per_s seconds after the start, and is published then or, where
    something held this process up, as soon after that as can be. Its id is its number. In the end
    it tells its start, on the monotonic clock that all processes of a machine share
    (clock_gettime(2)), and how late it was itself, so that nobody takes its own delays for those of
    what it measures.
    """
    rate, bodies = float(per_s), [body(f"{number:07}") for number in range(int(events))]
    late_s: list[float] = []
    firehose = Firehose(url, queue, len(bodies[0]))
    start_s = time.monotonic()
    while (first := len(late_s)) < len(bodies):
        passed_s = time.monotonic() - start_s
        due = min(int(passed_s * rate) + 1, len(bodies))
        if due > first:
            firehose.publish(bodies[first:due])
            late_s += [passed_s - number / rate for number in range(first, due)]
        else:
            time.sleep(max(0.0, first / rate - passed_s))
    firehose.close()
    found = {"late_ms": 1000 * median(late_s), "reached_per_s": reached_per_s(rate, late_s)}
    print(json.dumps({"start_s": start_s, **found}))


def reached_per_s(per_s: float, late_s: Sequence[float]) -> float:
    """Return the rate from the first event, due at once, to the last, by how late they were."""
    intervals = len(late_s) - 1
    return intervals / (intervals / per_s + late_s[-1])


if __name__ == "__main__":
    commands: dict[str, Callable[..., None]]
    commands = {"library": library, "unconfirmed": unconfirmed, "open_loop": open_loop}
    commands[sys.argv[1]](*sys.argv[2:])
