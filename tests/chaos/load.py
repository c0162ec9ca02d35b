"""Events to publish: a list, or a stream that lasts as long as a fault does."""

import random
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from itertools import count
from typing import Self

from servers.broker import Broker, Event

_A_DAY_S = 86_400.0


def order(id_: str, **args: object) -> Event:
    """Return an event that both services handle."""
    return {"id": id_, "type": "new_order", "args": args}


def orders(number: int, prefix: str = "order") -> list[Event]:
    return [order(f"{prefix}-{index}", number=index) for index in range(number)]


def repeated(events: list[Event], times: int) -> list[Event]:
    """Return each event several times, shuffled: some copies are close together, some far apart."""
    copies = events * times
    random.Random(times).shuffle(copies)
    return copies


def ids(events: Iterable[Event]) -> set[str]:
    return {event["id"] for event in events}


class Load:
    """Publishes a stream of events, a third of them duplicates, until `finish`.

    It is a context manager, so that a failing test leaves no publisher behind.
    """

    def __init__(self, broker: Broker, rate_per_s: float, seed: int = 1) -> None:
        self.sent: list[Event] = []
        self._ending = threading.Event()
        self._random = random.Random(seed)
        self._confirmed: Future[list[Event]] = Future()

        def publish() -> None:
            stream = self._stream()
            try:
                confirmed = broker.publish(stream, rate_per_s=rate_per_s, timeout_s=_A_DAY_S)
            except BaseException as error:  # noqa: BLE001 - `finish` raises it.
                self._confirmed.set_exception(error)
            else:
                self._confirmed.set_result(confirmed)

        # A daemon: if a test fails while the broker is down, the thread does not delay the exit.
        threading.Thread(target=publish, name="load", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()

    @property
    def running(self) -> bool:
        """Whether it still publishes, and has not failed."""
        return not self._confirmed.done()

    def finish(self) -> list[Event]:
        """End the stream and return the confirmed events; raises TimeoutError."""
        self._ending.set()
        return self._confirmed.result(timeout=90)

    def _stream(self) -> Iterator[Event]:
        for number in count():
            for event in self._next(number):
                if self._ending.is_set():
                    return
                self.sent.append(event)
                yield event

    def _next(self, number: int) -> list[Event]:
        new = order(f"load-{number}", number=number)
        if number % 2 or not self.sent:
            return [new]
        return [new, self._random.choice(self.sent[-400:])]
