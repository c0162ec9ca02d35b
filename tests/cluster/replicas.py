"""Three replicas of a service, each with counters of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from integration.judging import lines
from servers.services import Service
from servers.statsd import StatsdListener

NOUNS = {"order": "orders", "notify": "notifications"}


@dataclass(frozen=True)
class Replica:
    """One process, and what it counts."""

    service: Service
    statsd: StatsdListener

    def settled(self) -> int:
        """Return how many deliveries it has processed or skipped."""
        noun = NOUNS[self.service.name]
        counts = ("processed", "processed_skipped")
        return sum(self.statsd.count(f"{noun}_{name}") for name in counts)

    def node(self) -> str:
        """Return the address of the broker that it was last connected to for consuming."""
        connected = [
            line["node"]
            for line in lines(self.service, "connected to RabbitMQ")
            if line["connection"] == "rabbitmq"
        ]
        found: str = connected[-1].partition(":")[0] if connected else ""
        return found


StartReplicas = Callable[..., list[Replica]]
