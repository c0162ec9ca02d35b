"""The soak: all faults at random, on two replicas.

It runs for CHAOS_MINUTES, and only if that is set. CHAOS_SEED repeats an order of faults.
"""

import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import pytest

from chaos import outages
from chaos.checks import losses, not_ready, passes
from chaos.durations import MINUTES, SEED
from chaos.network import Dependency, relayed
from chaos.proxy import Proxy
from chaos.trial import StartTrial, Trial
from servers.servers import Server, Servers
from servers.wait import eventually, lasts

REPLICAS = 2
# From one fault to the next. A short soak has no time for long faults.
EVERY_S = (30.0, 60.0) if MINUTES >= 10 else (6.0, 12.0)
DEPENDENCIES: tuple[Dependency, ...] = ("broker", "etcd")
OUTAGES = (outages.stopped, outages.killed, outages.frozen)


@pytest.mark.soak
@pytest.mark.timeout(MINUTES * 60 + 900)
def test_soak(trial: StartTrial) -> None:
    """One fault after another, each over before the next; the whole history is judged."""
    chance = random.Random(SEED)
    attempt = trial("soak")
    started_s = time.monotonic()
    with ExitStack() as stack:
        replicas = [Replica(attempt, stack) for _ in range(REPLICAS)]
        mischief = Mischief(attempt.servers, replicas, chance)
        with attempt.load(rate_per_s=60, seed=SEED):
            deck: list[str] = []
            while time.monotonic() - started_s < MINUTES * 60:
                if not deck:  # Every fault comes once before any is repeated.
                    deck = sorted(mischief.faults)
                    chance.shuffle(deck)
                fault = deck.pop()
                every_s = chance.uniform(*EVERY_S)
                lasts_s = chance.uniform(0.1, 0.6) * every_s
                began_s = time.monotonic()
                print(f"{began_s - started_s:7.1f} s  {fault} for {lasts_s:.1f} s")
                with mischief.faults[fault]():
                    lasts(lasts_s)
                attempt.fired()
                attempt.recovers()
                for replica in replicas:
                    replica.service.wait_ready()
                lasts(every_s - (time.monotonic() - began_s))
        attempt.judge(at_least=int(MINUTES * 100), drained_within_s=120)


class Replica:
    """A replica of the service, with a proxy to each server."""

    def __init__(self, attempt: Trial, stack: ExitStack) -> None:
        self.ways: dict[Dependency, Proxy] = {}
        settings: dict[str, str] = {}
        for one in DEPENDENCIES:
            self.ways[one], way = stack.enter_context(relayed(one, attempt.servers, attempt.acks))
            settings |= way
        self.service = attempt.start(**settings)


class Mischief:
    """``faults`` are blocks by name; each raises AssertionError if it has no effect."""

    def __init__(self, servers: Servers, replicas: list[Replica], chance: random.Random) -> None:
        self._rabbitmq, self._replicas, self._chance = servers.rabbitmq, replicas, chance
        self.faults: dict[str, Callable[[], AbstractContextManager[None]]] = {
            "process killed": self._killed,
            "process frozen": lambda: outages.frozen(chance.choice(replicas).service),
            "broker's application stopped": partial(
                self._down, outages.application_stopped, servers.rabbitmq
            ),
            "connections closed": self._connections_closed,
            **{
                f"{kind} alarm": partial(outages.alarm, servers.rabbitmq, kind)
                for kind in outages.ALARMS
            },
        }
        both: tuple[Server, ...] = (servers.rabbitmq, servers.etcd)
        for one, server in zip(DEPENDENCIES, both, strict=True):
            self.faults |= {
                **{f"{one} {each.name}": partial(self._down, each, server) for each in OUTAGES},
                f"partition to {one}": partial(self._partitioned, one),
                f"reset in mid-frame, {one}": partial(self._reset, one),
            }

    @contextmanager
    def _killed(self) -> Iterator[None]:
        victim = self._chance.choice(self._replicas).service
        victim.kill()
        assert victim.exit_code == -signal.SIGKILL
        yield
        victim.start()

    @contextmanager
    def _down(self, outage: outages.Outage, server: Server) -> Iterator[None]:
        with outage(server):
            if outage is outages.frozen:
                outages.silent(server)
            else:
                for replica in self._replicas:
                    eventually(partial(not_ready, replica.service, server.name))
            yield

    @contextmanager
    def _connections_closed(self) -> Iterator[None]:
        def lost() -> int:
            return sum(losses(replica.service, "closed by the test") for replica in self._replicas)

        before = lost()
        self._rabbitmq.ctl("close_all_connections", "closed by the test")
        passes(lost, before)
        yield

    @contextmanager
    def _partitioned(self, one: Dependency) -> Iterator[None]:
        way = self._chance.choice(self._replicas).ways[one]
        way.hold(self._chance.choice(("up", "down", "both")))
        yield
        passes(lambda: way.up.held_bytes + way.down.held_bytes, 0)
        way.release()

    @contextmanager
    def _reset(self, one: Dependency) -> Iterator[None]:
        way = self._chance.choice(self._replicas).ways[one]
        before = way.resets
        way.cut_in_next(self._chance.choice(("up", "down")))
        passes(lambda: way.resets, before)
        yield
