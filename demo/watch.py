"""Sample the counters and the queues of the stage twice a second during the play."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

from demo.play import BREAKERS, COUNTERS
from demo.stage import NO_ANSWER, SERVICES, Stage

_EVERY_S = 0.5
_LAST_WITHIN_S = 2.0


@dataclass(frozen=True)
class Sample:
    """What was read at one time (Unix time in seconds). None: it could not be read."""

    at: float
    counts: Mapping[str, int | None]
    """By counter."""
    waiting: Mapping[str, int | None]
    """By service: the ready messages of its queue."""
    breakers: Mapping[str, int | None]
    """By service: how many of its circuit breakers are open."""


class Watch:
    """The samples, oldest first. A thread takes them while the block runs, and one at its end."""

    def __init__(self, stage: Stage) -> None:
        self.samples: list[Sample] = []
        self._stage = stage
        self._ended, self._looking = threading.Event(), threading.Lock()
        # A daemon: a server that does not answer delays it for seconds, which the demo must not.
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(_LAST_WITHIN_S)

    def look(self) -> None:
        """Take a sample now, so that the end of an act is seen before the next begins."""
        # One at a time: otherwise the samples could get out of order.
        with self._looking:
            broker, counters = self._stage.broker, self._stage.counters
            counts = {counter: _read(counters.count, counter) for counter in COUNTERS}
            waiting = {service: _read(broker.waiting, service) for service in SERVICES}
            breakers = {name: _read(counters.gauge, gauge) for name, gauge in BREAKERS.items()}
            self.samples.append(Sample(time.time(), counts, waiting, breakers))

    def _run(self) -> None:
        last = False
        while not last:
            last = self._ended.wait(_EVERY_S if self.samples else 0)
            self.look()


def _read(ask: Callable[[str], int], name: str) -> int | None:
    try:
        return ask(name)
    except NO_ANSWER:
        return None
