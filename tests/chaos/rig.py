"""What most tests need: the servers, what reads them, and what starts services on them."""

from collections.abc import Iterable
from dataclasses import dataclass

from chaos.checks import StartService, assert_handled_once, wait_drained
from chaos.load import ids
from servers.broker import Broker, Event, Message
from servers.counters import StatsdListener
from servers.etcd import Store
from servers.servers import Servers
from servers.wait import eventually

OUTCOMES = (
    "processed",
    "processed_skipped",
    "ignored",
    "conflicted",
    "invalid",
    "failed",
    "retried",
    "returned",
)


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

    def drained(self, *queues: str) -> None:
        """Wait until the queues hold nothing, neither ready nor unacked."""
        wait_drained(self.broker, *queues)

    def handled_once(
        self,
        service: str,
        sent: list[Event],
        confirmed: list[Event] | None = None,
        *,
        parked: Iterable[str] = (),
    ) -> None:
        """Drain a service's queue, and check that nothing is lost, twice, torn or made up.

        Each event must have been confirmed. ``parked`` are the ids taken from the dead letters.
        """
        self.drained(service)
        assert_handled_once(
            service,
            self.store,
            sent=sent,
            confirmed=sent if confirmed is None else confirmed,
            at_least=len(ids(sent)),
            parked=parked,
        )

    def parked(self, service: str, expect: int) -> list[Message]:
        """Take the dead letters out, and check that there are so many and no more."""
        found = self.broker.drain(f"{service}.dead-letter", expect=expect)
        assert len(found) == expect, f"{len(found)} dead letters, {expect} expected: {found}"
        return found

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
