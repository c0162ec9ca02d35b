"""The scenarios: what is started, under which load, what is measured, and what it must reach."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from math import inf

from servers.servers import Servers, start_servers

from . import history, latency, subjects, throughput
from .figures import Mark, Table
from .sites import Site
from .throughput import BOUND, OF_BOUND, OF_CLIENT, OF_SLOTS, Asked


@dataclass(frozen=True)
class Scenario:
    """`measure` does what `about` says on the servers, and gives a table for each heading.

    The marks are of the last one. A round of `growth` is a start of the service at each size.
    """

    headings: tuple[str, ...]
    about: str
    measure: Callable[[Site, Asked], list[Table]]
    marks: tuple[Mark, ...] = ()
    rounds: int = 5
    events: int = 40_000
    servers: Callable[[], AbstractContextManager[Servers]] = start_servers


def _cluster() -> AbstractContextManager[Servers]:
    # Imported here: a machine without Docker has not all that this needs.
    from cluster.cluster import start_cluster

    return start_cluster()


# Each mark: its name, the row and the column of its figure, the row that this is divided by.
_rate = partial(Mark, column="events/s", kept=True)
_idle = partial(Mark, column="median, ms")
_above = partial(_rate, reference=subjects.CEILING.name)

_CONSUMED = (
    _above("durable, no effect / ceiling", subjects.BARE.name, at_least=0.60),
    _above("durable, one effect / ceiling", subjects.ORDER.name, at_least=0.50),
    _above("durable, no effect / ceiling, 128 operations", subjects.BARE_SMALL.name, at_least=0.45),
    _above(
        "durable, one effect / ceiling, 128 operations", subjects.ORDER_SMALL.name, at_least=0.35
    ),
    _above("half duplicates / ceiling", subjects.HALF.name),
    _above("all duplicates, cache warm / ceiling", subjects.DUPLICATES, at_least=0.70),
    _rate(
        "durable, no effect / naive", subjects.BARE.name, reference=subjects.NAIVE.name, at_least=25
    ),
)
_OF_CLIENT = (
    Mark(f"calls / client alone: {each.name}", each.name, OF_CLIENT, kept=True, at_least=least)
    for each in subjects.CALLS
    for least in (-inf if each.answer_ms else 0.40,)
)
_OF_SLOTS = (
    Mark(f"calls / what the slots allow: {each.name}", each.name, OF_SLOTS, kept=True)
    for each in subjects.CALLS
    if each.answer_ms
)
_OF_BOUND = (
    Mark(f"calls / {BOUND}: {each.name}", each.name, OF_BOUND, at_least=1)
    for each in subjects.CALLS
    if each.answer_ms == 100
)
_PUBLISHED = "confirmed publishing / pika without confirms"
_RECORDED, _BOTH = "publish to recorded", "bare: both"
_GROWN = {
    history.FIRST_RATIO: 1.5,
    "import, s": 5,
    history.MEMORY_OF_RECORD: 100,
    "transactions for duplicates": 0,
}
_STEADY = [f"{name}, {history.THIRDS}" for name in history.MEASURES]

SCENARIOS = {
    "consuming": Scenario(
        ("Consuming",),
        "A consumer works off a full queue: pika alone (the ceiling), a transaction and an ack for "
        "each event (the naive way), or a service. Its rate is that of its acks, the CPU time is "
        "of its process. The two numbers of a service are `ETCD_MAX_TXN_OPS` and `BATCH_SIZE`. Of "
        "duplicates, deliveries count.",
        throughput.consuming,
        _CONSUMED,
    ),
    "calls": Scenario(
        ("Calls",),
        "A service makes a call for each event, under its claim, to a receiver that answers after "
        "so long, at most `CALLS_AT_ONCE` at once. `notify` is the coroutine, on aiohttp; the "
        "plain handler runs on threads, on urllib3. The client alone makes the same calls without "
        "a broker and etcd, as many at once.",
        throughput.calling,
        (*_OF_CLIENT, *_OF_SLOTS, *_OF_BOUND),
    ),
    "publishing": Scenario(
        ("Publishing",),
        "The library's producer, or pika without confirms, publishes to an empty queue.",
        throughput.publishing,
        (_rate(_PUBLISHED, subjects.CONFIRMED, reference=subjects.UNCONFIRMED, at_least=0.60),),
    ),
    "idle": Scenario(
        ("Latency when idle",),
        "200 single events, one after the other: the time until a watch on etcd has brought the "
        "record, beside that of the steps that nobody can avoid.",
        latency.idle,
        (
            _idle(
                "bare steps / publish to recorded, idle, medians",
                _BOTH,
                reference=_RECORDED,
                kept=True,
            ),
            _idle(
                "publish to recorded, idle / bare steps, medians",
                _RECORDED,
                reference=_BOTH,
                at_most=1.4,
            ),
        ),
    ),
    "batches": Scenario(
        ("Batch size",),
        "Services work off a full queue with `ETCD_MAX_TXN_OPS=1024` and each `BATCH_SIZE`, "
        "without and with an effect, beside the ceiling; at most three rounds.",
        throughput.batches,
    ),
    "latency": Scenario(
        ("Latency by load",),
        "Events are due at so many per second, whatever becomes of those before. The time is from "
        "when an event is due until a watch on etcd has brought its record. A percentile is of all "
        "rounds together (least to greatest of the rounds, where each has the samples for its "
        "own). The publisher's own lateness, median, is part of it; if it did not keep the rate in "
        "some round, there is no percentile.",
        latency.latency,
    ),
    "growth": Scenario(
        ("By number of records",),
        "A service starts with so many records in etcd: the time to the first event, the import "
        "and what the records take; then it gets duplicates of them, and new events.",
        history.growth,
        tuple(
            Mark(f"{name}, with the most records", "", name, at_most=most)
            for name, most in _GROWN.items()
        ),
        rounds=7,
        events=60_000,
    ),
    "steady": Scenario(
        ("By minute", "After the load"),
        "A service with a window of 60 s and no effect works at full rate, and etcd compacts each "
        "minute, for so many minutes (less than nine are not judged); then until etcd is empty. "
        "Medians of each minute; of the oldest lease's age the most.",
        history.steady,
        (
            *(Mark(name, "", name, at_most=1.1) for name in _STEADY),
            Mark(history.RATE_THIRDS, "", history.RATE_THIRDS, at_least=0.9),
            Mark(history.OLDEST, "", history.OLDEST, at_most=15),
        ),
        rounds=1,
        events=0,
        servers=partial(start_servers, etcd_flags=history.COMPACTION),
    ),
    "replicas": Scenario(
        ("Replicas",),
        "On the cluster of three nodes each, 1, 2 and 3 replicas work off a backlog with a handler "
        "that waits for so long. A replica's core, its handler or the machine is the limit if it "
        "is in use nearly all of the time.",
        throughput.replicas,
        rounds=3,
        events=0,
        servers=_cluster,
    ),
}

BENCH = ("consuming", "calls", "publishing", "idle", "batches", "latency")
"""What `make bench` measures."""
CHECK = BENCH[:4]
"""What has ratios that are kept."""
