"""What a service runs on, handed over as one value: sockets, a clock, randomness and threads."""

from __future__ import annotations

from collections.abc import AsyncIterable, Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from tenacity import RetryCallState, Retrying
from tenacity.wait import wait_base

from .settings import Settings


class Channel(Protocol):
    """The part of ``grpc.aio.Channel`` that etcd's client uses."""

    def unary_unary(
        self, method: str, request_serializer: Any, response_deserializer: Any
    ) -> Callable[..., Awaitable[Any]]:
        """Return a function of ``request, timeout=, metadata=``; it raises ``grpc.RpcError``."""
        ...

    def stream_stream(
        self, method: str, request_serializer: Any, response_deserializer: Any
    ) -> Callable[..., AsyncIterable[Any]]:
        """Return a function of ``requests, metadata=``; iterating raises ``grpc.RpcError``."""
        ...

    async def close(self) -> None:
        """End every call under way."""
        ...


@dataclass(frozen=True)
class System:
    """Everything outside of a process that its service reaches, apart from the running loop.

    ``connect`` opens an AMQP connection: it takes what ``pika``'s asyncio connection takes
    (``parameters, on_open_callback=, on_open_error_callback=, on_close_callback=``) and returns
    an object with that interface. ``open_channel`` opens a gRPC channel to an etcd member, by the
    settings and the member's host and port. ``now_s`` returns seconds since the epoch; the
    monotonic clock is the running loop's. ``random`` draws tokens and jitter. ``threads`` makes
    an executor with so many threads, for ``run_in_executor``. ``elapsed_s`` returns seconds on a
    clock by which leases are counted, on any thread: it goes on while the machine is suspended.
    Without one it is the running loop's.
    """

    connect: Callable[..., Any]
    open_channel: Callable[[Settings, str, int], Channel]
    now_s: Callable[[], float]
    random: Random
    threads: Callable[[int], Executor]
    elapsed_s: Callable[[], float] | None = None


class Jitter(wait_base):
    """A tenacity wait: exponential backoff with full jitter, drawn from a given ``random``.

    The n-th wait, from 1, is between 0 and ``first_s * 2 ** (n - 1)``, at most ``longest_s``.
    """

    def __init__(self, random: Random, first_s: float, longest_s: float) -> None:
        self._random, self._first_s, self.longest_s = random, first_s, longest_s

    def __call__(self, retry_state: RetryCallState) -> float:
        """Return the seconds to wait after this attempt."""
        doublings = min(retry_state.attempt_number - 1, 30)
        return self._random.uniform(0.0, min(self.longest_s, self._first_s * 2.0**doublings))


def reconnect_wait(random: Random) -> Jitter:
    """Return the waits between connections to RabbitMQ: a fleet does not return in one instant."""
    return Jitter(random, 0.25, 5.0)


def commit_wait(random: Random) -> Jitter:
    """Return the waits between requests to etcd: short at first, all deliveries wait for it."""
    return Jitter(random, 0.05, 2.0)


def claim_wait(random: Random) -> Jitter:
    """Return the waits for a record that another process has claimed: one call or one lease."""
    return Jitter(random, 0.1, 1.0)


class Backoff:
    """A tenacity wait that is stepped by hand, where each wait depends on what was seen last."""

    def __init__(self, wait: wait_base) -> None:
        self._wait = wait
        self.reset()

    def reset(self) -> None:
        """Begin with the shortest wait again, after a success."""
        self._state = RetryCallState(Retrying(wait=self._wait), None, (), {})

    @property
    def waits(self) -> int:
        """How many waits there have been since the last success."""
        return self._state.attempt_number - 1

    def next_s(self) -> float:
        """Return the seconds to wait this time."""
        wait_s = float(self._wait(self._state))
        self._state.attempt_number += 1
        return wait_s
