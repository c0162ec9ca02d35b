"""The producers: they publish, and are told, or not, that the broker has it."""

from __future__ import annotations

from random import Random

import pika

from simulation.broker import Broker
from simulation.keys import SERVICE
from simulation.plan import OF_DATA, Plan
from simulation.workload import Sent, Workload

_KINDS = ("new", "duplicate", "conflict", "stranger", "invalid")


class Producer:
    """Publishes a run's bodies at random times, in bursts, and again where no confirm came."""

    def __init__(self, rng: Random, plan: Plan, broker: Broker) -> None:
        self._rng, self._broker = rng, broker
        self.confirmed: set[bytes] = set()
        self.unsent = plan.events
        workload = Workload(rng, plan.types)
        ends_s, at_s = plan.faulty_s * rng.choice([0.2, 0.8]), 0.0
        if any(plan.rate(kind) for kind in OF_DATA):
            ends_s = plan.faulty_s + 30.0  # Something must come to those that must not settle.
        for kind in rng.choices(_KINDS, plan.shares, k=plan.events):
            if rng.random() < 0.3:
                at_s = rng.uniform(0.0, ends_s)
            self._later(at_s, workload.draw(kind))

    def _later(self, delay_s: float, sent: Sent) -> None:
        self._broker.agenda.later(delay_s, lambda: self._publish(sent))

    def _publish(self, sent: Sent) -> None:
        broker, rng = self._broker, self._rng
        if broker.away:
            self._later(broker.away_until_s - broker.agenda.now_s + 0.1, sent)
            return
        self.unsent -= 1
        broker.auditor.sent[sent.body] = sent
        confirmed = not broker.happens("publish not confirmed")
        if confirmed or rng.random() < 0.5:
            headers = rng.choice([None, {}, {"trace": "1", "x-attempts": "many"}])
            broker.put(SERVICE, sent.body, pika.BasicProperties(headers=headers, type="event"))
        if confirmed:
            self.confirmed.add(sent.body)
            return
        broker.trace.fault("publish not confirmed", "producer")
        if rng.random() < 0.7:
            self.unsent += 1
            self._later(rng.uniform(0.05, 5.0), sent)
