"""What a seed decides before its run: the service's settings, and which faults it meets."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from random import Random

from idempotent_consumer.bus import MAX_BYTES_IN_FLIGHT
from idempotent_consumer.settings import Settings

PER_REQUEST = (
    "request lost",
    "reply lost",
    "applied late",
    "answered late",
    "refused",
    "refused login",
)
"""Faults of a single request to etcd."""

PER_MESSAGE = (
    "reordered",
    "confirm late",
    "publish refused",
    "dead-lettered twice",
    "publish not confirmed",
)
"""Faults of a single message."""

TIMED = (
    "etcd away",
    "etcd away for longer than a lease",
    "etcd out of space",
    "lease revoked",
    "connection lost",
    "channel closed",
    "consumer cancelled",
    "broker restarted",
    "alarm",
    "queue deleted",
    "stopped",
)
"""Faults that happen at a time."""

OF_PROCESSES = ("killed", "frozen")
"""Faults that happen at a step of a process."""

OF_DATA = ("etcd wiped", "etcd restored")
"""Faults after which the service must stop settling. A run has one of them at the most."""

_DELAYS = (
    (("1s", 1),),
    (("1s", 1), ("2s", 2)),
    (("1s", 1), ("5s", 5), ("10s", 10)),
)


@dataclass
class Plan:
    """One run. ``rates`` holds what can happen, with its probability or its number of times.

    What has a default is for runs of a chosen fault: a drawn plan leaves it. ``types`` are the
    events' types, drawn by the workload where there are none. ``shares`` says how many of a hundred
    bodies are new, duplicate, conflict, stranger and invalid. With ``restarted_at_once`` nobody
    waits until a loss of etcd's data is noticed.
    """

    replicas: int
    settings: Settings
    cache_entries: int
    call_timeout_s: float
    call_s: float
    events: int
    faulty_s: float
    latency_s: float
    max_bytes: int = MAX_BYTES_IN_FLIGHT
    types: tuple[str, ...] = ()
    shares: tuple[int, ...] = (50, 34, 6, 3, 7)
    longest_freeze_s: float = math.inf
    restarted_at_once: bool = False
    rates: dict[str, float] = field(default_factory=dict)

    def describe(self) -> str:
        """Write the plan for a reader."""
        s = self.settings
        rates = ", ".join(f"{name} {rate:.3g}" for name, rate in self.rates.items())
        return (
            f"{self.replicas} replicas, {self.events} events, batches of {s.batch_size}, "
            f"{s.etcd_max_txn_ops} operations, retries {[d for d, _ in s.retry_delays]}, "
            f"window {s.dedup_window_s} s, calls {self.call_s:.2g} of {self.call_timeout_s} s "
            f"{s.calls_at_once} at once, cache {self.cache_entries}, "
            f"{self.max_bytes} bytes in flight, "
            f"faults for {self.faulty_s:.0f} s: {rates or 'none'}"
        )


def draw_plan(rng: Random) -> Plan:
    """Draw a run. Each has some of the faults only: one that always happens hides others."""
    timeout_s = rng.choice([1.0, 5.0])
    plan = Plan(
        replicas=rng.choice([1, 2, 2, 3]),
        settings=Settings(
            enable_etcd=True,
            batch_size=rng.choice([1, 2, 3, 8, 128]),
            etcd_max_txn_ops=rng.choice([4, 5, 16, 128]),
            retry_delays=rng.choice(_DELAYS),
            dedup_window_s=rng.choice([86400, 86400, 0]),
            calls_at_once=rng.choice([1, 4, 16]),
        ),
        cache_entries=rng.choice([4, 1000]),
        call_timeout_s=timeout_s,
        call_s=timeout_s * rng.choice([0.05, 0.4, 1.0]),
        events=rng.randint(15, 40),
        faulty_s=rng.uniform(8, 40),
        latency_s=rng.choice([0.001, 0.02, 0.2]),
    )
    _draw_faults(rng, plan)
    plan.max_bytes = rng.choice([1_000, 4_000, MAX_BYTES_IN_FLIGHT])
    return plan


def _draw_faults(rng: Random, plan: Plan) -> None:
    rates, mood = plan.rates, rng.random()
    if mood < 0.03:
        return  # A run without faults, which the others are measured against.
    if mood < 0.15:
        rates["killed"] = rng.randint(1, 6)
        return
    if mood < 0.21:
        # Alone, too: what applies late, in a world where nobody dies, has all the time to do harm.
        rates["applied late"] = rng.uniform(0.1, 0.4)
        return
    often = rng.choice([0.02, 0.1, 0.3])
    for fault in (*PER_REQUEST, *PER_MESSAGE):
        if rng.random() < 0.35:
            rates[fault] = often * rng.uniform(0.3, 1.5)
    for fault in (*TIMED, *OF_PROCESSES):
        if rng.random() < 0.25:
            rates[fault] = rng.randint(1, 4)
    if rng.random() < 0.12:
        rates[rng.choice(OF_DATA)] = 1
