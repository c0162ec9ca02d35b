"""What most tests need: the servers, what reads them, what starts services, and the judgement."""

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
"""Where services write beside their records, a key for each event."""

_IN_STEPS = ("notify", "shipment")
"""Services whose records are claimed, or publishing, before they are done."""


@dataclass(frozen=True)
class Rig:
    """The fixtures `clean`, `broker`, `store`, `statsd` and `start_service`, and their judgement.

    What it checks raises AssertionError; what it waits for it gives 30 s, and draining 60 s.
    """

    servers: Servers
    broker: Broker
    store: Store
    statsd: StatsdListener
    start: StartService

    def drained(self, *queues: str, timeout_s: float = 60.0) -> None:
        """Wait until the queues hold nothing, neither ready nor unacked."""
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
        """Judge a run of a service by etcd's whole history, of its records and of their effects.

        Call it when the queues are drained. ``parked`` are the ids taken from the dead letters.
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
        """Drain a service's queue, and check that nothing is lost, twice, torn or made up.

        Each event must have been confirmed.
        """
        self.drained(service)
        verdict = self.verdict(service, sent, sent if confirmed is None else confirmed)
        verdict.require(confirmed_at_least=len(ids(sent)))

    def parked(self, service: str, expect: int) -> list[Message]:
        """Take the dead letters out, and check that there are so many and no more."""
        found = self.broker.drain(f"{service}.dead-letter", expect=expect)
        assert len(found) == expect, f"{len(found)} dead letters, {expect} expected: {found}"
        return found

    def waiting(self, queue: str) -> list[dict[str, Any]]:
        """Return a queue's messages as the management API shows them, and leave them there."""
        asked = {"count": 1000, "ackmode": "ack_requeue_true", "encoding": "auto"}
        found: Any = self.servers.rabbitmq.management("POST", f"/api/queues/%2f/{queue}/get", asked)
        return [message["properties"] for message in found]

    def times_returned(self, queue: str) -> list[int]:
        """Return how often each waiting message that ever went back did so."""
        headers = (properties.get("headers", {}) for properties in self.waiting(queue))
        return [each["x-delivery-count"] for each in headers if "x-delivery-count" in each]

    def counters(self, noun: str, *, prefix: str = "") -> dict[str, int]:
        """Return a service's counters of outcomes that are not 0, by their ends."""
        names = ("received", *OUTCOMES)
        counts = {name: self.statsd.count(f"{prefix}{noun}_{name}") for name in names}
        return {name: number for name, number in counts.items() if number}

    def counters_add_up(self, noun: str, *, prefix: str = "") -> None:
        """Wait until deliveries have come, and each of them to one counted end."""

        def add_up() -> None:
            counts = self.counters(noun, prefix=prefix)
            received = counts.pop("received", 0)
            assert received, "nothing has come"
            assert received == sum(counts.values()), self.statsd.counts()

        eventually(add_up)

    def each_delivered_once(self, noun: str, sent: int) -> None:
        """Wait until so many have come and all are settled: none comes a second time."""

        def once() -> None:
            counts = self.counters(noun)
            settled = counts.get("processed", 0) + counts.get("processed_skipped", 0)
            assert counts.get("received") == settled == sent, f"{sent} sent, {counts}"

        eventually(once)
