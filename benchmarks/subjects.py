"""What is measured: each subject is a queue, the process that consumes it, and what it records."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.process import Child
from harness.servers import REPOSITORY, Servers
from harness.services import CONTRACT_VARIABLES
from idempotent_consumer import Settings
from idempotent_consumer.bus import topology
from idempotent_consumer.bus.bus import COMMITS_IN_FLIGHT

LARGE = {"ETCD_MAX_TXN_OPS": "1024", "BATCH_SIZE": "256"}
"""What the compose files set."""
SMALL = {"ETCD_MAX_TXN_OPS": "128", "BATCH_SIZE": "128"}
"""What etcd allows unless told otherwise, and the services' own defaults."""

PREFETCH = 2 * COMMITS_IN_FLIGHT * int(LARGE["BATCH_SIZE"])
"""The library's, so that the ceiling has the same."""

NAIVE_PREFETCH = 100
"""One event is in hand at a time: more would only fill the outer tenths, which do not count."""

CEILING, NAIVE, BARE, BARE_SMALL, ORDER, ORDER_SMALL, DUPLICATES = (
    "ceiling: pika alone",
    "naive: one txn, one ack each",
    "library, no effect, 1024/256",
    "library, no effect, 128/128",
    "order, one effect, 1024/256",
    "order, one effect, 128/128",
    "duplicates, cache warm",
)


@dataclass(frozen=True)
class Subject:
    """One consumer.

    It gets a twentieth of the events if it is `slow`. If it is `repeated` it gets them twice, one
    whole series after the other, so the second consists of duplicates that it has just recorded
    itself: the warmest cache there is, with no restart and no import in between. `records` are
    the key prefixes below which each event leaves one key.
    """

    name: str
    queue: str
    arguments: tuple[str, ...]
    directory: Path
    settings: Mapping[str, str]
    records: tuple[str, ...] = ()
    is_service: bool = True
    slow: bool = False
    repeated: bool = False

    def declare(self, channel: Any) -> None:
        """Declare its queue, a service's exactly as the service does."""
        if self.is_service:
            topology.declare(channel, self.queue, Settings().retry_delays)
        else:
            channel.queue_declare(self.queue, durable=True, arguments={"x-queue-type": "quorum"})

    def child(self, log_directory: Path) -> Child:
        """Return its process, not started; no setting of the calling shell reaches it."""
        inherited = {k: v for k, v in os.environ.items() if k not in CONTRACT_VARIABLES}
        return Child(
            [sys.executable, "-m", *self.arguments],
            env={**inherited, **self.settings},
            cwd=self.directory,
            log=log_directory / f"{self.queue}.log",
        )


def bare(servers: Servers, settings: Mapping[str, str], *, repeated: bool = False) -> Subject:
    """Return the library with a handler that has no effect."""
    return Subject(
        name=BARE if settings["BATCH_SIZE"] == LARGE["BATCH_SIZE"] else BARE_SMALL,
        queue="bare",
        arguments=("benchmarks.consumers.bare",),
        directory=REPOSITORY,
        settings=_service_settings(servers, settings),
        records=("/service/bare/",),
        repeated=repeated,
    )


def order(servers: Servers, settings: Mapping[str, str]) -> Subject:
    """Return the order service as it is deployed: one effect for each event."""
    return Subject(
        name=ORDER if settings["BATCH_SIZE"] == LARGE["BATCH_SIZE"] else ORDER_SMALL,
        queue="order",
        arguments=("order",),
        directory=REPOSITORY / "order",
        settings=_service_settings(servers, settings),
        records=("/service/order/", "/orders/"),
    )


def all_subjects(servers: Servers, statsd: Mapping[str, str]) -> list[Subject]:
    """Return every subject, in the order of the report; services count to `statsd`."""
    large, small = {**LARGE, **statsd}, {**SMALL, **statsd}
    url = servers.rabbitmq.url
    ceiling = Subject(
        name=CEILING,
        queue="ceiling",
        arguments=("benchmarks.consumers.ceiling", url, "ceiling", str(PREFETCH)),
        directory=REPOSITORY,
        settings={},
        is_service=False,
    )
    naive = Subject(
        name=NAIVE,
        queue="naive",
        arguments=(
            "benchmarks.consumers.naive", url, "naive", str(NAIVE_PREFETCH), servers.etcd.endpoint,
        ),
        directory=REPOSITORY,
        settings={},
        records=("/service/naive/",),
        is_service=False,
        slow=True,
    )
    return [
        ceiling,
        naive,
        bare(servers, large, repeated=True),
        bare(servers, small),
        order(servers, large),
        order(servers, small),
    ]


def _service_settings(servers: Servers, settings: Mapping[str, str]) -> dict[str, str]:
    return {**servers.settings(), "ENABLE_ETCD": "true", "LOG_FORMAT": "json", **settings}
