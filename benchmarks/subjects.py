"""What is measured: the consumers, the calls and the publishers, with their names in tables."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

from idempotent_consumer.bus import prefetch
from servers.servers import REPOSITORY

LARGE = {"ETCD_MAX_TXN_OPS": "1024", "BATCH_SIZE": "512"}
"""What the compose files set."""
SMALL = {"ETCD_MAX_TXN_OPS": "128", "BATCH_SIZE": "128"}
"""What etcd allows unless told otherwise, and the services' own defaults."""

_OF_REPOSITORY = ("order", "notify")


class Mix(Enum):
    """How a series is made of events.

    A repeated series comes a second time behind itself: the second consists of duplicates of
    what the same process has just recorded, so the cache is as warm as can be, with no restart
    and no import in between. In a shuffled one each event comes twice, in an order that is the
    same in each run.
    """

    FRESH = "each once"
    REPEATED = "the whole series twice"
    SHUFFLED = "each twice, shuffled"


@dataclass(frozen=True)
class Subject:
    """One consumer, a service where it has settings. It gets one of `one_in` of a run's events."""

    name: str
    queue: str
    prefetch: int
    settings: Mapping[str, str] = field(default_factory=dict)
    one_in: int = 1
    mix: Mix = Mix.FRESH

    @property
    def command(self) -> tuple[str, ...]:
        """Its module and arguments."""
        if self.queue in _OF_REPOSITORY:
            return (self.queue,)
        arguments = () if self.settings else (str(self.prefetch),)
        return ("benchmarks.consumers", self.queue, *arguments)

    @property
    def directory(self) -> Path:
        """Where it is run."""
        return REPOSITORY / self.queue if self.queue in _OF_REPOSITORY else REPOSITORY

    @property
    def records(self) -> tuple[str, ...]:
        """The key prefixes below which each event leaves one key."""
        effects = ("/orders/",) if self.queue == "order" else ()
        return () if self.queue == "ceiling" else (f"/service/{self.queue}/", *effects)


def service(
    queue: str, settings: Mapping[str, str], mix: Mix = Mix.FRESH, name: str = ""
) -> Subject:
    """Return a service with these settings: `bare` has no effect, `order` one for each event."""
    what = {"bare": "library, no effect", "order": "order, one effect"}.get(queue)
    name = name or f"{what}, {settings['ETCD_MAX_TXN_OPS']}/{settings['BATCH_SIZE']}"
    return Subject(name, queue, prefetch(int(settings["BATCH_SIZE"])), settings, mix=mix)


CEILING = Subject("ceiling: pika alone", "ceiling", prefetch(512))
# One event is in hand at a time: a larger prefetch would only fill the outer tenths.
NAIVE = Subject("naive: one txn, one ack each", "naive", 100, one_in=20)
BARE, BARE_SMALL = service("bare", LARGE, Mix.REPEATED), service("bare", SMALL)
ORDER, ORDER_SMALL = service("order", LARGE), service("order", SMALL)
HALF = service("bare", LARGE, Mix.SHUFFLED, "half duplicates")
CONSUMERS = (CEILING, NAIVE, BARE, BARE_SMALL, ORDER, ORDER_SMALL, HALF)
DUPLICATES = "duplicates, cache warm"
"""The second series of those that are repeated."""

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
        """The subject that makes these calls for events."""
        return f"{self.kind}, {self.answer_ms} ms, {self.at_once:,} at once"

    @property
    def alone(self) -> str:
        """The client that makes them for nobody."""
        return f"{self.name}, client alone"

    @property
    def most_per_s(self) -> float | None:
        """What the slots allow; None where the receiver answers at once."""
        return 1000 * self.at_once / self.answer_ms if self.answer_ms else None

    def subject(self, receiver_url: str) -> Subject:
        """Return the service that makes them, under a claim."""
        url = f"{receiver_url}/{self.answer_ms}"
        settings = {**LARGE, "CALLS_AT_ONCE": str(self.at_once), "NOTIFY_URL": url}
        queue = "notify" if self.kind == "coroutine" else "plain"
        return service(queue, settings, name=self.name)


_KINDS: tuple[Literal["coroutine", "plain"], ...] = ("coroutine", "plain")
CALLS = [
    Calls(kind, ms, at_once) for ms, kind, at_once in product((0, 10, 100), _KINDS, (100, 1000))
]
