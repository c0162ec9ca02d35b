"""The functions that run as processes of their own: consumers, publishers, clients, a receiver.

Consumers find the servers as a service does, by RABBITMQ_URL and ETCD_ENDPOINTS. Publishers and
clients take arguments, and print at the end how fast they were, as JSON. Functions import aiohttp
and urllib3 themselves, since the start of a consumer without them is measured.
"""

import asyncio
import json
import os
import re
import socket
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import cache
from statistics import median
from typing import Any

import etcd3
import orjson
import pika
from pika import frame, spec

from idempotent_consumer import Event, Producer, Service, Settings
from idempotent_consumer.names import EXCHANGE

PERSISTENT = pika.BasicProperties(content_type="application/json", delivery_mode=2)

_UNCONFIRMED_AT_ONCE = 500
_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
_HEAD = re.compile(rb"\w+ /(\d+) .*?\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE | re.DOTALL)


def body(event_id: object) -> bytes:
    text = f'{{"id":"{event_id}","type":"new_order","args":{{"item":"tea","quantity":1}}}}'
    return text.encode()


def new_events(number: int) -> list[bytes]:
    return [body(uuid.uuid4()) for _ in range(number)]


@contextmanager
def firehose(url: str, queue: str) -> Iterator[Callable[[Sequence[bytes]], None]]:
    """Give a function that publishes persistent bodies to a queue with hardly any CPU time.

    pika's channel takes 16 µs an event (measured), which two cores do not have beside the measured
    processes; frames written to its socket take about 1 µs. There are no confirms, so the caller
    has to count what has arrived. At the end, the broker answers the close behind all events.
    """
    # No heartbeats: nobody would send them between two calls.
    with closing(pika.BlockingConnection(pika.URLParameters(f"{url}?heartbeat=0"))) as connection:
        number = connection.channel().channel_number
        raw = connection._impl._transport._sock  # noqa: SLF001
        # A due event is sent at once, even if TCP waits for an acknowledgement.
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        method = frame.Method(number, spec.Basic.Publish(routing_key=queue)).marshal()

        @cache
        def before(size_bytes: int) -> bytes:
            return bytes(method + frame.Header(number, size_bytes, PERSISTENT).marshal())

        def publish(bodies: Sequence[bytes]) -> None:
            raw.setblocking(True)
            raw.sendall(b"".join(before(len(b)) + frame.Body(number, b).marshal() for b in bodies))
            raw.setblocking(False)

        yield publish


@contextmanager
def timed(events: int) -> Iterator[None]:
    """Print how fast the block handles this many events, and the CPU time of each."""
    started_s, cpu_s = time.monotonic(), time.process_time()
    yield
    took_s = time.monotonic() - started_s
    cpu_us = (time.process_time() - cpu_s) / events * 1e6
    print(json.dumps({"events/s": events / took_s, "CPU µs an event": cpu_us}))


def library(url: str, events: str) -> None:
    """Publish by the library's producer, and measure until the last confirm."""
    bodies = new_events(int(events))
    with Producer(Settings.from_environ({"RABBITMQ_URL": url})) as producer:
        producer.publish(bodies[:1])  # It connects for its first event.
        with timed(len(bodies) - 1):
            producer.publish(bodies[1:])


def unconfirmed(url: str, events: str) -> None:
    """Publish by pika without confirms, and measure until the broker has answered the close."""
    bodies = new_events(int(events))
    connection = pika.BlockingConnection(pika.URLParameters(url))
    # The inner channel: the blocking one would poll the socket after each event.
    publish = connection.channel()._impl.basic_publish  # noqa: SLF001
    with timed(len(bodies)):
        for first in range(0, len(bodies), _UNCONFIRMED_AT_ONCE):
            for each in bodies[first : first + _UNCONFIRMED_AT_ONCE]:
                publish(EXCHANGE, "new_order", each, PERSISTENT)
            connection.process_data_events()
        connection.close()


def open_loop(url: str, queue: str, per_s: str, events: str) -> None:
    """Publish at a steady rate, however slow the consumer is.

    Event number n, with that id, is due n / per_s seconds after the start, and is published then or
    as soon as possible. At the end it prints its start, by the monotonic clock that all processes
    of a machine share (clock_gettime(2)), and its own lateness.
    """
    rate, bodies = float(per_s), [body(f"{number:07}") for number in range(int(events))]
    late_s: list[float] = []
    with firehose(url, queue) as publish:
        start_s = time.monotonic()
        while (first := len(late_s)) < len(bodies):
            passed_s = time.monotonic() - start_s
            due = min(int(passed_s * rate) + 1, len(bodies))
            if due > first:
                publish(bodies[first:due])
                late_s += [passed_s - number / rate for number in range(first, due)]
            else:
                time.sleep(max(0.0, first / rate - passed_s))
    # The first event was due at once.
    told = {"late_ms": 1000 * median(late_s), "reached_per_s": (len(bodies) - 1) / passed_s}
    print(json.dumps({"start_s": start_s, **told}))


def bare(name: str = "bare", noun: str = "events") -> int:
    """Run a service without effects, whose handler waits for HANDLER_MS as for an answer."""
    service = Service(name, noun=noun)
    wait_s = float(os.environ.get("HANDLER_MS", "0")) / 1000

    @service.handler("new_order")
    def wait(_event: Event) -> None:
        if wait_s:
            time.sleep(wait_s)

    return service.run()


def plain() -> int:
    """Run a service whose handler is a plain function, which sends notify's request by urllib3."""
    service = Service("plain", noun="calls")
    post = _poster(os.environ["NOTIFY_URL"], Settings.from_environ(os.environ).calls_at_once)

    @service.claimed_handler("new_order", timeout_s=5.0)
    def notify(event: Event, _timeout_s: float) -> None:
        post({"id": event.id, "type": event.type, "args": event.args})

    return service.run()


def ceiling() -> None:
    """Ack the deliveries of a quorum queue, and do nothing else.

    As in the library, one pika connection with the same prefetch sends one multiple ack for each
    read from the socket. Nothing is decoded and nothing is recorded.
    """
    channel, tags = _consumer(), deque[int](maxlen=1)
    # The inner channel and connection: the blocking ones would pass deliveries on singly.
    inner, loop = channel._impl, channel.connection._impl.ioloop  # noqa: SLF001
    inner.basic_consume("ceiling", lambda _, method, *_content: tags.append(method.delivery_tag))
    while True:
        loop.poll()
        loop.process_timeouts()
        if tags:
            inner.basic_ack(tags.pop(), multiple=True)


def naive() -> None:
    """Make an etcd transaction and an ack for each event, one after the other.

    This is what the tutorials of pika and etcd3 lead to: a blocking connection, a callback for each
    message, and the client's transaction, which compares that the key was never created.
    """
    host, port = os.environ["ETCD_ENDPOINTS"].rsplit(":", 1)
    etcd = etcd3.client(host=host, port=int(port))

    def on_message(channel: Any, method: Any, _properties: Any, body: bytes) -> None:
        key = f"/service/naive/{orjson.loads(body)['id']}"
        absent, put = etcd.transactions.create(key) == 0, etcd.transactions.put(key, "done")
        etcd.transaction(compare=[absent], success=[put], failure=[])
        channel.basic_ack(method.delivery_tag)

    channel = _consumer()
    channel.basic_consume("naive", on_message)
    channel.start_consuming()


def _consumer() -> Any:
    channel = pika.BlockingConnection(pika.URLParameters(os.environ["RABBITMQ_URL"])).channel()
    channel.basic_qos(prefetch_count=int(os.environ["PREFETCH"]))
    return channel


async def receiver() -> None:
    """Print the port, and answer every request with 200 after the milliseconds in its path.

    It knows only as much of HTTP as its callers use: requests with a Content-Length, one after the
    other on open connections.
    """

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):  # The caller hung up.
            while found := _HEAD.match(await reader.readuntil(b"\r\n\r\n")):
                await reader.readexactly(int(found[2]))
                if answer_ms := int(found[1]):
                    await asyncio.sleep(answer_ms / 1000)
                writer.write(_OK)

    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=2048)
    port = server.sockets[0].getsockname()[1]
    print(json.dumps({"event": "listening", "port": port}), flush=True)
    await server.serve_forever()


