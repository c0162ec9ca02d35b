"""The receiver of notifications: an HTTP server that counts, refuses and holds requests."""

import contextlib
import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_HOLD_AT_MOST_S = 60.0
_DROP_EVERY_S = 0.2


@dataclass(frozen=True)
class Call:
    """One POST as it arrived; ``path`` tells its senders apart where each has its own."""

    key: str
    body: Any
    path: str = field(default="", compare=False)


class Sink:
    """Accepts POSTs with 204 until told otherwise. Made by `listen_http`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: list[Call] = []
        self._failures: dict[str, int | None] = {}
        self._held_key: str | None = None
        self._dripped_key: str | None = None
        self._open = threading.Event()
        self._open.set()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, name="sink")
        self._thread.start()

    @property
    def url(self) -> str:
        """Where to POST."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/notifications"

    @property
    def calls(self) -> list[Call]:
        """Every call so far, in order of arrival, the refused and the held ones too."""
        with self._lock:
            return list(self._calls)

    def per_key(self) -> Counter[str]:
        """Return how many calls each idempotency key has had."""
        return Counter(call.key for call in self.calls)

    def refuse(self, key: str, times: int | None = None) -> None:
        """Answer the next calls with this key with 500: so many of them, or all."""
        with self._lock:
            self._failures[key] = times

    def hold(self) -> None:
        """Leave calls without an answer until `release`."""
        self._held_key = None
        self._open.clear()

    def hold_only(self, key: str) -> None:
        """Leave the calls with this key without an answer until `release`, and no others."""
        self._held_key = key
        self._open.clear()

    def drip_only(self, key: str) -> None:
        """Answer the calls with this key drop by drop until `release`: their headers do not end."""
        self._dripped_key = key
        self.hold_only(key)

    def release(self) -> None:
        """Answer those held, and the following ones at once."""
        self._dripped_key = None
        self._open.set()

    def close(self) -> None:
        """Stop listening."""
        self.release()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def serve(self, call: Call, caller: socket.socket, answer: Callable[[int], None]) -> None:
        """Take a call from the caller's connection, hold it if so told, and answer it."""
        status = self.note(call)
        if self._dripped_key == call.key:
            self._drip(caller)
        elif self._held_key in (None, call.key):
            self._open.wait(_HOLD_AT_MOST_S)
            answer(status)
        else:
            answer(status)

    def _drip(self, caller: socket.socket) -> None:
        """Send a header that does not end, until the release or until the caller hangs up."""
        with contextlib.suppress(OSError):
            caller.sendall(b"HTTP/1.1 204 No Content\r\nX-Drops: ")
            while not self._open.wait(_DROP_EVERY_S):
                caller.sendall(b".")

    def note(self, call: Call) -> int:
        """Note a call, and return the status to answer it with."""
        with self._lock:
            self._calls.append(call)
            left = self._failures.get(call.key, 0)
            refused = left is None or left > 0
            if left:
                self._failures[call.key] = left - 1
        return 500 if refused else 204


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # The default of 5 refuses some of a service's calls when they come all at once.
    request_queue_size = 512


def _handler(sink: Sink) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            call = Call(self.headers["Idempotency-Key"], body, self.path)
            sink.serve(call, self.connection, self._answer)

        def _answer(self, status: int) -> None:
            # The caller may have been killed, or have given up.
            with contextlib.suppress(OSError):
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    return Handler


@contextmanager
def listen_http() -> Iterator[Sink]:
    """Listen on a free port for as long as the block runs."""
    sink = Sink()
    try:
        yield sink
    finally:
        sink.close()
