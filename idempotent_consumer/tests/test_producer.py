"""A producer without a broker: threads, forks, interrupts, and what it refuses."""

import asyncio
import gc
import math
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

import pytest
import structlog
from pika import frame, spec

from fakes.probe import DEADLINE_S, free_port
from idempotent_consumer import Producer, PublishError, Settings, SettingsError
from idempotent_consumer.bus import MAX_BYTES_IN_FLIGHT

EVENT = b'{"id":"1","type":"new_order"}'


def producer_at(port: int, log: Any = None) -> Producer:
    return Producer(Settings(rabbitmq_urls=(f"amqp://127.0.0.1:{port}/",)), log)


@pytest.fixture
def producer() -> Iterator[Producer]:
    """Give a producer whose connections are refused."""
    with producer_at(free_port()) as producer:
        yield producer


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """Give a server that accepts connections and sends nothing, like a frozen broker."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(DEADLINE_S)
        yield server


def assert_asyncio_logged_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """No task or future was left behind with an exception that nobody read."""
    gc.collect()
    assert [record for record in caplog.records if record.name == "asyncio"] == []


def test_coroutines_share_it_by_means_of_threads_and_close_it(server: socket.socket) -> None:
    """The calls take turns, and each has its own result."""

    async def publish() -> list[Any]:
        with producer_at(server.getsockname()[1]) as producer:
            with pytest.raises(RuntimeError, match=r"asyncio\.to_thread"):
                producer.publish([EVENT])
            calls = [asyncio.to_thread(producer.publish, [EVENT], timeout_s=0.2) for _ in range(3)]
            return await asyncio.gather(*calls, return_exceptions=True)

    errors = asyncio.run(publish())
    assert [type(error) for error in errors] == [PublishError] * 3
    # The others may have waited for their turn in vain.
    assert any("not connected yet" in str(error) for error in errors)


def test_one_thread_continues_to_connect_where_another_has_begun(producer: Producer) -> None:
    for _ in range(2):
        with ThreadPoolExecutor(1) as thread, pytest.raises(PublishError, match="refused"):
            thread.submit(producer.publish, [EVENT], timeout_s=0.2).result()


def test_a_call_waits_for_its_turn_no_longer_than_for_a_confirm(producer: Producer) -> None:
    begun, over = threading.Event(), threading.Event()

    def bodies() -> Iterator[bytes]:
        begun.set()
        over.wait(DEADLINE_S)
        yield from ()

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(producer.publish, bodies(), math.inf)
        begun.wait(DEADLINE_S)
        with pytest.raises(PublishError, match=r"another thread .* for 0\.2 s") as raised:
            producer.publish([EVENT], timeout_s=0.2)
        second = threads.submit(producer.publish, [], math.inf)
        over.set()
        assert (first.result(), second.result(), raised.value.confirmed) == (0, 0, 0)


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("defect", [ValueError("closed file"), KeyboardInterrupt()])
def test_what_is_raised_while_it_works_ends_one_call(
    defect: BaseException, again: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A log may fail to write, and a signal's handler may raise anywhere."""
    defects = [defect]

    def write(*_: Any) -> Any:
        if defects:
            raise defects.pop()
        raise structlog.DropEvent

    log: Any = structlog.wrap_logger(None, processors=[write])
    with producer_at(free_port(), log) as producer:
        with pytest.raises(type(defect)) as raised:
            producer.publish([EVENT], timeout_s=5)
        assert raised.value is defect
        if again:
            with pytest.raises(PublishError, match="refused"):
                producer.publish([EVENT], timeout_s=0.2)
    assert_asyncio_logged_nothing(caplog)


def test_it_cannot_be_closed_within_publish(producer: Producer) -> None:
    def bodies() -> Iterator[bytes]:
        producer.close()
        yield EVENT

    with pytest.raises(RuntimeError, match="when publish has returned"):
        producer.publish(bodies())
    assert producer.publish([]) == 0


def test_a_closed_producer_publishes_nothing(producer: Producer) -> None:
    assert producer.publish([]) == 0
    producer.close()
    producer.close()
    with pytest.raises(ValueError, match="make another"):
        producer.publish([EVENT])


@pytest.mark.parametrize(
    ("bodies", "says"),
    [
        (EVENT, r"not one bytes: write publish\(\[body\]\)"),
        (EVENT.decode(), "not one str"),
        ({"id": "1", "type": "new_order"}, "not one dict"),
        ([{"id": "1", "type": "new_order"}], r"not dict: write json\.dumps\(event\)\.encode"),
        ([EVENT.decode()], "not str"),
    ],
)
def test_what_is_not_a_list_of_bodies_is_refused(
    producer: Producer, bodies: Any, says: str
) -> None:
    with pytest.raises(TypeError, match=says):
        producer.publish(bodies)


def test_a_wrong_header_is_refused_before_anything_is_sent(producer: Producer) -> None:
    with pytest.raises(ValueError, match="x-error"):
        producer.publish([EVENT], headers={"x-error": "a"})


