"""The faults of the soak: each lasts so many seconds, proves itself, and is healed at its end."""

import random
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

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
from chaos.signs import losses, true
from chaos.ways import Dependency
from integration.judging import not_ready
from servers.server import Server
from servers.servers import Servers
from servers.services import Service
from servers.wait import eventually, lasts

_DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
_MISSING: dict[Dependency, str] = {"broker": "rabbitmq", "etcd": "etcd"}


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
        _last(seconds)
        victim.succeed()

    def _freeze(self, seconds: float) -> None:
        victim = self._chance.choice(self._replicas).service
        victim.pause()
        stat = Path(f"/proc/{victim.pid}/stat").read_text()
        assert stat.rpartition(")")[2].split()[0] == "T", stat
        _last(seconds)
        victim.resume()

    def _down(self, one: Dependency, outage: Outage, seconds: float) -> None:
        with outage(self._servers[one]):
            for replica in self._replicas:
                eventually(partial(not_ready, replica.service, _MISSING[one]))
            _last(seconds)

    def _silence(self, one: Dependency, seconds: float) -> None:
        with frozen(self._servers[one]):
            silent(self._servers[one])
            _last(seconds)

    def _close_connections(self, seconds: float) -> None:
        before = self._lost()
        self._rabbitmq.ctl("close_all_connections", "closed by the test")
        eventually(lambda: true(self._lost() > before))
        _last(seconds)

    def _lost(self) -> int:
        return sum(losses(replica.service, "closed by the test") for replica in self._replicas)

    def _alarm(self, kind: str, seconds: float) -> None:
        with alarm(self._rabbitmq, kind):
            _last(seconds)

    def _partition(self, one: Dependency, seconds: float) -> None:
        way = self._chance.choice(self._replicas).ways[one]
        way.hold(self._chance.choice((*_DIRECTIONS, "both")))
        _last(seconds)
        eventually(lambda: true(way.up.held_bytes + way.down.held_bytes > 0))
        way.release()

    def _reset(self, one: Dependency, seconds: float) -> None:
        way = self._chance.choice(self._replicas).ways[one]
        before = way.resets
        way.cut_in_next(self._chance.choice(_DIRECTIONS))
        eventually(lambda: true(way.resets > before))
        _last(seconds)


def _last(seconds: float) -> None:
    lasts(seconds)
