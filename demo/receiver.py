"""What notify calls: it accepts each notification, and prints its key.

    python receiver.py HOST PORT [KEYS]

A key that it has accepted before is printed after "again": it drops such a call, as a receiver
should. With a file for the keys it knows them after a restart too, and signals change how it is:
HUP well, USR1 slow, USR2 failing.
"""

import signal
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_SLOW_S = 3.0
_MOODS = {signal.SIGHUP: "well", signal.SIGUSR1: "slow", signal.SIGUSR2: "failing"}


class _Receiver:
    def __init__(self, keys: Path | None) -> None:
        self.mood = "well"
        self._lock, self._keys = threading.Lock(), keys
        self._known = set(keys.read_text().splitlines()) if keys and keys.exists() else set()
        for number in _MOODS if keys else ():
            signal.signal(number, self._change)

    def accept(self, key: str) -> None:
        with self._lock:
            again = key in self._known
            self._known.add(key)
            if self._keys and not again:
                # Before it is printed: what was printed must be known after a kill.
                with self._keys.open("a") as file:
                    file.write(f"{key}\n")
            print(f"again {key}" if again else key, flush=True)

    def _change(self, number: int, _frame: object) -> None:
        self.mood = _MOODS[signal.Signals(number)]


class _Handler(BaseHTTPRequestHandler):
    receiver: _Receiver

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        failing = self.receiver.mood == "failing"
        if not failing:
            self.receiver.accept(self.headers["Idempotency-Key"])
        if self.receiver.mood == "slow":
            time.sleep(_SLOW_S)
        with suppress(OSError):  # The caller may have been killed meanwhile.
            self.send_response(500 if failing else 204)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512  # A service's calls come all at once.


if __name__ == "__main__":
    host, port, *keys = sys.argv[1:]
    _Handler.receiver = _Receiver(Path(keys[0]) if keys else None)
    _Server((host, int(port)), _Handler).serve_forever()
