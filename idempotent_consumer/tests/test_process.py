"""A service's process, and how it starts and ends. Its broker is a fake within it."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from fakes.probe import DEADLINE_S, free_port, get

PROGRAM = """
import asyncio, os, signal, subprocess, sys, threading
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

from pika.exceptions import ConnectionClosedByClient

from idempotent_consumer import Service, Settings, service as module
from idempotent_consumer.amqp import Properties
from idempotent_consumer.service import real_system

def fail():
    raise RuntimeError("as no broker does")

def connect(_parameters, on_open_callback, on_open_error_callback, on_close_callback):
    \"\"\"Open a connection, whose consumer gets one event.\"\"\"
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
    channel.confirm_delivery = lambda on_confirm, callback: soon(callback, None)
    if "ack fails" in sys.argv:
        channel.basic_ack = lambda *_, **__: fail()
    if "callback fails" in sys.argv:
        soon(on_close_callback, connection, closed)
        soon(on_close_callback, connection, closed)
    if "another's callback fails" in sys.argv:
        soon(fail)
    soon(on_open_callback, connection)
    return connection

service = Service("order", "orders")
"""

RUN = """
system = replace(real_system(), connect=connect)
os._exit(module._Process(service, Settings.from_environ(os.environ), system).run())
"""

LOOP_HANGS = """
module._EXIT_WITHIN_S = 0.1

@service.handler("new_order")
def handle(event):
    if "computing" in sys.argv:
        # No signal interrupts the wait below, as none interrupts a long computation in C.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    waiting = threading.Condition()

    def say():
        with waiting:  # Its lock is free once the wait has begun.
            print("called", file=sys.stderr, flush=True)

    with waiting:
        threading.Thread(target=say, daemon=True).start()
        waiting.wait()
"""

STARTS_A_CHILD = """
@service.handler("new_order")
def handle(event):
    reading, writing = os.pipe()
    if "exec" in sys.argv:
        child = subprocess.Popen(["sleep", "600"]).pid
    elif not (child := os.fork()):
        os.write(writing, b"forked")
        threading.Event().wait()
    else:
        os.read(reading, 6)
    os.kill(child, signal.SIGTERM)
    threading.Timer(5, os.kill, (child, signal.SIGKILL)).start()  # In case it goes on.
    _, status = os.waitpid(child, 0)
    print("child ended by", os.WTERMSIG(status), file=sys.stderr, flush=True)
"""

HANDLES_A_SIGNAL = """
@service.handler("new_order")
def handle(event):
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, print)
    print("called", file=sys.stderr, flush=True)
"""

CALLS_BY_THREADS = """
@service.claimed_handler("new_order", timeout_s=10)
async def call(event, timeout_s):
    together = threading.Barrier(200, timeout=5)
    waiting = (asyncio.to_thread(together.wait) for _ in range(200))
    await asyncio.gather(*waiting, return_exceptions=True)
    print("too few threads" if together.broken else "called", file=sys.stderr, flush=True)
"""

HANDLED = """
service.handler("new_order")(lambda event: None)
"""

BY_ITSELF = f"{HANDLED}sys.exit(service.run())"

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """A function that starts such a process. It is killed if it still runs at the end."""
    unused = str(free_port())  # Otherwise it counts into the statsd of a demo that runs here.
    with ExitStack() as stack:

        def started(handlers: str, *arguments: str, **environ: str) -> subprocess.Popen[str]:
            process = stack.enter_context(
                subprocess.Popen(  # noqa: S603 - the program above
                    [sys.executable, "-c", f"{PROGRAM}{handlers}{RUN}", *arguments],
                    env={**os.environ, "ENABLE_ETCD": "false", "STATSD_PORT": unused, **environ},
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
            stack.callback(process.kill)
            return process

        yield started


def output_until_processed(process: subprocess.Popen[str]) -> str:
    """Return its standard output up to the line that says that its event is processed."""
    assert process.stdout
    out = ""
    for line in process.stdout:
        out += line
        if '"event": "processed"' in line:
            break
    return out


def output_of(process: subprocess.Popen[str]) -> str:
    """Return the rest of its standard output, once it has ended."""
    try:
        return process.communicate(timeout=DEADLINE_S)[0]
    except subprocess.TimeoutExpired:
        raise AssertionError("it does not end") from None


def output_stopped(process: subprocess.Popen[str], by: signal.Signals = signal.SIGTERM) -> str:
    """Stop it, and return the rest of its output, once it has ended with code 0."""
    process.send_signal(by)
    out = output_of(process)
    assert process.returncode == 0
    return out


def wait_called(process: subprocess.Popen[str]) -> None:
    """Wait until its handler has been called."""
    assert process.stderr
    assert process.stderr.readline() == "called\n"


def test_it_shows_its_health_until_it_is_told_to_stop_and_ends_with_code_0(start: Start) -> None:
    port = free_port()
    process = start(HANDLED, HEALTH_PORT=str(port))
    assert process.stdout
    assert "starting" in process.stdout.readline()
    assert get(port, "/livez") == (200, {"alive": True})
    assert "stopped" in output_stopped(process).splitlines()[-1]


@pytest.mark.parametrize("how", ["waiting", "computing"])
def test_a_handler_that_holds_the_loop_does_not_keep_the_process_from_ending(
    start: Start, how: str
) -> None:
    """What it has in flight is requeued. Otherwise SIGKILL would follow soon."""
    process = start(LOOP_HANGS, how)
    wait_called(process)
    out = output_stopped(process)
    assert "a handler does not return: what is not settled goes back" in out


@pytest.mark.parametrize("by", ["exec", "fork"])
def test_a_handlers_child_process_is_ended_by_sigterm_and_the_service_goes_on(
    start: Start, by: str
) -> None:
    process = start(STARTS_A_CHILD, by)
    assert process.stderr
    ended = next(line for line in process.stderr if "ended by" in line)
    assert ended == f"child ended by {signal.SIGTERM}\n"
    assert "stopping" not in output_until_processed(process)
    assert "SIGINT" in output_stopped(process, signal.SIGINT)


def test_a_handler_that_has_asyncio_take_a_signal_does_not_take_the_others(start: Start) -> None:
    process = start(HANDLES_A_SIGNAL)
    wait_called(process)
    output_stopped(process)


def test_all_calls_may_wait_for_threads_at_once(start: Start) -> None:
    """They use asyncio.to_thread, for which Python has few threads more than processors."""
    process = start(CALLS_BY_THREADS, CALLS_AT_ONCE="200")
    wait_called(process)
    output_stopped(process)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("ack fails", "RuntimeError: as no broker does"),
        ("callback fails", "asyncio.exceptions.InvalidStateError: invalid state"),
    ],
)
def test_a_defect_ends_the_process_with_code_1_and_its_traceback(
    start: Start, fault: str, error: str
) -> None:
    """The defect may be in a task, or in a callback of the event loop."""
    process = start(HANDLED, fault)
    out = output_of(process)
    assert "ended by a defect" in out
    assert error in out
    assert process.returncode == 1


def test_a_callback_that_is_not_the_librarys_ends_nothing(start: Start) -> None:
    """It may be, for instance, the callback of a handler's client."""
    process = start(HANDLED, "another's callback fails")
    assert "RuntimeError: as no broker does" in output_until_processed(process)
    output_stopped(process)


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
