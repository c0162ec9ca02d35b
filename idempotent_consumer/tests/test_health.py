"""/livez, /readyz and /duplicates, whatever clients do."""

import asyncio
import gc
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from fakes.probe import free_port, get
from idempotent_consumer import health as module
from idempotent_consumer.health import Health, HealthServer

PATIENCE_S = 20.0
Serve = Callable[..., int]
Connect = Callable[[int], socket.socket]
CUT_OFF = (ConnectionResetError, BrokenPipeError)


@pytest.fixture
def health() -> Health:
    return Health()


@pytest.fixture
def serve(health: Health) -> Iterator[Serve]:
    """Give a function that starts a server with these arguments and returns its port."""
    with ExitStack() as stack:

        def serve(duplicates: Callable[[], dict[str, object]] = dict, **arguments: Any) -> int:
            port = free_port()
            stack.callback(HealthServer(health, port, duplicates, **arguments).close)
            return port

        yield serve


@pytest.fixture
def port(serve: Serve) -> int:
    """Return the port of a server."""
    return serve()


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Give a function that connects to a port."""
    with ExitStack() as stack:
        yield lambda port: stack.enter_context(
            socket.create_connection(("127.0.0.1", port), PATIENCE_S)
        )


def read_all(client: socket.socket) -> bytes:
    """Read until the server has closed the connection."""
    found = b""
    try:
        while data := client.recv(2**20):
            found += data
    except ConnectionResetError:
        pass
    return found


def send(client: socket.socket, data: bytes, times: int) -> None:
    """Send data again and again. Raises one of CUT_OFF, or TimeoutError if nobody reads."""
    for _ in range(times):
        client.sendall(data)


# What it answers.


def test_readyz_names_what_is_missing_and_why(port: int, health: Health) -> None:
    """/livez stays fine: a restart would not bring etcd back."""
    assert get(port, "/readyz") == (200, {"ready": True, "missing": {}})
    missing = {"etcd": "not reached yet", "rabbitmq": "connection refused"}
    for name, why in missing.items():
        health.lacks(name, why)
    assert get(port, "/readyz") == (503, {"ready": False, "missing": missing})
    assert get(port, "/livez") == (200, {"alive": True})
    health.has("rabbitmq")
    health.lacks("etcd", "Deadline Exceeded")
    assert get(port, "/readyz")[1]["missing"] == {"etcd": "Deadline Exceeded"}
    health.has("etcd")
    health.has("what was never missing")
    assert get(port, "/readyz")[0] == 200


@pytest.mark.parametrize("jump_s", [0.0, 86_400.0, -86_400.0])
def test_what_hangs_is_named_whatever_the_machines_clock_does(
    port: int, health: Health, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    health.beat()
    now_s, now_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: now_s() + jump_s)
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + int(jump_s * 1e9))
    assert get(port, "/livez") == (200, {"alive": True})
    for what in ("calls", "loop"):
        health.hanging = what == "calls"
        monkeypatch.setattr(module, "STALLED_AFTER_S", 3600.0 if what == "calls" else 0.0)
        assert get(port, "/livez") == (503, {"alive": False})
        status, document = get(port, "/readyz")
        assert (status, document["ready"], list(document["missing"])) == (503, False, [what])


def test_what_the_http_thread_reads_is_never_changed_in_place(health: Health) -> None:
    health.lacks("etcd", "away")
    read = health.missing
    health.has("etcd")
    assert read == {"etcd": "away"}


# Clients of any kind.


@pytest.mark.parametrize("asked", [b"", b"GET /livez HTTP/1.0\r\n\r\n"])
def test_a_client_that_leaves_early_is_not_logged(
    port: int, caplog: pytest.LogCaptureFixture, asked: bytes
) -> None:
    for resets in (1, 1, 0, 0):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", resets, 0))
            client.sendall(asked)
    # By now, the clients before this one have been accepted.
    assert get(port, "/livez")[0] == 200
    gc.collect()
    assert caplog.text == ""


def test_livez_is_answered_while_the_event_loop_is_blocked(serve: Serve) -> None:
    async def block() -> tuple[int, object]:
        return get(serve(), "/livez")  # It blocks this loop until it has the reply.

    assert asyncio.run(block()) == (200, {"alive": True})


def test_a_client_that_goes_on_sending_bytes_is_cut_off(serve: Serve, connect: Connect) -> None:
    """There are 300, which send whenever they can: a deadline for each read would not help."""
    port = serve(deadline_s=1.0, most=400)
    left = {connect(port) for _ in range(300)}
    until_s = time.monotonic() + PATIENCE_S
    while left and time.monotonic() < until_s:
        for client in list(left):
            try:
                client.send(b"x")
            except CUT_OFF:
                left.remove(client)
        assert get(port, "/livez")[0] == 200
    assert not left


def test_above_the_limit_the_oldest_connection_is_closed(serve: Serve, connect: Connect) -> None:
    """A probe gets its reply however many are open, and the process keeps its descriptors."""
    port = serve(deadline_s=3600.0)
    held = connect(port)
    assert {get(port, "/livez")[0] for _ in range(34)} == {200}
    held.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
    assert read_all(held).startswith(b"HTTP/1.1 200 OK\r\n"), "closed ones do not count"
    clients = [connect(port) for _ in range(34)]
    assert [read_all(client) for client in clients[:2]] == [b"", b""]
    assert get(port, "/livez")[0] == 200
    assert read_all(clients[2]) == b""
    for client in clients[3:]:
        client.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
        assert read_all(client).startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_slow_reader_is_cut_off_and_delays_nobody(serve: Serve, connect: Connect) -> None:
    answer = {"read": "a" * 50_000_000}
    port = serve(lambda: answer, deadline_s=1.0)
    client = connect(port)
    client.sendall(b"GET /duplicates HTTP/1.1\r\n\r\n")
    assert client.recv(15) == b"HTTP/1.1 200 OK"
    assert get(port, "/livez")[0] == 200
    with pytest.raises(CUT_OFF):
        send(client, b"x", times=10**9)
    assert len(read_all(client)) < 50_000_000


@pytest.mark.parametrize(
    ("question", "answered"),
    [
        (b"GET /livez/ HTTP/1.1\r\n\r\n", b"404 Not Found"),
        (b"GET /metrics HTTP/1.1\r\n\r\n", b"404 Not Found"),
        (b"\x16\x03\x01\x02\0\x01\xfc\x03\x03" + b"\0" * 100 + b"\r\n\r\n", b"400 Bad Request"),
        (b"\r\n\r\n", b"400 Bad Request"),
        (b"GET\r\n\r\n", b"400 Bad Request"),
        (b"POST /livez HTTP/1.1\r\nContent-Length: 0\r\n\r\n", b"400 Bad Request"),
        (b"\xff\xfe /livez HTTP/1.1\r\n\r\n", b"400 Bad Request"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"400 Bad Request"),
    ],
)
def test_the_reply_to_any_other_request_says_what_to_ask_for(
    port: int, connect: Connect, caplog: pytest.LogCaptureFixture, question: bytes, answered: bytes
) -> None:
    client = connect(port)
    client.sendall(question)
    status, _, rest = read_all(client).partition(b"\r\n")
    assert status == b"HTTP/1.1 " + answered
    assert b"/readyz" in rest
    assert get(port, "/livez")[0] == 200
    assert caplog.text == ""


@pytest.mark.parametrize(
    "garbage", [b"G" * 10**6, b"GET /livez HTTP/1.1\r\n" + b"A: b\r\n" * 10**5]
)
def test_an_endless_request_is_cut_off(
    serve: Serve, connect: Connect, caplog: pytest.LogCaptureFixture, garbage: bytes
) -> None:
    port = serve(deadline_s=3600.0)
    client = connect(port)
    with pytest.raises(CUT_OFF):
        send(client, garbage, times=100)
    assert get(port, "/livez")[0] == 200
    gc.collect()
    assert caplog.text == ""


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_it_is_served_over_ipv6_too(port: int) -> None:
    with socket.create_connection(("::1", port), PATIENCE_S) as client:
        client.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
        assert read_all(client).endswith(b'{"alive":true}\n')
    assert get(port, "/livez")[0] == 200


def test_a_machine_without_ipv6_serves_over_ipv4(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    port = serve()
    assert get(port, "/livez")[0] == 200
    with pytest.raises(OSError, match=r"refused|address|family"):
        socket.create_connection(("::1", port), PATIENCE_S)


def test_the_port_is_free_after_the_end() -> None:
    port = free_port()
    HealthServer(Health(), port, dict).close()
    HealthServer(Health(), port, dict).close()
