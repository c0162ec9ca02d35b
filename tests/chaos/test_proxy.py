"""The proxy misbehaves as told. No trial would notice if it did not."""

import queue
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import get_args

import pytest

from chaos.checks import becomes, true
from chaos.proxy import Direction, Proxy, relay
from servers.wait import eventually


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with suppress(ConnectionError):
            while data := self.request.recv(1000):
                self.request.sendall(data)


@contextmanager
def _served(by: type[socketserver.BaseRequestHandler]) -> Iterator[int]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), by) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def echo() -> Iterator[int]:
    """Give the port of a server that sends back what it receives."""
    with _served(_Echo) as port:
        yield port


def test_bytes_pass_both_ways_and_are_counted(echo: int) -> None:
    with relay(echo) as proxy, _connect(proxy) as client:
        proxy.count("up", b"lo w")
        client.sendall(b"hello")
        assert _receive(client, 5) == b"hello"
        client.sendall(b" world")
        assert _receive(client, 6) == b" world"
        becomes(lambda: (proxy.up.passed_bytes, proxy.down.passed_bytes), (11, 11))
        assert proxy.up.appearances == 1


@pytest.mark.parametrize("direction", get_args(Direction))
def test_held_bytes_pass_after_the_release(echo: int, direction: Direction) -> None:
    with relay(echo) as proxy, _connect(proxy) as client:
        way = proxy.up if direction == "up" else proxy.down
        proxy.hold(direction)
        client.sendall(b"hello")
        eventually(lambda: true(way.holds(b"ell")))
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(5)
        proxy.release()
        assert _receive(client, 5) == b"hello"
        assert way.held_bytes == 0


def test_swallowed_bytes_are_lost_until_the_connection_is_cut(echo: int) -> None:
    with relay(echo) as proxy:
        with _connect(proxy) as client:
            proxy.swallow("down")
            client.sendall(b"hello")
            becomes(lambda: proxy.down.swallowed_bytes, 5)
            proxy.cut()
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        with _connect(proxy) as client:
            client.sendall(b"again")
            assert _receive(client, 5) == b"again"
        assert proxy.resets == 1


def test_a_close_reaches_the_other_side_late(echo: int) -> None:
    with relay(echo) as proxy:
        proxy.close_slowly(0.5)
        started_s = time.monotonic()
        with _connect(proxy) as client:
            client.sendall(b"bye")
            assert _receive(client, 3) == b"bye"
        becomes(lambda: proxy.closed_late, 1)
        assert proxy.connections == 1
        becomes(lambda: proxy.connections, 0)
        assert time.monotonic() - started_s >= 0.5


def test_the_last_bytes_of_a_closed_side_still_arrive() -> None:
    """A killed process has sent its last acks, and more deliveries are on their way to it."""
    heard: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    class Talker(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.settimeout(0.01)
            told, chunk = b"", b"?"
            with suppress(ConnectionError):
                while chunk:
                    self.request.sendall(b"talk")
                    with suppress(TimeoutError):
                        told += (chunk := self.request.recv(1000))
            heard.put(told)

    with _served(Talker) as port, relay(port) as proxy:
        proxy.delay(0.2)
        with _connect(proxy) as client:
            assert client.recv(1) == b"t"  # The rest stays unread, so the close is a reset.
            client.sendall(b"last words")
        assert heard.get(timeout=5) == b"last words"


def _connect(way: Proxy) -> socket.socket:
    host, _, port = way.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=5)


def _receive(client: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size and (chunk := client.recv(size - len(received))):
        received += chunk
    return received
