"""The consumers that are measured, with their names in tables, and the series that they get."""

import random
from collections.abc import Mapping
from typing import Literal, NamedTuple

from idempotent_consumer.bus import prefetch

from .publishers import new_events

LARGE = {"ETCD_MAX_TXN_OPS": "1024", "BATCH_SIZE": "512"}
"""What the compose files set."""
SMALL = {"ETCD_MAX_TXN_OPS": "128", "BATCH_SIZE": "128"}
"""What etcd allows unless told otherwise, and the services' own defaults."""

Order = Literal["each once", "the whole series twice", "each twice, shuffled"]
"""How a series is made of events.

A series that comes twice consists, the second time, of duplicates of what the same process has just
recorded, so the cache is as warm as can be, with no restart and no import in between. A shuffled
one has the same order in each run.
"""

_SEED = 4


class Subject(NamedTuple):
    """One consumer, by its queue. It gets one of `one_in` of a run's events."""

    name: str
    queue: str
    settings: Mapping[str, str]
    order: Order = "each once"
    one_in: int = 1

    @property
    def command(self) -> tuple[str, ...]:
        """Its module and arguments."""
        is_ours = self.queue in ("order", "notify") and "HANDLER_MS" not in self.settings
        return (self.queue,) if is_ours else ("benchmarks.consumers", self.queue)

    @property
    def is_service(self) -> bool:
        """Whether it is made with the library."""
        return "BATCH_SIZE" in self.settings

    @property
    def prefetch(self) -> int:
        """How many deliveries it may have unacked."""
        if self.is_service:
            return prefetch(int(self.settings["BATCH_SIZE"]))
        return int(self.settings["PREFETCH"])

    @property
    def records(self) -> tuple[str, ...]:
        """The key prefixes below which each event leaves one key."""
        effects = ("/orders/",) if self.queue == "order" else ()
        return () if self.queue == "ceiling" else (f"/service/{self.queue}/", *effects)

    def series(self, length: int) -> tuple[list[bytes], int]:
        """Return the bodies to publish, and how many events they are; `length` is of one series."""
        if self.order == "each twice, shuffled":
            bodies = 2 * new_events(length // 2)
            random.Random(_SEED).shuffle(bodies)
            return bodies, length // 2
        bodies = new_events(length)
        return (2 * bodies if self.order == "the whole series twice" else bodies), length


def service(
    queue: str, settings: Mapping[str, str], order: Order = "each once", name: str = ""
) -> Subject:
    """Return a service with these settings: `bare` has no effect, `order` one for each event."""
    what = {"bare": "library, no effect", "order": "order, one effect"}.get(queue)
    name = name or f"{what}, {settings['ETCD_MAX_TXN_OPS']}/{settings['BATCH_SIZE']}"
    return Subject(name, queue, settings, order)


CEILING = Subject("ceiling: pika alone", "ceiling", {"PREFETCH": str(prefetch(512))})
# One event is in hand at a time: a larger prefetch would only fill the outer tenths.
NAIVE = Subject("naive: one txn, one ack each", "naive", {"PREFETCH": "100"}, one_in=20)
BARE, BARE_SMALL = service("bare", LARGE, "the whole series twice"), service("bare", SMALL)
ORDER, ORDER_SMALL = service("order", LARGE), service("order", SMALL)
HALF = service("bare", LARGE, "each twice, shuffled", "half duplicates")
CONSUMERS = (CEILING, NAIVE, BARE, BARE_SMALL, ORDER, ORDER_SMALL, HALF)
DUPLICATES = "duplicates, cache warm"
"""The second series of those that come twice."""

SWEEP = {
    size: [service(queue, {**LARGE, "BATCH_SIZE": str(size)}) for queue in ("bare", "order")]
    for size in (16, 32, 64, 128, 256, 512)
}
"""By batch size, without and with an effect: with one, 512 events fill etcd's 1,024 operations."""

LEAST_EVENTS = 4 * prefetch(max(SWEEP))
"""The first prefetch window does not count, nor do the outer tenths: half of it has to be left."""

UNCONFIRMED, CONFIRMED = "pika without confirms", "library, all confirmed"
PUBLISHERS = {UNCONFIRMED: "unconfirmed", CONFIRMED: "library"}
"""Their commands in `publishers`."""


class Calls(NamedTuple):
    """Calls to a receiver that answers after `answer_ms`, so many at once.

    The handler is `notify`, a coroutine that has aiohttp, or a plain one that has urllib3.
    """

    kind: Literal["coroutine", "plain"]
    answer_ms: int
    at_once: int

    @property
    def name(self) -> str:
        """Its row."""
        return f"{self.kind}, {self.answer_ms} ms, {self.at_once:,} at once"

    def subject(self, receiver_url: str) -> Subject:
        """Return the service that makes them, under a claim."""
        url = f"{receiver_url}/{self.answer_ms}"
        settings = {**LARGE, "CALLS_AT_ONCE": str(self.at_once), "NOTIFY_URL": url}
        queue = "notify" if self.kind == "coroutine" else "plain"
        return service(queue, settings, name=self.name)


CALLS = [
    Calls(kind, answer_ms, at_once)
    for answer_ms in (0, 10, 100)
    for kind in ("coroutine", "plain")
    for at_once in (100, 1000)
]
