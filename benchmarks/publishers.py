"""What publishes: the publishers that are measured, and those that give consumers their load.

    python -m benchmarks.publishers library|unconfirmed URL EVENTS
    python -m benchmarks.publishers open_loop URL QUEUE EVENTS_PER_S EVENTS
    python -m benchmarks.publishers filler URL QUEUE

The first two send the same bodies, persistent, to the exchange `events`.
"""

import random
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pika
from pika import frame, spec
from pika.exceptions import ConnectionClosedByClient

from idempotent_consumer import Producer, Settings
from idempotent_consumer.names import EXCHANGE

from .processes import tell, timed
from .results import NotMeasuredError, percentile
from .subjects import Mix

PERSISTENT = pika.BasicProperties(content_type="application/json", delivery_mode=2)

_SEED = 4
_UNCONFIRMED_AT_ONCE = 500
"""Events between two looks at the socket: it sends these while the next are made ready."""
_OPEN_LOOP_AT_ONCE = 100
"""What is late goes out while more becomes due."""
_LEAST_READY, _CHUNK = 20_000, 10_000
_LOOK_AGAIN_S = 0.05


def body(event_id: object) -> bytes:
    """Return the body of an event."""
    return b'{"id":"%s","type":"new_order","args":{"item":"tea","quantity":1}}' % (
        str(event_id).encode()
    )


def new_events(number: int) -> list[bytes]:
    """Return the bodies of so many events with fresh ids."""
    return [body(uuid.uuid4()) for _ in range(number)]


def series(mix: Mix, length: int) -> tuple[list[bytes], int]:
    """Return the bodies to publish, and how many events they are; `length` is of one series."""
    if mix is Mix.SHUFFLED:
        bodies = 2 * new_events(length // 2)
        random.Random(_SEED).shuffle(bodies)
        return bodies, length // 2
    bodies = new_events(length)
    return (2 * bodies if mix is Mix.REPEATED else bodies), length


class Firehose:
    """Publishes bodies of one size to one queue, with confirms, and hardly any CPU time.

    pika's channel takes 16 µs of it an event (measured), which on two cores is a large part of
    what there is for those that are measured; this way it is half a one. Such events differ only
    in their bodies: all else is encoded once, by pika, and goes out over a socket of its own.
    """

    _CHANNEL = 1
    _SLICE = 1_000
    _UNCONFIRMED = 5_000
    _TIMEOUT_S = 30.0

    def __init__(self, url: str, queue: str, size_bytes: int) -> None:
        parameters = pika.URLParameters(url)
        address = (parameters.host, parameters.port)
        self._socket = socket.create_connection(address, self._TIMEOUT_S)
        # An event that is due goes out at once, whatever TCP still waits for.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = b""
        self._sent = self._confirmed = 0
        content = frame.Body(self._CHANNEL, b"\0" * size_bytes).marshal()
        self._after = content[-1:]
        self._before = (
            frame.Method(self._CHANNEL, spec.Basic.Publish(routing_key=queue)).marshal()
            + frame.Header(self._CHANNEL, size_bytes, PERSISTENT).marshal()
            + content[: -size_bytes - 1]
        )
        self._open(parameters)

    def publish(self, bodies: Sequence[bytes]) -> None:
        """Publish events; 5,000 may be unconfirmed after it. Raises NotMeasuredError or OSError."""
        for first in range(0, len(bodies), self._SLICE):
            part = bodies[first : first + self._SLICE]
            between = self._after + self._before
            self._socket.sendall(self._before + between.join(part) + self._after)
            self._sent += len(part)
            self._await_confirms(self._UNCONFIRMED)

    def close(self) -> None:
        """Wait until everything is confirmed, and close the socket."""
        self._await_confirms(0)
        self._socket.close()

    def _open(self, parameters: Any) -> None:
        self._socket.sendall(frame.ProtocolHeader().marshal())
        self._await(spec.Connection.Start)
        login = parameters.credentials
        self._send(0, spec.Connection.StartOk({}, "PLAIN", f"\0{login.username}\0{login.password}"))
        tune = self._await(spec.Connection.Tune)
        # No heartbeats: between two publishings nobody would send them.
        self._send(0, spec.Connection.TuneOk(tune.channel_max, tune.frame_max, 0))
        self._send(0, spec.Connection.Open(parameters.virtual_host))
        self._await(spec.Connection.OpenOk)
        self._send(self._CHANNEL, spec.Channel.Open())
        self._await(spec.Channel.OpenOk)
        self._send(self._CHANNEL, spec.Confirm.Select())
        self._await(spec.Confirm.SelectOk)

    def _await_confirms(self, outstanding: int) -> None:
        while self._sent - self._confirmed > outstanding:
            # A quorum queue confirms in order where nothing fails.
            self._confirmed = max(self._confirmed, self._await(spec.Basic.Ack).delivery_tag)

    def _send(self, channel: int, method: Any) -> None:
        self._socket.sendall(frame.Method(channel, method).marshal())

    def _await(self, wanted: Any) -> Any:
        consumed, found = frame.decode_frame(self._received)
        while found is None:
            more = self._socket.recv(65_536)
            if not more:
                raise NotMeasuredError("the broker closed the publisher's connection")
            self._received += more
            consumed, found = frame.decode_frame(self._received)
        self._received = self._received[consumed:]
        if not isinstance(found.method, wanted):
            raise NotMeasuredError(f"the broker sent {found.method}, not {wanted.NAME}")
        return found.method


def preload(url: str, queue: str, bodies: Sequence[bytes]) -> None:
    """Publish events of one size to a queue; the broker has confirmed them all."""
    firehose = Firehose(url, queue, len(bodies[0]))
    firehose.publish(bodies)
    firehose.close()


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
        due = min(int(passed_s * rate) + 1, first + _OPEN_LOOP_AT_ONCE, len(bodies))
        if due > first:
            firehose.publish(bodies[first:due])
            late_s += [passed_s - number / rate for number in range(first, due)]
        else:
            time.sleep(max(0.0, first / rate - passed_s))
    took_s = (len(bodies) - 1) / rate + late_s[-1]
    firehose.close()
    tell(
        start_s=start_s,
        took_s=took_s,
        late_ms=1000 * (percentile(late_s, 500) or late_s[0]),
    )


def filler(url: str, queue: str) -> None:
    """Publish whenever few events wait, so that a queue stays filled but bounded.

    On SIGTERM it finishes what it is at and prints how many it has published, all confirmed.
    """
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopping.append(number))
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    firehose, published = Firehose(url, queue, len(new_events(1)[0])), 0
    while not stopping:
        if channel.queue_declare(queue, passive=True).method.message_count < _LEAST_READY:
            firehose.publish(new_events(_CHUNK))
            published += _CHUNK
        else:
            connection.sleep(_LOOK_AGAIN_S)
    firehose.close()
    connection.close()
    print(published)


if __name__ == "__main__":
    _COMMANDS: dict[str, Callable[..., None]] = {
        "library": library,
        "unconfirmed": unconfirmed,
        "open_loop": open_loop,
        "filler": filler,
    }
    _COMMANDS[sys.argv[1]](*sys.argv[2:])