def plain_client(url: str, at_once: str, calls: str) -> None:
    """Make the calls of `plain`, without a broker and etcd."""
    post, bodies = _poster(url, int(at_once)), new_events(int(calls))
    with timed(len(bodies)), ThreadPoolExecutor(int(at_once)) as pool:
        list(pool.map(lambda body: post(orjson.loads(body)), bodies))


async def coroutine_client(url: str, at_once: str, calls: str) -> None:
    """Make the calls of `notify`, without a broker and etcd."""
    import aiohttp

    bodies = iter(new_events(int(calls)))

    async def make_all(session: aiohttp.ClientSession) -> None:
        for each in bodies:
            event = orjson.loads(each)
            key = {"Idempotency-Key": event["id"]}
            async with session.post(url, json=event, headers=key) as response:
                await response.read()

    with timed(int(calls)):
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, raise_for_status=True) as session:
            await asyncio.gather(*(make_all(session) for _ in range(int(at_once))))


def _poster(url: str, at_once: int) -> Callable[[dict[str, Any]], None]:
    """Return a function that sends notify's request for an event, on any thread."""
    import urllib3

    http = urllib3.PoolManager(maxsize=at_once, retries=False)

    def post(event: dict[str, Any]) -> None:
        key = {"Idempotency-Key": event["id"]}
        response = http.request("POST", url, json=event, headers=key, redirect=False)
        if response.status != 200:
            raise RuntimeError(f"the receiver answered {response.status}")

    return post


if __name__ == "__main__":
    ended = globals()[sys.argv[1]](*sys.argv[2:])
    sys.exit(asyncio.run(ended) if asyncio.iscoroutine(ended) else ended)
