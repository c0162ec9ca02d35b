"""The soak: all faults at random, on two replicas, for CHAOS_MINUTES; CHAOS_SEED replays a choice.

Collected only where CHAOS_MINUTES is set.
"""

import random
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import get_args

import pytest

from chaos.checks import losses, not_ready, passes
from chaos.durations import MINUTES, SEED
from chaos.network import Dependency, relayed
from chaos.outages import (
    ALARMS,
    Outage,
    alarm,
    application_stopped,
    frozen,
    killed,
    silent,
    stopped,
)
from chaos.proxy import Direction, Proxy
from chaos.trial import StartTrial
from servers.servers import Server, Servers
from servers.services import Service
from servers.wait import eventually, lasts

REPLICAS = 2
# A fault and the time until the next one; a short soak has no time for the long ones.
EVERY_S = (30.0, 60.0) if MINUTES >= 10 else (6.0, 12.0)
_DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
_MISSING: dict[Dependency, str] = {"broker": "rabbitmq", "etcd": "etcd"}


@pytest.mark.soak
@pytest.mark.timeout(MINUTES * 60 + 900)
def test_soak(trial: StartTrial) -> None:
    """One fault after another, each healed before the next; judged at the end by all of history."""
    chance = random.Random(SEED)
    attempt = trial("soak")
    started_s = time.monotonic()
    with ExitStack() as stack:
        replicas = []
        for _ in range(REPLICAS):
            ways: dict[Dependency, Proxy] = {}
            settings: dict[str, str] = {}
            for one in _MISSING:
                ways[one], way = stack.enter_context(relayed(one, attempt.servers, attempt.acks))
                settings |= way
            replicas.append(Replica(partial(attempt.start, **settings), ways))
        mischief = Mischief(attempt.servers, replicas, chance)
        with attempt.load(rate_per_s=60, seed=SEED):
            deck: list[str] = []
            while time.monotonic() - started_s < MINUTES * 60:
                if not deck:  # Each fault comes once before any comes again.
                    deck = sorted(mischief.faults)
                    chance.shuffle(deck)
                fault = deck.pop()
                every_s = chance.uniform(*EVERY_S)
                lasts_s = chance.uniform(0.1, 0.6) * every_s
                began_s = time.monotonic()
                print(f"{began_s - started_s:7.1f} s  {fault} for {lasts_s:.1f} s")
                mischief.faults[fault](lasts_s)
                attempt.fired()
                attempt.recovers()
                for replica in replicas:
                    replica.service.wait_ready()
                lasts(every_s - (time.monotonic() - began_s))
        attempt.judge(at_least=int(MINUTES * 100), drained_within_s=120)


class Replica:
    """One of the replicas, which is started again when it has died, and its two ways out."""

    def __init__(self, start: Callable[[], Service], ways: dict[Dependency, Proxy]) -> None:
        self._start, self.ways = start, ways
        self.service = start()

    def succeed(self) -> None:
        """Start a successor of a process that has died."""
        self.service = self._start()


class Mischief:
    """Causes the faults that stand in ``faults``; raises AssertionError where one does not bite."""

    def __init__(self, servers: Servers, replicas: list[Replica], chance: random.Random) -> None:
        self._rabbitmq, self._replicas, self._chance = servers.rabbitmq, replicas, chance
        self._servers: dict[Dependency, Server] = {
            "broker": servers.rabbitmq,
            "etcd": servers.etcd,
        }
        self.faults: dict[str, Callable[[float], None]] = {
            "process killed": self._kill,
            "process frozen": self._freeze,
            "broker's application stopped": partial(self._down, "broker", application_stopped),
            "connections closed": self._close_connections,
            **{f"{kind} alarm": partial(self._alarm, kind) for kind in ALARMS},
        }
        for one in _MISSING:
            self.faults |= {
                f"{one} stopped": partial(self._down, one, stopped),
                f"{one} killed": partial(self._down, one, killed),
                f"{one} frozen": partial(self._silence, one),
                f"partition to {one}": partial(self._partition, one),
                f"reset in mid-frame, {one}": partial(self._reset, one),
            }

    def _kill(self, seconds: float) -> None:
        victim = self._chance.choice(self._replicas)
        victim.service.kill()
        assert victim.service.exit_code == -signal.SIGKILL
        lasts(seconds)
        victim.succeed()

    def _freeze(self, seconds: float) -> None:
        victim = self._chance.choice(self._replicas).service
        victim.pause()
        stat = Path(f"/proc/{victim.pid}/stat").read_text()
        assert stat.rpartition(")")[2].split()[0] == "T", stat
        lasts(seconds)
        victim.resume()

    def _down(self, one: Dependency, outage: Outage, seconds: float) -> None:
        with outage(self._servers[one]):
            for replica in self._replicas:
                eventually(partial(not_ready, replica.service, _MISSING[one]))
            lasts(seconds)

    def _silence(self, one: Dependency, seconds: float) -> None:
        with frozen(self._servers[one]):
            silent(self._servers[one])
            lasts(seconds)

    def _close_connections(self, seconds: float) -> None:
        before = self._lost()
        self._rabbitmq.ctl("close_all_connections", "closed by the test")
        passes(self._lost, before)
        lasts(seconds)

    def _lost(self) -> int:
        return sum(losses(replica.service, "closed by the test") for replica in self._replicas)

    def _alarm(self, kind: str, seconds: float) -> None:
        with alarm(self._rabbitmq, kind):
            lasts(seconds)

    def _partition(self, one: Dependency, seconds: float) -> None:
        way = self._chance.choice(self._replicas).ways[one]
        way.hold(self._chance.choice((*_DIRECTIONS, "both")))
        lasts(seconds)
        passes(lambda: way.up.held_bytes + way.down.held_bytes, 0)
        way.release()

    def _reset(self, one: Dependency, seconds: float) -> None:
        way = self._chance.choice(self._replicas).ways[one]
        before = way.resets
        way.cut_in_next(self._chance.choice(_DIRECTIONS))
        passes(lambda: way.resets, before)
        lasts(seconds)
