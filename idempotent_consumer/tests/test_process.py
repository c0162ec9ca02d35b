"""A service's process whose handlers hang, or that has a defect. Its broker is in it, in memory."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from fakes.probe import DEADLINE_S, free_port, get

PROGRAM = """
import asyncio, os, sys, threading
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

from pika import spec
from pika.exceptions import ConnectionClosedByClient

from idempotent_consumer import Service, Settings, service as module
from idempotent_consumer.amqp import Properties
from idempotent_consumer.service import real_system

def fail():
    raise RuntimeError("as no broker does")

def connect(_parameters, on_open_callback, on_open_error_callback, on_close_callback):
    \"\"\"Open a connection: a consumer is given one event, and one message is confirmed.\"\"\"
    soon = asyncio.get_running_loop().call_soon

    def consume(_queue, on_message, callback):
        soon(callback, None)
        event = b'{"id": "1", "type": "new_order"}'
        properties = Properties().decode(bytes(2))
        soon(on_message, channel, SimpleNamespace(delivery_tag=1), properties, event)
        return "tag"

    connection = MagicMock()
    connection.channel = lambda on_open_callback: soon(on_open_callback, channel)
    closed = ConnectionClosedByClient(200, "")
    connection.close = lambda: soon(on_close_callback, connection, closed)
    channel = MagicMock(connection=connection, channel_number=1, basic_consume=consume)
    channel.basic_qos = lambda prefetch_count, callback: soon(callback, None)

    def confirm(on_confirm, callback):
        soon(callback, None)
        confirmed = SimpleNamespace(method=spec.Basic.Ack(1))
        channel.basic_publish = lambda *_, **__: soon(on_confirm, confirmed)

    channel.confirm_delivery = confirm
    if "ack fails" in sys.argv:
        channel.basic_ack = lambda *_, **__: fail()
    if "callback fails" in sys.argv:
        soon(fail)
    soon(on_open_callback, connection)
    return connection

service = Service("order", "orders")
"""

RUN = """
system = replace(real_system(), connect=connect)
os._exit(module._Process(service, Settings.from_environ(os.environ), system).run())
"""

PLAIN_CALL_HANGS = """
@service.claimed_handler("new_order", timeout_s=0.01)
def call(event, timeout_s):
    sys.stdin.readline()
"""

COROUTINE_HANGS = """
@service.claimed_handler("new_order", timeout_s=0.01)
async def call(event, timeout_s):
    reading = asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    while not reading.done():
        try:
            await asyncio.wait({reading})
        except asyncio.CancelledError:
            pass
"""

LOOP_HANGS = """
module._EXIT_WITHIN_S = 0.1

@service.handler("new_order")
def handle(event):
    print("called", file=sys.stderr, flush=True)
    threading.Event().wait()
"""

HANDLED = """
service.handler("new_order")(lambda event: None)
"""

BY_ITSELF = f"{HANDLED}sys.exit(service.run())"

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Give the function that starts such a process. What still runs at the end is killed."""
    with ExitStack() as stack:

        def started(handlers: str, *arguments: str, **environ: str) -> subprocess.Popen[str]:
            process = stack.enter_context(
                subprocess.Popen(  # noqa: S603 - the program above
                    [sys.executable, "-c", f"{PROGRAM}{handlers}{RUN}", *arguments],
                    env={**os.environ, "ENABLE_ETCD": "false", **environ},
                    text=True,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
            stack.callback(process.kill)
            return process

        yield started


@pytest.mark.parametrize("handler", [PLAIN_CALL_HANGS, COROUTINE_HANGS])
def test_a_call_that_does_not_return_is_told_once_and_not_alive_until_it_does(
    start: Start, handler: str
) -> None:
    port = free_port()
    process = start(handler, HEALTH_PORT=str(port))
    wait_for_livez(port, 503)
    assert "a restart frees their events" in str(get(port, "/readyz"))
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()
    wait_for_livez(port, 200)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=DEADLINE_S)
    (told,) = [line for line in out.splitlines() if "calls do not return" in line]
    assert (json.loads(told)["level"], json.loads(told)["calls"]) == ("error", 1)
    assert "stopped" in out.splitlines()[-1]
    assert process.returncode == 0


def wait_for_livez(port: int, status: int) -> None:
    until_s = time.monotonic() + DEADLINE_S
    while livez(port) != status:
        assert time.monotonic() < until_s, f"/livez has not answered {status}"


def livez(port: int) -> int:
    """Return the status, or 0 where nobody listens yet."""
    try:
        return get(port, "/livez")[0]
    except urllib.error.URLError:
        return 0


def test_a_handler_that_holds_the_loop_does_not_keep_the_process_from_ending(start: Start) -> None:
    """What it has in flight goes back to the broker; SIGKILL would come soon after."""
    process = start(LOOP_HANGS)
    assert process.stderr
    assert process.stderr.readline() == "called\n"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=DEADLINE_S)
    assert "a handler does not return: what is not settled goes back" in out
    assert process.returncode == 0


@pytest.mark.parametrize("fault", ["ack fails", "callback fails"])
def test_a_defect_ends_the_process_with_code_1_and_its_traceback(start: Start, fault: str) -> None:
    """In a task, and in a callback of the event loop."""
    process = start(HANDLED, fault)
    out, _ = process.communicate(timeout=DEADLINE_S)
    assert "ended by a defect" in out
    assert "RuntimeError: as no broker does" in out
    assert process.returncode == 1


def test_what_it_cannot_start_with_ends_it_with_one_line_and_code_2(start: Start) -> None:
    with socket.create_server(("", 0)) as other:
        taken = str(other.getsockname()[1])
        told = {
            f"HEALTH_PORT {taken} cannot be used": start(BY_ITSELF, HEALTH_PORT=taken),
            "RABBITMQ_URL: ": start(BY_ITSELF, RABBITMQ_URL="amqp://u:s3cret@h/?heartbeat=0"),
        }
        for says, process in told.items():
            out, err = process.communicate(timeout=DEADLINE_S)
            assert (process.returncode, out, err.count("\n")) == (2, "", 1)
            assert err.startswith(f"order: {says}")
            assert "s3cret" not in err
