"""What most tests need: servers, their clients, a way to start services, and the verdict."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from chaos.load import ids
from idempotent_consumer.metrics import Outcome
from servers.broker import Broker, Event, Message
from servers.checker import Verdict, doubles, judge
from servers.counters import StatsdListener
from servers.etcd import Store, record_prefix
from servers.servers import Servers
from servers.services import Service
from servers.wait import eventually

OUTCOMES = tuple(map(str, Outcome))

StartService = Callable[..., Service]

_EFFECTS = {"order": "/orders/", "shipment": "/parcels/"}
"""The prefixes under which services write one key for each event, beside its record."""

_IN_STEPS = ("notify", "shipment")
"""The services whose records are *claimed* or *publishing* before they are *done*."""


@dataclass(frozen=True)
class Rig:
    """The fixtures `clean`, `broker`, `store`, `statsd` and `start_service`, and the verdict.

    Its methods raise AssertionError. They wait 30 s at the longest, or 60 s for empty queues.
    """

    servers: Servers
    broker: Broker
    store: Store
    statsd: StatsdListener
    start: StartService

    def drained(self, *queues: str, timeout_s: float = 60.0) -> None:
        """Wait until the queues have no message, neither ready nor unacked."""
        eventually(lambda: self.broker.assert_drained(*queues), timeout_s, also=(OSError,))

    def verdict(
        self,
        service: str,
        sent: Sequence[Event],
        confirmed: Sequence[Event],
        *,
        parked: Iterable[str] = (),
        first_revision: int | None = None,
    ) -> Verdict:
        """Judge a service by the whole history of its records and effects in etcd.

        The queues have to be empty. ``parked`` are the ids that were taken from the dead letters.
        """
        records, effects = record_prefix(service), _EFFECTS.get(service)
        history = self.store.history(records, *([effects] if effects else []), first=first_revision)
        return judge(
            attempted=ids(sent),
            confirmed=ids(confirmed),
            recorded=self.store.done(service),
            effected=self.store.effects(effects) if effects else None,
            parked=parked,
            double=doubles(history, claimed=(records,) if service in _IN_STEPS else ()),
        )

    def handled_once(
        self, service: str, sent: Sequence[Event], confirmed: Sequence[Event] | None = None
    ) -> None:
        """Wait until the queue is empty, and check that nothing is lost, double or unexpected.

        Each event must have been confirmed.
        """
        self.drained(service)
        verdict = self.verdict(service, sent, sent if confirmed is None else confirmed)
        verdict.require(confirmed_at_least=len(ids(sent)))

    def parked(self, service: str, expect: int) -> list[Message]:
        """Take the dead letters, and check that there are exactly this many."""
        found = self.broker.drain(f"{service}.dead-letter", expect=expect)
        assert len(found) == expect, f"{len(found)} dead letters, {expect} expected: {found}"
        return found

    def waiting(self, queue: str) -> list[dict[str, Any]]:
        """Return a queue's messages as the management API shows them, and leave them in it."""
        asked = {"count": 1000, "ackmode": "ack_requeue_true", "encoding": "auto"}
        found: Any = self.servers.rabbitmq.management("POST", f"/api/queues/%2f/{queue}/get", asked)
        return [message["properties"] for message in found]

    def times_returned(self, queue: str) -> list[int]:
        """Return the delivery counts of the waiting messages that were ever requeued."""
        headers = (properties.get("headers", {}) for properties in self.waiting(queue))
        return [each["x-delivery-count"] for each in headers if "x-delivery-count" in each]

    def counters(self, noun: str, *, prefix: str = "") -> dict[str, int]:
        """Return a service's counters of outcomes, by outcome, without those that are 0."""
        names = ("received", *OUTCOMES)
        counts = {name: self.statsd.count(f"{prefix}{noun}_{name}") for name in names}
        return {name: number for name, number in counts.items() if number}

    def counters_add_up(self, noun: str, *, prefix: str = "") -> None:
        """Wait until there were deliveries, and each is counted under exactly one outcome."""

        def add_up() -> None:
            counts = self.counters(noun, prefix=prefix)
            received = counts.pop("received", 0)
            assert received, "there was no delivery"
            assert received == sum(counts.values()), self.statsd.counts()

        eventually(add_up)

    def each_delivered_once(self, noun: str, sent: int) -> None:
        """Wait until all deliveries are settled, and check that none was redelivered."""

        def once() -> None:
            counts = self.counters(noun)
            settled = counts.get("processed", 0) + counts.get("processed_skipped", 0)
            assert counts.get("received") == settled == sent, f"{sent} sent, {counts}"

        eventually(once)
