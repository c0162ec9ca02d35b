"""A run: its servers, what is started on them, what is read from them, and its rounds.

How fast a consumer works is seen from the broker. A passive declare tells the exact count of ready
messages (the management API's is seconds old). While a consumer's prefetch window is full, each ack
lets one more message out, so the count falls as fast as acks arrive: the same measure for all, with
nothing added to any of them.
"""

import json
import os
import platform
import queue
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import etcd3

from chaos.checks import becomes
from idempotent_consumer import Settings
from idempotent_consumer.bus import Topology, prefetch
from servers.broker import Broker
from servers.counters import StatsdListener
from servers.etcd import EtcdClient, record_prefix
from servers.processes import cpu_s, run_tool
from servers.servers import Servers
from servers.services import Service, run_service
from servers.web import fetch_json, open_json

from .programs import firehose

LOST_AFTER_S = 60.0
_LOOK_EVERY_S, _STALLED_LOOKS = 0.01, 3_000
_ANSWER_S = 60.0  # etcd takes a while to delete a million records, or to compact them.
# -P: modules are found where they are installed, whatever lies in the working directory.
_PYTHON = (sys.executable, "-P", "-m")
_PACKAGES = ("pika", "cslab-etcd3", "grpcio", "protobuf", "orjson")
_TXN = 'grpc_method="Txn",grpc_service="etcdserverpb.KV",grpc_type="unary"'
GAUGES = {
    # Its resident size, which includes what it has mapped of its file.
    "etcd MB": ("process_resident_memory_bytes", 1e-6),
    "file MB": ("etcd_mvcc_db_total_size_in_bytes", 1e-6),
    "in use MB": ("etcd_mvcc_db_total_size_in_use_in_bytes", 1e-6),
    "records": ("etcd_debugging_mvcc_keys_total", 1),
    # Totals since its start.
    "granted": ("etcd_debugging_lease_granted_total", 1),
    "revoked": ("etcd_debugging_lease_revoked_total", 1),
    "written": ("etcd_mvcc_put_total", 1),
    "transactions": (f"grpc_server_started_total{{{_TXN}}}", 1),
}


class Subject(NamedTuple):
    """A consumer: its name in tables, the program or service and its queue, and its settings."""

    name: str
    queue: str
    settings: Mapping[str, str] = {}

    @property
    def prefetch(self) -> int:
        return int(self.settings.get("PREFETCH") or prefetch(int(self.settings["BATCH_SIZE"])))


def service(queue: str, batch_size: int = 512, operations: int = 1024) -> Subject:
    """Return a service, set as in the compose files: `bare` has no effect, `order` has one."""
    name = {"bare": "library, no effect", "order": "order, one effect"}[queue]
    settings = {"ETCD_MAX_TXN_OPS": str(operations), "BATCH_SIZE": str(batch_size)}
    return Subject(f"{name}, {operations}/{batch_size}", queue, settings)


BARE = service("bare")
RECORDS = record_prefix(BARE.queue)


class Site:
    """The servers, what listens for the services' metrics, and etcd3's own client."""

    def __init__(self, servers: Servers) -> None:
        self.servers, self.statsd = servers, StatsdListener()
        self.url, self.broker = servers.rabbitmq.url, Broker(servers.rabbitmq)
        self.keys = EtcdClient(servers.etcd.endpoint, _ANSWER_S)
        host, port = servers.etcd.endpoint.rsplit(":", 1)
        self.etcd: Any = etcd3.client(host=host, port=int(port), timeout=_ANSWER_S)

    def close(self) -> None:
        self.etcd.close()
        self.statsd.close()

    def publish(self, queue: str, bodies: Sequence[bytes], *, preload: bool = False) -> None:
        """Publish without confirms; to `preload` waits until the queue holds everything."""
        with firehose(self.url, queue) as publish:
            publish(bodies)
        if preload:
            becomes(partial(self.broker.ready, queue), len(bodies))

    def wait_recorded(self, subject: Subject, events: int, within_s: float = LOST_AFTER_S) -> None:
        becomes(partial(self.keys.count, record_prefix(subject.queue)), events, within_s)

    def run(self, subject: Subject) -> AbstractContextManager[Service]:
        servers = {**self.servers.settings(), **self.statsd.settings(), "ENABLE_ETCD": "true"}
        is_service = subject.queue in ("order", "notify")
        command = [subject.queue] if is_service else ["benchmarks.programs", subject.queue]
        settings = {**servers, **subject.settings}
        return run_service("benchmarks", settings, command=[*_PYTHON, *command])

    @contextmanager
    def queue(self, subject: Subject) -> Iterator[Any]:
        """Give a channel on which a consumer's queue, like a service's, is there for the block."""
        # No heartbeats: between two questions nobody would send them.
        with self.broker.channel(heartbeat=0) as channel:
            Topology(subject.queue, retry_delays=Settings().retry_delays).declare(channel)
            yield channel
        self.broker.delete_queues(subject.queue)

    def clear(self, prefix: str = "") -> None:
        """Delete everything below a prefix, and the history of all."""
        # Where nothing is new, etcd refuses to compact once more.
        if self.keys.count(prefix or "/"):
            revision = self.keys.delete(prefix)
            # --physical waits until the space is given back, which would slow the next run down.
            timeout = f"--command-timeout={_ANSWER_S:g}s"
            self.servers.etcd.ctl("compact", "--physical", timeout, str(revision))

    @contextmanager
    def watch(self, prefix: str) -> Iterator[Callable[[], tuple[str, float]]]:
        """Give what waits for the next change below a prefix: its key, and the time.monotonic()."""
        seen: queue.SimpleQueue[tuple[str, float]] = queue.SimpleQueue()

        def changed(answer: Any) -> None:
            at_s = time.monotonic()
            for event in answer.events:
                seen.put((event.key.decode(), at_s))

        def following() -> tuple[str, float]:
            try:
                return seen.get(timeout=LOST_AFTER_S)
            except queue.Empty:
                raise AssertionError(f"no record for {LOST_AFTER_S:g} s") from None

        watch_id = self.etcd.add_watch_prefix_callback(prefix, changed)
        try:
            yield following
        finally:
            self.etcd.cancel_watch(watch_id)

    def gauges(self) -> dict[str, float]:
        """Read what etcd says of itself; raises OSError."""
        with open_json("GET", f"http://{self.servers.etcd.endpoint}/metrics") as page:
            return gauges_of(page.read().decode())

    def machine(self) -> str:
        broker: Any = self.servers.rabbitmq.management("GET", "/api/overview")
        etcd = fetch_json("GET", f"http://{self.servers.etcd.endpoint}/version")["etcdserver"]
        cpus = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        servers = "containers" if self.servers.kind == "docker" else "processes"
        packages = ", ".join(f"{package} {version(package)}" for package in _PACKAGES)
        return (
            f"cores {len(os.sched_getaffinity(0))}, processor {(cpus or [platform.machine()])[0]}, "
            f"load before {os.getloadavg()[0]:.2f}, "
            f"system {platform.system()} {platform.release()}, servers {servers}, "
            f"rabbitmq {broker['rabbitmq_version']} (Erlang {broker['erlang_version']}), "
            f"etcd {etcd}, python {platform.python_version()}, {packages}"
        )


