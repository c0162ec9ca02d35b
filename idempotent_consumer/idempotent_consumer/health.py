"""What is missing, and the addresses that tell it, /livez and /readyz; /duplicates beside them."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import orjson

STALLED_AFTER_S = 60.0
"""A loop that has not come round for so long hangs in a handler, and its heartbeats with it."""

_POLL_S = 0.1


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *address: Any) -> None:
        """Say nothing of a client that has gone: it is its own affair."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(*address)


class PortTaken(OSError):
    """The health port cannot be bound; the message says what to do."""


class Health:
    """Why the service is not ready, by the name of what is missing.

    Written by the loop's thread alone. The HTTP threads read ``missing``, which is replaced and
    never changed in place.
    """

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}
        self.hanging = False
        self._beat_s = time.monotonic()

    def lacks(self, what: str, why: str) -> None:
        """Say that something is missing, and why."""
        self.missing = {**self.missing, what: why}

    def has(self, what: str) -> None:
        """Say that it is there (again)."""
        self.missing = {name: why for name, why in self.missing.items() if name != what}

    def beat(self) -> None:
        """Say that the loop has come round."""
        self._beat_s = time.monotonic()

    @property
    def stuck(self) -> dict[str, str]:
        """What hangs in this process, and why a restart would help; empty while nothing does."""
        stuck = {}
        if self.hanging:
            stuck["calls"] = "they do not return; a restart frees their events"
        if time.monotonic() - self._beat_s >= STALLED_AFTER_S:
            stuck["loop"] = "a handler does not return; a restart frees what is in hand"
        return stuck


class HealthServer:
    """Serves ``GET /livez``, ``/readyz`` and ``/duplicates`` from a thread of its own.

    ``duplicates`` returns the last one's document, on any thread.
    """

    def __init__(
        self, health: Health, port: int, duplicates: Callable[[], dict[str, object]]
    ) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = 5.0

            def do_GET(self) -> None:
                self._answer(*_report(health, duplicates, self.path))

            def _answer(self, status: int, document: dict[str, object]) -> None:
                body = orjson.dumps(document) + b"\n"
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        try:
            self._server = _Server(("", port), Handler)
        except OSError as error:
            raise PortTaken(
                f"HEALTH_PORT {port} cannot be used ({error.strerror}): set another, or 0 for none"
            ) from None
        threading.Thread(
            target=self._server.serve_forever, args=(_POLL_S,), name="health", daemon=True
        ).start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()


def _report(
    health: Health, duplicates: Callable[[], dict[str, object]], path: str
) -> tuple[int, dict[str, object]]:
    if path == "/livez":
        alive = not health.stuck
        return (200 if alive else 503), {"alive": alive}
    if path == "/readyz":
        missing = {**health.missing, **health.stuck}
        return (503 if missing else 200), {"ready": not missing, "missing": missing}
    if path == "/duplicates":
        return 200, duplicates()
    return 404, {"error": "ask for /livez, /readyz or /duplicates"}
