"""A service's process whose handlers hang, or that has a defect. Its broker is in it, in memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from fakes.deadline import DEADLINE_S
from fakes.probe import free_port, get

PROGRAM = """
import sys, threading
from idempotent_consumer import Service, service as module
from idempotent_consumer.testing.bus import FakeBus

class Bus(FakeBus):
    def __init__(self, _service, _settings, loop, _health, _log, take, returned):
        super().__init__(loop)
        self.take, self.returned = take, returned

    def open(self):
        self._loop.call_soon(lambda: self.deliver(b'{"id": "1", "type": "new_order"}'))

module.RabbitBus = Bus
service = Service("order", "orders")
"""

CALL_HANGS = """
@service.claimed_handler("new_order", timeout_s=0.01)
def call(event, timeout_s):
    sys.stdin.readline()
"""

LOOP_HANGS = """
module._EXIT_WITHIN_S = 0.1

@service.handler("new_order")
def handle(event):
    print("called", file=sys.stderr, flush=True)
    threading.Event().wait()
"""

DEFECT = """
def flush(bus):
    raise RuntimeError("as no fake and no broker does")

Bus.flush = flush
service.handler("new_order")(lambda event: None)
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Give the function that starts such a process. What still runs at the end is killed."""
    with ExitStack() as stack:

        def started(handlers: str, **environ: str) -> subprocess.Popen[str]:
            process = stack.enter_context(
                subprocess.Popen(  # noqa: S603 - the program above
                    [sys.executable, "-c", f"{PROGRAM}{handlers}\nservice.run()"],
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


def test_a_call_that_does_not_return_is_told_once_and_not_alive_until_it_does(start: Start) -> None:
    port = free_port()
    process = start(CALL_HANGS, HEALTH_PORT=str(port))
    wait_for_livez(port, 503)
    assert "a restart frees their events" in str(get(port, "/readyz"))
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()
    wait_for_livez(port, 200)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=DEADLINE_S)
    (told,) = [line for line in out.splitlines() if "calls do not return" in line]
    assert json.loads(told)["calls"] == 1
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
    """What it has in hand goes back to the broker; SIGKILL would come soon after."""
    process = start(LOOP_HANGS)
    assert process.stderr
    assert process.stderr.readline() == "called\n"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=DEADLINE_S)
    assert "a handler does not return: what is not settled goes back" in out
    assert process.returncode == 0


def test_a_defect_ends_the_process_with_code_1_and_its_traceback(start: Start) -> None:
    process = start(DEFECT)
    out, _ = process.communicate(timeout=DEADLINE_S)
    assert "ended by a defect" in out
    assert "RuntimeError: as no fake and no broker does" in out
    assert process.returncode == 1