def gauges_of(page: str) -> dict[str, float]:
    """Read etcd's metrics page; raises KeyError if one of them is not there."""
    lines = (line.rpartition(" ") for line in page.splitlines() if not line.startswith("#"))
    values = {name: float(value) for name, _, value in lines if name}
    found = {ours: unit * values[name] for ours, (name, unit) in GAUGES.items()}
    return {**found, "leases": found["granted"] - found["revoked"]}


def outcome(*command: object) -> Any:
    """Run a program to its end, and return the JSON that it prints; raises CommandFailedError."""
    return json.loads(run_tool([*_PYTHON, "benchmarks.programs", *map(str, command)]))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


Figures = dict[str, dict[str, Any]]
"""What was measured once, by row and column."""
Run = Callable[[], Figures]


def in_rounds(site: Site, rounds: int, runs: Sequence[Run]) -> dict[str, dict[str, list[Any]]]:
    """Run everything once a round, so that all meet the same machine, and empty etcd in between.

    Each round begins with another run, so that none always meets what another leaves behind.
    """
    table: dict[str, dict[str, list[Any]]] = {}
    for number in range(rounds):
        turn = number % len(runs)
        for run in (*runs[turn:], *runs[:turn]):
            for row, figures in run().items():
                for column, value in figures.items():
                    table.setdefault(row, {}).setdefault(column, []).append(value)
                told = (f"{v:,.6g} {name}" for name, v in figures.items() if isinstance(v, float))
                say(f"round {number + 1} of {rounds}: {row}: {', '.join(told)}")
            site.clear()
    return table


class Progress(NamedTuple):
    """How many messages were ready at a time, and what CPU time the consumer had used."""

    at_s: float
    ready: int
    cpu_s: float


def follow(channel: Any, queue: str, child: Service) -> list[Progress]:
    """Watch a queue until it is empty; raises AssertionError if its consumer ends or stalls."""
    seen: list[Progress] = []
    while not seen or seen[-1].ready:
        ready: int = channel.queue_declare(queue, passive=True).method.message_count
        stalled = len(seen) > _STALLED_LOOKS and seen[-_STALLED_LOOKS].ready == ready
        if stalled or not child.running:
            what = "stalled" if child.running else "its consumer ended"
            raise AssertionError(f"{queue}: {what} at {ready}:\n{child.output()[-2000:]}")
        seen.append(Progress(time.perf_counter(), ready, cpu_s(child.pid)))
        time.sleep(_LOOK_EVERY_S)
    return seen


def rate(
    seen: Sequence[Progress], events: int, behind: int = 0, prefetch: int = 0
) -> dict[str, float]:
    """Return the rate over a series of `events`, with `behind` more messages queued behind it.

    The outer tenths are left out: in the first the process starts and its window fills (`prefetch`
    events leave the queue before the first ack), in the last it empties. From the first fall inside
    to the last: a consumer that acks hundreds at a time makes a staircase of exact edges.
    """
    trim = events // 10
    most, least = behind + events - max(trim, prefetch), behind + trim
    falls = [now for before, now in pairwise(seen) if now.ready != before.ready]
    inside = [now for now in falls if least <= now.ready < most]
    if len(inside) < 2:
        raise AssertionError("too few events to measure: raise --events")
    first, last = inside[0], inside[-1]
    done = first.ready - last.ready
    cpu_us = (last.cpu_s - first.cpu_s) / done * 1e6
    return {"events/s": done / (last.at_s - first.at_s), "CPU µs an event": cpu_us}
