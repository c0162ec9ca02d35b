"""How throughput grows with replicas: a backlog worked off by 1, 2 and 3 of them, on the cluster.

    .venv/bin/python -m benchmarks.replicas --rounds 3

Run it by `make cluster-scaling`. Everything shares this machine, so what it shows for handlers that
take no time is the machine's own limit; where handlers wait, replicas add up.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

from chaos.checks import passes
from chaos.load import orders
from cluster.cluster import Cluster, start_cluster
from servers.broker import Broker
from servers.counters import listen_statsd
from servers.etcd import EtcdClient
from servers.services import Service, run_service
from servers.wait import eventually

from .processes import cpu_s

COSTS_MS = {0: 60_000, 1: 12_000, 10: 2_000}
"""What a handler takes, and how many events are worked off: about as long, by one replica."""

REPLICAS = (1, 2, 3)
_PREFIX = "/service/order/"
_AT_MOST_S = 300.0
_FULL = 0.85
_CORES = os.cpu_count() or 1


class Measured(NamedTuple):
    """One backlog worked off. ``cores`` are those that the replicas were busy on, one by one."""

    rate_per_s: float
    cores: list[float]
    all_cores: float

    def limit(self, cost_ms: int) -> str:
        """Return what was in use nearly all of the time."""
        handling = self.rate_per_s / len(self.cores) * cost_ms / 1000
        if max(self.cores) + handling >= _FULL:
            return "handlers" if handling > max(self.cores) else "a replica's core"
        return "the machine" if self.all_cores >= _FULL * _CORES else "commits in flight"


def main() -> int:
    """Measure each case, and print a line for the median of its rounds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replicas", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often (default: %(default)s)")
    rounds = parser.parse_args().rounds
    print(
        f"{'handler':>8} {'replicas':>8} {'events/s':>9} {'from-to':>15} {'cores of each':>14} "
        f"{'all cores':>10}  limited by"
    )
    with start_cluster() as cluster:
        for cost_ms, events in COSTS_MS.items():
            for replicas in REPLICAS:
                found = [measure(cluster, replicas, cost_ms, events) for _ in range(rounds)]
                print(_line(cost_ms, replicas, sorted(found)), flush=True)
    return 0


def _line(cost_ms: int, replicas: int, found: list[Measured]) -> str:
    """Return a line of the table for the rounds of one case, the slowest first."""
    shown = found[len(found) // 2]
    rate = median(one.rate_per_s for one in found)
    spread = f"{found[0].rate_per_s:,.0f}-{found[-1].rate_per_s:,.0f}"
    cores = f"{min(shown.cores):.2f}-{max(shown.cores):.2f}"
    total = f"{shown.all_cores:.2f}/{_CORES}"
    return (
        f"{cost_ms:>5} ms {replicas:>8} {rate:>9,.0f} {spread:>15} {cores:>14} {total:>10}  "
        f"{shown.limit(cost_ms)}"
    )


def measure(cluster: Cluster, replicas: int, cost_ms: int, events: int) -> Measured:
    """Let so many replicas work off a backlog of so many events."""
    broker, etcd = Broker(cluster.rabbitmq), EtcdClient(cluster.etcd.endpoint)
    with _replicas(cluster, replicas, cost_ms) as running:
        for service in running:
            service.pause()
        broker.publish(orders(events))
        before_s = time.monotonic()
        used_s, busy_s = [cpu_s(service.pid) for service in running], _busy_s()
        for service in running:
            service.resume()
        passes(lambda: etcd.count(_PREFIX), events - 1, _AT_MOST_S)
        took_s = time.monotonic() - before_s
        used_s = [cpu_s(one.pid) - before for one, before in zip(running, used_s, strict=True)]
        busy_s = _busy_s() - busy_s
    eventually(lambda: broker.assert_drained("order"))
    broker.delete_queues("order")
    etcd.delete(_PREFIX)
    return Measured(events / took_s, [used / took_s for used in used_s], busy_s / took_s)


@contextmanager
def _replicas(cluster: Cluster, number: int, cost_ms: int) -> Iterator[list[Service]]:
    command = [sys.executable, "-m", "benchmarks.slow_order"]
    with ExitStack() as stack:
        statsd = stack.enter_context(listen_statsd())
        settings = {
            **cluster.settings(),
            **statsd.settings(),
            "ENABLE_ETCD": "true",
            "BATCH_SIZE": "512",
            "HANDLER_MS": str(cost_ms),
        }
        running = [
            stack.enter_context(run_service("order", settings, command=command))
            for _ in range(number)
        ]
        for service in running:
            service.wait_ready()
        yield running


def _busy_s() -> float:
    """Return the processor time that was not idle on any core since the start (proc_stat(5))."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    return (sum(map(int, fields[:8])) - int(fields[3]) - int(fields[4])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
