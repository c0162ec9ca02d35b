"""For tests with real sockets and threads: a port, a probe of health, a deadline."""

import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

DEADLINE_S = 20.0
CALLS = 300
"""If each of this many calls waits for a tenth of a second, they miss the deadline."""

PAST_ANY_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def get(port: int, path: str) -> tuple[int, dict[str, Any]]:
    """Return the status and the JSON document of the answer to a GET request."""
    try:
        with PAST_ANY_PROXY.open(f"http://127.0.0.1:{port}{path}", timeout=10) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def ends_in_time(work: Callable[[], object]) -> None:
    """Do some work on a thread; raises AssertionError if it misses the deadline."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(DEADLINE_S)
    if thread.is_alive():
        raise AssertionError(f"it has not ended within {DEADLINE_S:.0f} s")
