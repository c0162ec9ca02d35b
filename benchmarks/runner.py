"""A run: its servers, its consumers, its rounds, and how fast a consumer works.

The broker shows how fast a consumer works. A passive declare returns the exact number of ready
messages (the management API's is seconds old). While the prefetch window is full, each ack
lets one more message out, so the number falls as fast as acks arrive. This holds for any consumer,
and costs it nothing.
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
_ANSWER_S = 60.0  # Deleting or compacting a million records takes a while.
# -P: do not import modules from the working directory.
_PYTHON = (sys.executable, "-P", "-m")
_PACKAGES = ("pika", "cslab-etcd3", "grpcio", "protobuf", "orjson")
_TXN = 'grpc_method="Txn",grpc_service="etcdserverpb.KV",grpc_type="unary"'
GAUGES = {
    # Its resident size, including the mapped part of its file.
    "etcd MB": ("process_resident_memory_bytes", 1e-6),
    "file MB": ("etcd_mvcc_db_total_size_in_bytes", 1e-6),
    "in use MB": ("etcd_mvcc_db_total_size_in_use_in_bytes", 1e-6),
    "records": ("etcd_debugging_mvcc_keys_total", 1),
    # Totals since the start of etcd.
    "granted": ("etcd_debugging_lease_granted_total", 1),
    "revoked": ("etcd_debugging_lease_revoked_total", 1),
    "written": ("etcd_mvcc_put_total", 1),
    "transactions": (f"grpc_server_started_total{{{_TXN}}}", 1),
}


class Subject(NamedTuple):
    """A consumer: its name in tables, its program and queue of the same name, and its settings."""

    name: str
    queue: str
    settings: Mapping[str, str] = {}

    @property
    def prefetch(self) -> int:
        return int(self.settings.get("PREFETCH") or prefetch(int(self.settings["BATCH_SIZE"])))


def service(queue: str, batch_size: int = 512, operations: int = 1024) -> Subject:
    """Return a service with the compose files' settings: `bare` has no effect, `order` has one."""
    name = {"bare": "library, no effect", "order": "order, one effect"}[queue]
    settings = {"ETCD_MAX_TXN_OPS": str(operations), "BATCH_SIZE": str(batch_size)}
    return Subject(f"{name}, {operations}/{batch_size}", queue, settings)


BARE = service("bare")
RECORDS = record_prefix(BARE.queue)


class Site:
    """The servers, a listener for the services' metrics, and clients."""

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
        """Publish without confirms; `preload` waits until the queue has everything."""
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
        """Give a channel, and declare a consumer's queue like a service's for the block."""
        # No heartbeats: nobody would send them between two calls.
        with self.broker.channel(heartbeat=0) as channel:
            Topology(subject.queue, retry_delays=Settings().retry_delays).declare(channel)
            yield channel
        self.broker.delete_queues(subject.queue)

    def clear(self, prefix: str = "") -> None:
        """Delete the keys below a prefix, and the history of all keys."""
        # If nothing is new, etcd refuses to compact again.
        if self.keys.count(prefix or "/"):
            revision = self.keys.delete(prefix)
            # --physical waits until the space is free, or that would slow down the next run.
            timeout = f"--command-timeout={_ANSWER_S:g}s"
            self.servers.etcd.ctl("compact", "--physical", timeout, str(revision))

    @contextmanager
    def watch(self, prefix: str) -> Iterator[Callable[[], tuple[str, float]]]:
        """Give a function that waits for the next change below a prefix: the key, and the time."""
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
        """Read etcd's own metrics; raises OSError."""
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
    """Return the figures of etcd's metrics page; raises KeyError if one is missing."""
    lines = (line.rpartition(" ") for line in page.splitlines() if not line.startswith("#"))
    values = {name: float(value) for name, _, value in lines if name}
    found = {ours: unit * values[name] for ours, (name, unit) in GAUGES.items()}
    return {**found, "leases": found["granted"] - found["revoked"]}


def outcome(*command: object) -> Any:
    """Run a program and return the JSON that it prints; raises CommandFailedError."""
    return json.loads(run_tool([*_PYTHON, "benchmarks.programs", *map(str, command)]))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


Figures = dict[str, dict[str, Any]]
"""The figures of one run, by row and column."""
Run = Callable[[], Figures]


def in_rounds(site: Site, rounds: int, runs: Sequence[Run]) -> dict[str, dict[str, list[Any]]]:
    """Run each once a round, so that all have the same conditions, and empty etcd in between.

    Each round begins with another one, so that none always follows the same other.
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
    """The number of ready messages at a time, and the CPU time of the consumer until then."""

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

    The outer tenths do not count: in the first the process starts and its prefetch window fills
    (without an ack), in the last it empties. The rate is measured between two falls of the number
    of ready messages, since a consumer that acks hundreds at a time makes it a staircase.
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