def test_a_second_interrupt_ends_only_its_own_call(
    producer: Producer, caplog: pytest.LogCaptureFixture
) -> None:
    """Ctrl-C is pressed again while the interrupted connection is being closed."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    def interrupted() -> Iterator[bytes]:
        asyncio.get_running_loop().call_soon(interrupt)
        interrupt()
        yield EVENT

    for bodies in (interrupted(), iter([EVENT])):
        with pytest.raises(KeyboardInterrupt):
            producer.publish(bodies)
    with pytest.raises(PublishError, match="refused"):
        producer.publish([EVENT], timeout_s=0.2)
    assert_asyncio_logged_nothing(caplog)


def test_an_interrupted_call_is_over_and_followed_by_another_connection(
    server: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    """Ctrl-C reaches whatever runs, which can be the iterable.

    Half a message may have been sent on that connection, or one counted that was not.
    """
    taken = []

    def interrupted() -> Iterator[bytes]:
        yield EVENT
        raise KeyboardInterrupt

    def others() -> Iterator[bytes]:
        taken.append(1)
        yield EVENT

    with producer_at(server.getsockname()[1]) as producer:
        with pytest.raises(PublishError):
            producer.publish([EVENT], timeout_s=0.2)
        with pytest.raises(KeyboardInterrupt):
            producer.publish(interrupted())
        with pytest.raises(PublishError) as raised:
            producer.publish(others(), timeout_s=0.2)
    assert (taken, raised.value.confirmed) == ([1], 0)
    for _ in range(2):
        server.accept()[0].close()
    assert_asyncio_logged_nothing(caplog)


def test_large_bodies_are_taken_up_to_a_limit_in_bytes(producer: Producer) -> None:
    """Without a broker none is confirmed, so no more are taken."""
    taken: list[int] = []

    def bodies() -> Iterator[bytes]:
        for size in repeat(2**20, 100):
            taken.append(size)
            yield EVENT.ljust(size)

    with pytest.raises(PublishError):
        producer.publish(bodies(), timeout_s=0.2)
    assert sum(taken) == MAX_BYTES_IN_FLIGHT + 2**20


def test_its_error_can_be_raised_by_a_process_pool() -> None:
    copy = pickle.loads(pickle.dumps(PublishError("why", 3)))  # noqa: S301 - as a pool does
    assert (type(copy), str(copy), copy.confirmed) == (PublishError, "why", 3)


def test_a_wrong_address_is_a_wrong_setting() -> None:
    with pytest.raises(SettingsError, match=r"^RABBITMQ_URL"):
        Producer(Settings(rabbitmq_urls=("amqp://h/?heartbeat=0",)))


@pytest.mark.parametrize("ends", ["_end", "close"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # The process has threads.
def test_a_forked_child_cannot_use_its_parents_and_leaves_it_alone(
    server: socket.socket, ends: str
) -> None:
    """It would take the confirms of others for its own. ``_end`` is what the collector calls."""
    with producer_at(server.getsockname()[1]) as producer:
        with pytest.raises(PublishError):
            producer.publish([EVENT], timeout_s=0.2)
        reading, writing = os.pipe()
        if not os.fork():
            try:
                with pytest.raises(RuntimeError) as raised:
                    producer.publish([EVENT], timeout_s=0.2)
                getattr(producer, ends)()
                os.write(writing, str(raised.value).encode())
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            assert "make one after the fork" in pipe.read()
        connection, _ = server.accept()
        with connection:
            connection.sendall(frame.Method(0, spec.Connection.Start()).marshal())
            with pytest.raises(PublishError):
                producer.publish([EVENT], timeout_s=0.2)
            sent = connection.recv(4096)
            header = frame.ProtocolHeader().marshal()
            assert sent.startswith(header)
            _, answer = frame.decode_frame(sent[len(header) :])
            assert isinstance(answer.method, spec.Connection.StartOk), "the parent's goes on"


UNCLOSED = """
import os, socket, sys, threading
from idempotent_consumer import Producer, PublishError, Settings

server = socket.create_server(("127.0.0.1", 0))
url = f"amqp://127.0.0.1:{server.getsockname()[1]}/"
producer = Producer(Settings(rabbitmq_urls=(url,)))
try:
    producer.publish([b'{"id":"1","type":"new_order"}'], timeout_s=0.2)
except PublishError:
    print("published", flush=True)
if "fork" in sys.argv and (child := os.fork()):
    os.waitpid(child, 0)
if "collect" in sys.argv:
    del producer
if "daemon" in sys.argv:
    begun = threading.Event()

    def bodies():
        begun.set()
        yield threading.Event().wait()

    threading.Thread(target=producer.publish, args=(bodies(),), daemon=True).start()
    begun.wait()
"""


@pytest.mark.parametrize("how", ["", "fork", "collect", "fork collect", "daemon"])
def test_a_producer_that_nobody_closes_ends_silently(how: str) -> None:
    program = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", UNCLOSED, *how.split()]
    ended = subprocess.run(  # noqa: S603 - the program above
        program, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert (ended.stdout, ended.stderr, ended.returncode) == ("published\n", "", 0)
