"""The receiver of notify's calls: it accepts each notification and prints its key.

    python receiver.py HOST PORT [DIRECTORY]

It drops a call whose key it has accepted before, and prints "again" before the key. With a
directory, it remembers its keys after a restart and obeys the file `mood` in it: well, slow or
failing.
"""

import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_SLOW_S = 3.0


class _Receiver(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512  # A service's calls come all at once.

    def __init__(self, host: str, port: str, directory: str = "") -> None:
        super().__init__((host, int(port)), _Handler)
        self._lock, self._known = threading.Lock(), set[str]()
        self._keys, self._mood = Path(directory, "keys"), Path(directory, "mood")
        self._is_kept = bool(directory)
        if self._is_kept:
            Path(directory).mkdir(exist_ok=True)
            self._keys.touch()
            self._known.update(self._keys.read_text().splitlines())

    def mood(self) -> str:
        return self._mood.read_text().strip() if self._is_kept and self._mood.exists() else "well"

    def accept(self, key: str) -> None:
        with self._lock:
            again = key in self._known
            self._known.add(key)
            if self._is_kept and not again:
                # Before the print: a printed key must still be known after a kill.
                with self._keys.open("a") as file:
                    file.write(f"{key}\n")
            print(f"again {key}" if again else key, flush=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Receiver

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        mood = self.server.mood()
        if mood != "failing":
            self.server.accept(self.headers["Idempotency-Key"])
        if mood == "slow":
            time.sleep(_SLOW_S)
        with suppress(OSError):  # The caller may be gone.
            self.send_response(500 if mood == "failing" else 204)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    _Receiver(*sys.argv[1:]).serve_forever()
