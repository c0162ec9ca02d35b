"""/livez and /readyz, and a port that somebody else has."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from fakes.clock import DAY_S, jump
from fakes.probe import free_port, get
from idempotent_consumer.health import Health, HealthServer, PortTaken

PROGRAM = """
from idempotent_consumer import Service
service = Service("order", "orders")
service.handler("new_order")(print)
raise SystemExit(service.run())
"""


@pytest.fixture
def health() -> Health:
    return Health()


@pytest.fixture
def port(health: Health) -> Iterator[int]:
    """Give the port at which health is served."""
    port = free_port()
    server = HealthServer(health, port, lambda: {"read": 0})
    yield port
    server.close()


def test_it_is_ready_where_nothing_is_missing(port: int) -> None:
    assert get(port, "/readyz") == (200, {"ready": True, "missing": {}})


def test_readyz_names_what_is_missing_and_why(port: int, health: Health) -> None:
    health.lacks("etcd", "not reached yet")
    health.lacks("rabbitmq", "connection refused")
    assert get(port, "/readyz") == (
        503,
        {"ready": False, "missing": {"etcd": "not reached yet", "rabbitmq": "connection refused"}},
    )
    health.has("rabbitmq")
    health.lacks("etcd", "Deadline Exceeded")
    assert get(port, "/readyz")[1]["missing"] == {"etcd": "Deadline Exceeded"}
    health.has("etcd")
    health.has("what was never missing")
    assert get(port, "/readyz")[0] == 200


def test_it_is_alive_where_something_is_missing(port: int, health: Health) -> None:
    """Restarting it would not bring etcd back."""
    health.lacks("etcd", "away")
    assert get(port, "/livez") == (200, {"alive": True})


def test_what_hangs_is_named(port: int, health: Health, monkeypatch: pytest.MonkeyPatch) -> None:
    health.hanging = True
    assert get(port, "/livez") == (503, {"alive": False})
    assert list(get(port, "/readyz")[1]["missing"]) == ["calls"]  # type: ignore[call-overload]
    health.hanging = False
    monkeypatch.setattr("idempotent_consumer.health.STALLED_AFTER_S", 0.0)
    status, document = get(port, "/readyz")
    assert (status, document["ready"]) == (503, False)
    assert list(document["missing"]) == ["loop"]  # type: ignore[call-overload]


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])
def test_a_jump_of_the_machines_clock_makes_no_loop_stall_and_hides_none(
    port: int, health: Health, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    health.beat()
    jump(monkeypatch, jump_s)
    assert get(port, "/livez") == (200, {"alive": True})
    monkeypatch.setattr("idempotent_consumer.health.STALLED_AFTER_S", 0.0)
    assert get(port, "/livez") == (503, {"alive": False})


@pytest.mark.parametrize("asked", [b"", b"GET /livez HTTP/1.0\r\n\r\n"])
def test_a_client_that_resets_its_connection_is_not_worth_a_line(
    port: int, capfd: pytest.CaptureFixture[str], asked: bytes
) -> None:
    for _ in range(4):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.sendall(asked)
    # Whoever came before it has been accepted, each by a thread of its own.
    assert get(port, "/livez")[0] == 200
    for thread in threading.enumerate():
        if "process_request_thread" in thread.name:
            thread.join(10)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("path", ["/", "/livez/", "/metrics"])
def test_another_address_says_what_to_ask_for(port: int, path: str) -> None:
    status, document = get(port, path)
    assert status == 404
    assert "/readyz" in str(document["error"])


def test_what_an_http_thread_reads_is_never_changed_in_place(health: Health) -> None:
    health.lacks("etcd", "away")
    read = health.missing
    health.has("etcd")
    assert read == {"etcd": "away"}


def test_duplicates_are_told_as_they_are(port: int) -> None:
    assert get(port, "/duplicates") == (200, {"read": 0})


def test_a_taken_port_gives_one_line(health: Health, port: int) -> None:
    with pytest.raises(PortTaken, match=rf"^HEALTH_PORT {port} cannot be used .*set another"):
        HealthServer(health, port, dict)


def test_a_taken_port_ends_a_service_with_one_line_and_code_2() -> None:
    """In a process of its own: a run blocks the signals of the thread it is on."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ended = subprocess.run(  # noqa: S603 - this interpreter, and the program above.
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "HEALTH_PORT": port},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"order: HEALTH_PORT {port} cannot be used")
    assert ended.stderr.count("\n") == 1


def test_after_the_end_the_port_is_free() -> None:
    port = free_port()
    HealthServer(Health(), port, dict).close()
    HealthServer(Health(), port, dict).close()
