"""What is measured: each subject is a queue, the process that consumes it, and what it records."""

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.process import Child
from harness.servers import REPOSITORY, Servers
from harness.services import environment
from idempotent_consumer import Settings
from idempotent_consumer.bus import COMMITS_IN_FLIGHT, declare

from .calls import HandlerKind, Scenario
from .loading import Mix

LARGE = {"ETCD_MAX_TXN_OPS": "1024", "BATCH_SIZE": "512"}
"""What the compose files set."""
SMALL = {"ETCD_MAX_TXN_OPS": "128", "BATCH_SIZE": "128"}
"""What etcd allows unless told otherwise, and the services' own defaults."""

NAIVE_PREFETCH = 100
"""One event is in hand at a time: more would only fill the outer tenths, which do not count."""

CEILING, NAIVE, BARE, BARE_SMALL, ORDER, ORDER_SMALL, HALF, DUPLICATES = (
    "ceiling: pika alone",
    "naive: one txn, one ack each",
    "library, no effect, 1024/512",
    "library, no effect, 128/128",
    "order, one effect, 1024/512",
    "order, one effect, 128/128",
    "half duplicates",
    "duplicates, cache warm",
)

BATCH_SIZES = (16, 32, 64, 128, 256, 512)
"""Of the sweep. With one effect, 512 events fill etcd's 1,024 operations."""

_CLAIMED = {
    HandlerKind.COROUTINE: ("notify", ("notify",), REPOSITORY / "notify"),
    HandlerKind.PLAIN: ("plain", ("benchmarks.consumers.plain",), REPOSITORY),
}
"""A handler's queue, process and directory."""

_STOP_WITHIN_S = 15.0


@dataclass(frozen=True)
class Subject:
    """One consumer.

    It gets one of `one_in` of the events that a run has, in series that are made as `mix` says.
    `records` are the key prefixes below which each event leaves one key. `prefetch` is how many
    deliveries it has in hand.
    """

    name: str
    queue: str
    arguments: tuple[str, ...]
    directory: Path
    settings: Mapping[str, str]
    prefetch: int
    records: tuple[str, ...] = ()
    is_service: bool = True
    one_in: int = 1
    mix: Mix = Mix.FRESH

    def declare(self, channel: Any) -> None:
        """Declare its queue, a service's exactly as the service does."""
        if self.is_service:
            declare(channel, self.queue, Settings().retry_delays)
        else:
            channel.queue_declare(self.queue, durable=True, arguments={"x-queue-type": "quorum"})

    @contextmanager
    def process(self) -> Iterator[Child]:
        """Give its process, not started; it is ended afterwards.

        No setting of the calling shell reaches it.
        """
        with tempfile.TemporaryDirectory(prefix="benchmark-") as logs:
            child = Child(
                [sys.executable, "-m", *self.arguments],
                env={**environment(), **self.settings},
                cwd=self.directory,
                log=Path(logs) / f"{self.queue}.log",
            )
            try:
                yield child
            finally:
                if child.running:
                    child.terminate(_STOP_WITHIN_S)


def bare(servers: Servers, settings: Mapping[str, str], *, mix: Mix = Mix.FRESH) -> Subject:
    """Return the library with a handler that has no effect."""
    return Subject(
        name=HALF if mix is Mix.SHUFFLED else bare_name(settings),
        queue="bare",
        arguments=("benchmarks.consumers.bare",),
        directory=REPOSITORY,
        settings=_service_settings(servers, settings),
        prefetch=prefetch(settings),
        records=("/service/bare/",),
        mix=mix,
    )


def order(servers: Servers, settings: Mapping[str, str]) -> Subject:
    """Return the order service as it is deployed: one effect for each event."""
    return Subject(
        name=order_name(settings),
        queue="order",
        arguments=("order",),
        directory=REPOSITORY / "order",
        settings=_service_settings(servers, settings),
        prefetch=prefetch(settings),
        records=("/service/order/", "/orders/"),
    )


def claimed(
    servers: Servers, statsd: Mapping[str, str], sink_url: str, scenario: Scenario
) -> Subject:
    """Return a service that makes an HTTP call for each event, under a claim."""
    queue, arguments, directory = _CLAIMED[scenario.kind]
    settings = {
        **LARGE,
        **statsd,
        "CALLS_AT_ONCE": str(scenario.at_once),
        "NOTIFY_URL": scenario.url(sink_url),
    }
    return Subject(
        name=scenario.name,
        queue=queue,
        arguments=arguments,
        directory=directory,
        settings=_service_settings(servers, settings),
        prefetch=prefetch(settings),
        records=(f"/service/{queue}/",),
    )


def ceiling(servers: Servers) -> Subject:
    """Return pika alone, with the library's prefetch."""
    deliveries = prefetch(LARGE)
    return _reference(
        CEILING, "ceiling", deliveries, servers.rabbitmq.url, "ceiling", str(deliveries)
    )


def compared(servers: Servers, statsd: Mapping[str, str]) -> list[Subject]:
    """Return the library in its services, which count to `statsd`, and the ways without it."""
    large, small = {**LARGE, **statsd}, {**SMALL, **statsd}
    url, etcd = servers.rabbitmq.url, servers.etcd.endpoint
    return [
        ceiling(servers),
        _reference(
            NAIVE,
            "naive",
            NAIVE_PREFETCH,
            url,
            "naive",
            str(NAIVE_PREFETCH),
            etcd,
            records=("/service/naive/",),
            one_in=20,
        ),
        bare(servers, large, mix=Mix.REPEATED),
        bare(servers, small),
        order(servers, large),
        order(servers, small),
        bare(servers, large, mix=Mix.SHUFFLED),
    ]


def sweep(servers: Servers, statsd: Mapping[str, str]) -> list[Subject]:
    """Return the library at each batch size without and with an effect, and the ceiling."""
    return [
        ceiling(servers),
        *(
            make(servers, {**sized(size), **statsd})
            for size in BATCH_SIZES
            for make in (bare, order)
        ),
    ]


def sized(batch_size: int) -> dict[str, str]:
    """Return the settings of one point of the sweep."""
    return {**LARGE, "BATCH_SIZE": str(batch_size)}


def bare_name(settings: Mapping[str, str]) -> str:
    """Return the name that the library without an effect has with these settings."""
    return "library, no effect, {ETCD_MAX_TXN_OPS}/{BATCH_SIZE}".format_map(settings)


def order_name(settings: Mapping[str, str]) -> str:
    """Return the name that order has with these settings."""
    return "order, one effect, {ETCD_MAX_TXN_OPS}/{BATCH_SIZE}".format_map(settings)


def _reference(
    name: str,
    module: str,
    prefetch: int,
    *arguments: str,
    records: tuple[str, ...] = (),
    one_in: int = 1,
) -> Subject:
    return Subject(
        name=name,
        queue=arguments[1],
        arguments=(f"benchmarks.consumers.{module}", *arguments),
        directory=REPOSITORY,
        settings={},
        prefetch=prefetch,
        records=records,
        is_service=False,
        one_in=one_in,
    )


def prefetch(settings: Mapping[str, str]) -> int:
    """Return how many deliveries a service with these settings has in hand."""
    return 2 * COMMITS_IN_FLIGHT * int(settings["BATCH_SIZE"])


def _service_settings(servers: Servers, settings: Mapping[str, str]) -> dict[str, str]:
    return {**servers.settings(), "ENABLE_ETCD": "true", "LOG_FORMAT": "json", **settings}
