"""The servers of a run, what is started on them, and what is read from them.

How fast a consumer works is seen from the broker. Its count of ready messages is exact at every
instant (a passive declare asks the queue's leader; the management API's figures are seconds old).
While a consumer's prefetch window is full, each ack lets one more message out, so the count falls
exactly as fast as acks arrive. That treats every consumer alike: nothing is added to any of them,
the question costs the same for all, and an ack is what all of them have in common (a subject that
records acks only what is recorded, and its records are counted afterwards).
"""

import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import etcd3
import pika

from chaos.checks import becomes
from idempotent_consumer import Settings
from idempotent_consumer.bus import Topology
from servers.broker import Broker
from servers.counters import StatsdListener, listen_statsd
from servers.etcd import EtcdClient
from servers.processes import run_tool
from servers.servers import Servers
from servers.services import Service, run_service
from servers.web import fetch_json, open_json

from .figures import NotMeasuredError
from .publishers import pour
from .subjects import Subject

_QUORUM = {"x-queue-type": "quorum"}

_LOOK_EVERY_S, _STALLED_AFTER_S = 0.01, 30.0
_ANSWER_S = 60.0
"""Of etcd: to delete a million records takes a while."""
_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
_PACKAGES = ("pika", "cslab-etcd3", "grpcio", "protobuf", "orjson")


_MB = 1e-6
_TXN = 'grpc_method="Txn",grpc_service="etcdserverpb.KV",grpc_type="unary"'
_GAUGES = {
    # Its resident size, which includes what it has mapped of its file.
    "etcd MB": ("process_resident_memory_bytes", _MB),
    "file MB": ("etcd_mvcc_db_total_size_in_bytes", _MB),
    "in use MB": ("etcd_mvcc_db_total_size_in_use_in_bytes", _MB),
    "records": ("etcd_debugging_mvcc_keys_total", 1),
    # Totals since its start.
    "granted": ("etcd_debugging_lease_granted_total", 1),
    "revoked": ("etcd_debugging_lease_revoked_total", 1),
    "written": ("etcd_mvcc_put_total", 1),
    "transactions": (f"grpc_server_started_total{{{_TXN}}}", 1),
}


def gauges_of(page: str) -> dict[str, float]:
    """Read etcd's metrics page; raises KeyError if one of them is not there."""
    lines = (line.rpartition(" ") for line in page.splitlines() if not line.startswith("#"))
    values = {name: float(value) for name, _, value in lines if name}
    found = {ours: unit * values[name] for ours, (name, unit) in _GAUGES.items()}
    return {**found, "leases": found["granted"] - found["revoked"]}


@dataclass(frozen=True)
class Site:
    """The servers, what listens for the services' metrics, and etcd3's own client of etcd."""

    servers: Servers
    statsd: StatsdListener
    etcd: Any

    @property
    def url(self) -> str:
        """The broker's."""
        return self.servers.rabbitmq.url

    @property
    def broker(self) -> Broker:
        """The broker, for questions."""
        return Broker(self.servers.rabbitmq)

    @property
    def keys(self) -> EtcdClient:
        """etcd, for questions."""
        return EtcdClient(self.servers.etcd.endpoint, _ANSWER_S)

    def preload(self, queue: str, bodies: Sequence[bytes]) -> None:
        """Publish events of one size to a queue that nobody consumes, and wait for all of them."""
        pour(self.url, queue, bodies)
        becomes(partial(self.broker.ready, queue), len(bodies))

    def run(self, subject: Subject) -> AbstractContextManager[Service]:
        """Run a consumer while the block runs."""
        return self.start(subject.command, subject.settings)

    def start(
        self, command: Sequence[str], settings: Mapping[str, str]
    ) -> AbstractContextManager[Service]:
        """Run a module with its arguments as a service is run, while the block runs."""
        env = {**self.servers.settings(), **self.statsd.settings(), "ENABLE_ETCD": "true"}
        return run_service("benchmarks", {**env, **settings}, command=_python(*command))

    @contextmanager
    def queue(self, subject: Subject) -> Iterator[Any]:
        """Give a channel on which a consumer's queue is declared, and delete that afterwards."""
        # No heartbeats: between two questions nobody would send them.
        parameters = pika.URLParameters(f"{self.url}?heartbeat=0")
        with closing(pika.BlockingConnection(parameters)) as connection:
            channel = connection.channel()
            if subject.is_service:
                Topology(subject.queue, retry_delays=Settings().retry_delays).declare(channel)
            else:
                channel.queue_declare(subject.queue, durable=True, arguments=_QUORUM)
            yield channel
        self.broker.delete_queues(subject.queue)

    def clear(self, prefix: str = "") -> None:
        """Delete everything below a prefix, and the history of all.

        `--physical` waits until the space is given back, which would else happen during the next
        run and slow that down.
        """
        # Where nothing is new, etcd refuses to compact once more.
        if self.keys.count(prefix or "/"):
            revision = self.keys.delete(prefix)
            self.servers.etcd.ctl("compact", "--physical", str(revision))

    @contextmanager
    def watch(
        self, prefix: str, changed: Callable[[float, Sequence[bytes]], None]
    ) -> Iterator[None]:
        """Watch the keys below a prefix while the block runs.

        `changed` is called on the client's thread with the time, on the monotonic clock, and the
        keys that one answer brought. The watch is there when the block begins.
        """
        watch_id = self.etcd.add_watch_prefix_callback(
            prefix,
            lambda answer: changed(time.monotonic(), [event.key for event in answer.events]),
        )
        try:
            yield
        finally:
            self.etcd.cancel_watch(watch_id)

    def gauges(self) -> dict[str, float]:
        """Read what etcd says of itself; raises OSError."""
        with open_json("GET", f"http://{self.servers.etcd.endpoint}/metrics") as page:
            return gauges_of(page.read().decode())

    def machine(self) -> str:
        """Return what a reader needs to judge the figures by: the machine, and all versions."""
        overview: Any = self.servers.rabbitmq.management("GET", "/api/overview")
        etcd = fetch_json("GET", f"http://{self.servers.etcd.endpoint}/version")
        cpus = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        found = {
            "cores": str(len(os.sched_getaffinity(0))),
            "processor": cpus[0] if cpus else platform.machine(),
            "load before": f"{os.getloadavg()[0]:.2f}",
            "system": f"{platform.system()} {platform.release()}",
            "servers": "containers" if self.servers.kind == "docker" else "processes",
            "rabbitmq": f"{overview['rabbitmq_version']} (Erlang {overview['erlang_version']})",
            "etcd": etcd["etcdserver"],
            "python": platform.python_version(),
            **{package: version(package) for package in _PACKAGES},
        }
        return ", ".join(f"{name} {value}" for name, value in found.items())


