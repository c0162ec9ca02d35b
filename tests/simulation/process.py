"""One process of the service: the library's own parts, wired as it wires them itself."""

from __future__ import annotations

from random import Random
from typing import Any

from idempotent_consumer.bus.bus import RabbitBus
from idempotent_consumer.bus.delivery import Delivery
from idempotent_consumer.consumer import Consumer
from idempotent_consumer.health import Health
from idempotent_consumer.ledger.cache import Cache
from idempotent_consumer.ledger.ledger import EtcdLedger
from idempotent_consumer.tally import Outcome, Tally
from idempotent_consumer.testing.process import Counts
from simulation.amqp import Network
from simulation.broker import Broker
from simulation.calls import Outside, SimulatedPool
from simulation.etcd import Client, Server
from simulation.handlers import make_handlers
from simulation.keys import SERVICE
from simulation.life import Life
from simulation.plan import Plan
from simulation.trace import TraceLog

FINISH_WITHIN_S = 7.0
_TICK_S = 0.1


class Process:
    """The real consumer, ledger and bus in one life."""

    def __init__(
        self, life: Life, plan: Plan, rng: Random, broker: Broker, server: Server, outside: Outside
    ) -> None:
        self.life, self._auditor = life, broker.auditor
        self.client = Client(server, life)
        self.network = Network(
            life, broker, lambda: self.client.answered > 0, lambda: not self.ledger.halted
        )
        self.taken = 0
        self._counts, health = Counts(), Health()
        log: Any = TraceLog(life.trace, life.name)
        loop: Any = _Loop(life, self.network)
        self._tally = Tally("orders", self._counts, log)
        pool = SimulatedPool(life, rng, plan.threads)
        handlers = make_handlers(life, outside, pool, rng, plan)
        self.ledger = EtcdLedger(
            SERVICE,
            plan.settings,
            self.client,
            loop,
            health,
            log,
            Cache(plan.cache_entries),
            longest_call_s=plan.call_timeout_s,
        )
        self.bus = RabbitBus(
            SERVICE, plan.settings, loop, health, log, self._take, self._tally.returned
        )
        self._stopping = False
        self._consumer = Consumer(
            SERVICE,
            life.token,
            handlers,
            plan.settings.retry_delays,
            self.ledger,
            self.bus,
            loop,
            pool,
            self._tally,
            log,
        )

    def open(self) -> None:
        """Reach etcd, then consume."""
        self.ledger.open(self._opened)

    def _opened(self) -> None:
        self._auditor.process_opened(self.life)
        self.bus.open()

    def _take(self, deliveries: list[Delivery]) -> None:
        self.taken += len(deliveries)
        self._consumer.take(deliveries)

    def count(self, name: str) -> int:
        """Return one of the service's counters."""
        return self._counts.counts[f"orders_{name}"]

    def judge_counts(self) -> None:
        """Hold the contract's sum; between two steps it holds at any time."""
        received, in_hand = self.count("received"), self.bus.in_hand
        ended = sum(self.count(outcome.value) for outcome in Outcome)
        on_the_way = self.network.arrived - self.taken
        if received != self.taken or received + on_the_way != ended + in_hand:
            self.life.trace.violation(
                "the counters do not add up",
                self.life.name,
                f"received {received}, ended {ended}, in hand {in_hand}, on the way {on_the_way}",
            )

    # The stop, as service.py has it.

    def stop(self) -> None:
        """Take no more, settle what is in hand, and end; a second signal changes nothing."""
        if self._stopping:
            return
        self._stopping = True
        self.life.trace.fault("stopped", self.life.name, f"{self.bus.in_hand} in hand")
        self.bus.stop_intake()
        until_s = self.life.now_s() + FINISH_WITHIN_S
        self._consumer.end_by(until_s)
        self._finish(until_s)

    def _finish(self, until_s: float) -> None:
        if (self.bus.in_hand or self._consumer.busy) and self.life.now_s() < until_s:
            self.life.call_later(_TICK_S, lambda: self._finish(until_s))
            return
        self._consumer.ack_all()
        self.bus.close()
        self.life.call_later(1.0, self._end)

    def _end(self) -> None:
        self.ledger.close()
        self.judge_counts()
        self.life.end()


class _Loop:
    """The process's loop; ``ioloop`` is what pika's connections are made on."""

    def __init__(self, life: Life, network: Network) -> None:
        self.now_s, self.call_later, self.call_soon = life.now_s, life.call_later, life.call_soon
        self.ioloop = network
