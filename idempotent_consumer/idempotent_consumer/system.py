"""What a service runs on, handed over as one value: sockets, a clock, randomness and threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

from .settings import Settings


@dataclass(frozen=True)
class System:
    """Everything outside of a process that its service reaches, apart from the running loop.

    ``connect`` opens an AMQP connection, with the arguments and the interface of pika's asyncio
    connection. ``open_channel`` opens a channel to an etcd member, by the settings and the member's
    host and port, with the interface of ``grpc.aio.Channel``. ``now_s`` returns seconds since the
    epoch; the monotonic clock is the running loop's. ``random`` draws tokens and jitter.
    ``threads`` makes an executor with so many threads. ``elapsed_s`` returns seconds on a clock by
    which leases are counted, on any thread: it goes on while the machine is suspended. Without one
    it is the running loop's.
    """

    connect: Callable[..., Any]
    open_channel: Callable[[Settings, str, int], Any]
    now_s: Callable[[], float]
    random: Random
    threads: Callable[[int], Executor]
    elapsed_s: Callable[[], float] | None = None


class Backoff:
    """Exponential backoff with full jitter.

    The n-th wait, from 1, is between 0 and ``first_s * 2 ** (n - 1)``, at most ``longest_s``.
    ``waits`` is how many there have been; 0 begins with the shortest again.
    """

    def __init__(self, random: Random, first_s: float, longest_s: float) -> None:
        self._random, self._first_s, self.longest_s = random, first_s, longest_s
        self.waits = 0

    def next_s(self) -> float:
        """Return the seconds to wait this time."""
        bound_s = min(self.longest_s, self._first_s * 2.0 ** min(self.waits, 30))
        self.waits += 1
        return self._random.uniform(0.0, bound_s)


reconnect_wait = partial(Backoff, first_s=0.25, longest_s=5.0)
"""The waits between connections to RabbitMQ: a fleet does not return in one instant."""

commit_wait = partial(Backoff, first_s=0.05, longest_s=2.0)
"""The waits between requests to etcd: short at first, all deliveries wait for it."""

claim_wait = partial(Backoff, first_s=0.1, longest_s=1.0)
"""The waits for a record that another process has claimed: one call or one lease."""