@contextmanager
def open_site(start: Callable[[], AbstractContextManager[Servers]]) -> Iterator[Site]:
    """Start servers for as long as the block runs."""
    with start() as servers, listen_statsd() as statsd:
        host, port = servers.etcd.endpoint.rsplit(":", 1)
        with closing(etcd3.client(host=host, port=int(port), timeout=_ANSWER_S)) as etcd:
            yield Site(servers, statsd, etcd)


def outcome(*command: str) -> dict[str, float]:
    """Run a module to its end, and return the JSON that it prints; raises CommandFailedError."""
    told: dict[str, float] = json.loads(run_tool(_python(*command)))
    return told


def _python(*command: str) -> list[str]:
    # -P: modules are found where they are installed, whatever lies in the working directory.
    return [sys.executable, "-P", "-m", *command]


class Progress(NamedTuple):
    """How many messages were ready at a time, and what CPU time the consumer had used."""

    at_s: float
    ready: int
    cpu_s: float


def follow(channel: Any, queue: str, child: Service) -> list[Progress]:
    """Watch a queue until it is empty; raises NotMeasuredError if its consumer ends or stalls."""
    seen: list[Progress] = []
    moved_s = time.perf_counter()
    while not seen or seen[-1].ready:
        ready: int = channel.queue_declare(queue, passive=True).method.message_count
        now_s = time.perf_counter()
        if not seen or ready != seen[-1].ready:
            moved_s = now_s
        if not child.running or now_s - moved_s > _STALLED_AFTER_S:
            what = "stalled" if child.running else "its consumer ended"
            raise NotMeasuredError(f"{queue}: {what} at {ready}:\n{child.output()[-2000:]}")
        seen.append(Progress(now_s, ready, cpu_s(child.pid)))
        time.sleep(_LOOK_EVERY_S)
    return seen


def rate(
    seen: Sequence[Progress], events: int, behind: int = 0, prefetch: int = 0
) -> dict[str, float]:
    """Return the rate over a series of `events`, with `behind` more messages queued behind it.

    The outer tenths are left out: the first holds the start of the process and the filling of the
    window (`prefetch` events leave the queue before an ack has let any out), the last its emptying.
    From the first fall inside to the last: a consumer that acks hundreds at a time makes a
    staircase, whose steps are exact at their edges alone.
    """
    trim = events // 10
    most, least = behind + events - max(trim, prefetch), behind + trim
    inside = [
        now
        for before, now in pairwise(seen)
        if least <= now.ready < most and now.ready != before.ready
    ]
    if len(inside) < 2:
        raise NotMeasuredError("too few events to measure: raise --events")
    first, last = inside[0], inside[-1]
    done = first.ready - last.ready
    cpu_us = (last.cpu_s - first.cpu_s) / done * 1e6
    return {"events/s": done / (last.at_s - first.at_s), "CPU µs an event": cpu_us}


def cpu_s(pid: int) -> float:
    """Return the CPU time of a process with all its threads (proc(5), fields utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_A_SECOND
