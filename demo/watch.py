"""Sample the counters and the queues of the stage twice a second during the play."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Self

from demo.play import NOUNS
from demo.stage import NO_ANSWER, SERVICES, Stage

_EVERY_S = 0.5
_LAST_WITHIN_S = 2.0


class Reading(NamedTuple):
    """What was read of one service. None: it could not be read."""

    processed: int | None
    skipped: int | None
    waiting: int | None
    """The ready messages of its queue."""
    open: int | None
    """How many of its circuit breakers are open."""


class Sample(NamedTuple):
    """The readings of one time (Unix time in seconds), by service."""

    at: float
    services: Mapping[str, Reading]


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
            readings = {service: self._read(service) for service in SERVICES}
            self.samples.append(Sample(time.time(), readings))

    def _read(self, service: str) -> Reading:
        counters, noun = self._stage.counters, NOUNS[service]
        return Reading(
            processed=_answer(counters.count, f"{noun}_processed"),
            skipped=_answer(counters.count, f"{noun}_processed_skipped"),
            waiting=_answer(self._stage.broker.waiting, service),
            open=_answer(counters.gauge, f"{noun}_breaker_open"),
        )

    def _run(self) -> None:
        last = False
        while not last:
            last = self._ended.wait(_EVERY_S if self.samples else 0)
            self.look()


def _answer(ask: Callable[[str], int], name: str) -> int | None:
    try:
        return ask(name)
    except NO_ANSWER:
        return None
