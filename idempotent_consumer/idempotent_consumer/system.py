"""What a service runs on: sockets, clocks, randomness and threads. Also the library's backoff."""

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
    """Everything outside its process that a service uses, apart from the running loop.

    ``connect`` opens an AMQP connection, with the arguments and the interface of pika's asyncio
    connection. ``open_channel`` opens a channel to an etcd member, given the settings and the
    member's host and port, with the interface of ``grpc.aio.Channel``. ``now_s`` returns seconds
    since the epoch; the monotonic clock is the running loop's. ``random`` draws tokens and jitter.
    ``threads`` makes an executor with the given number of threads. ``elapsed_s`` returns the
    seconds by which leases are counted; it can be called on any thread, and its clock has to go on
    while the machine is suspended. The default is the running loop's clock.
    """

    connect: Callable[..., Any]
    open_channel: Callable[[Settings, str, int], Any]
    now_s: Callable[[], float]
    random: Random
    threads: Callable[[int], Executor]
    elapsed_s: Callable[[], float] | None = None


class Backoff:
    """Exponential backoff with full jitter.

    The n-th wait is between 0 and ``first_s * 2 ** (n - 1)``, and at most ``longest_s``. ``waits``
    counts them; set it to 0 to start again with the shortest.
    """

    def __init__(self, random: Random, first_s: float, longest_s: float) -> None:
        self._random, self._first_s, self.longest_s = random, first_s, longest_s
        self.waits = 0

    def next_s(self) -> float:
        """Return the seconds to wait next."""
        bound_s = min(self.longest_s, self._first_s * 2.0 ** min(self.waits, 30))
        self.waits += 1
        return self._random.uniform(0.0, bound_s)


reconnect_wait = partial(Backoff, first_s=0.25, longest_s=5.0)
"""Between attempts to connect; the jitter keeps replicas from all returning at the same time."""

commit_wait = partial(Backoff, first_s=0.05, longest_s=2.0)
"""Between attempts of a request to etcd. Short at first, because deliveries wait for it."""

claim_wait = partial(Backoff, first_s=0.1, longest_s=1.0)
"""Between looks at a record that another process has claimed, for as long as a call or a lease."""
