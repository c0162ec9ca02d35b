"""A statsd listener: what Graphite would have counted, without Graphite."""

import socket
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_LARGEST_PACKET = 65_535
_RECEIVE_BUFFER = 8 << 20


class Counters(Protocol):
    """Reads counters, from a listener or from Graphite."""

    def count(self, name: str) -> int:
        """Return the sum of a counter so far; 0 for one never seen."""

    def seen(self, name: str) -> bool:
        """Return whether the counter has shown up at all, be it as 0."""


class StatsdListener:
    """Sums the counters and keeps the timers that come in over UDP on 127.0.0.1.

    Names are as sent, prefix included. Made by `listen_statsd`.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        # The kernel drops what does not fit, and grants less than asked where it must.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        self._socket.bind(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._counters: defaultdict[str, float] = defaultdict(float)
        self._timers_ms: defaultdict[str, list[float]] = defaultdict(list)
        self._thread = threading.Thread(target=self._receive, name="statsd", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The UDP port."""
        port: int = self._socket.getsockname()[1]
        return port

    def settings(self) -> dict[str, str]:
        """Return the contract's variables that lead a service here."""
        return {"STATSD_HOST": "127.0.0.1", "STATSD_PORT": str(self.port)}

    def count(self, name: str) -> int:
        """Return the sum of a counter so far; 0 for one never seen."""
        with self._lock:
            return round(self._counters.get(name, 0))

    def seen(self, name: str) -> bool:
        """Return whether the counter has shown up at all, be it as 0."""
        with self._lock:
            return name in self._counters

    def counts(self) -> dict[str, int]:
        """Return all counters seen so far."""
        with self._lock:
            return {name: round(value) for name, value in self._counters.items()}

    def timers_ms(self, name: str) -> list[float]:
        """Return a timer's values so far, in milliseconds, in order of arrival."""
        with self._lock:
            return list(self._timers_ms.get(name, ()))

    def reset(self) -> None:
        """Forget everything."""
        with self._lock:
            self._counters.clear()
            self._timers_ms.clear()

    def close(self) -> None:
        """Stop listening."""
        # An empty packet wakes the thread: closing a socket does not wake its reader.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as waker:
            waker.sendto(b"", ("127.0.0.1", self.port))
        self._thread.join()
        self._socket.close()

    def _receive(self) -> None:
        while packet := self._socket.recv(_LARGEST_PACKET):
            for line in packet.decode(errors="replace").splitlines():
                self._take(line)

    def _take(self, line: str) -> None:
        """Take `name:value|type` with an optional `|@rate`; anything else is passed over."""
        name, _, rest = line.partition(":")
        value, *kind = rest.split("|")
        try:
            number = float(value)
            rate = float(kind[1][1:]) if len(kind) > 1 and kind[1].startswith("@") else 1.0
        except ValueError:
            return
        with self._lock:
            if kind[:1] == ["c"]:
                self._counters[name] += number / rate
            elif kind[:1] == ["ms"]:
                self._timers_ms[name].append(number)


@contextmanager
def listen_statsd() -> Iterator[StatsdListener]:
    """Listen on a free port for as long as the block runs."""
    listener = StatsdListener()
    try:
        yield listener
    finally:
        listener.close()
