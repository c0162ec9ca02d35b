"""Judges, at the step in which the broker gets it, whether a settling rests on something."""

from __future__ import annotations

from collections import Counter

from idempotent_consumer.event import decode
from idempotent_consumer.names import CONFLICT, FAILED, REASON_HEADER
from simulation.etcd import HistoricStore
from simulation.keys import record_key
from simulation.process import Life
from simulation.trace import Trace
from simulation.workload import Sent


class Auditor:
    """Knows every body that was sent, every copy that was sent on, and what etcd holds."""

    def __init__(self, store: HistoricStore, trace: Trace) -> None:
        self._store, self._trace = store, trace
        self.sent: dict[bytes, Sent] = {}
        self._sent_on: Counter[bytes] = Counter()
        self._rested_on_copies: Counter[bytes] = Counter()
        self.must_not_ack: set[Life] = set()
        self.acks = 0

    def sent_on(self, body: bytes) -> None:
        """Note that the broker has a copy in a retry or the dead-letter queue."""
        self._sent_on[body] += 1
        if body not in self.sent:
            self._trace.violation("a body was changed on its way", body)

    def published(self, body: bytes) -> None:
        """Note an event of the service's own, for which it has no handler itself."""
        event = decode(body)
        self.sent[body] = Sent(body, event.id, event.type, event.digest)

    def copied(
        self, life: Life, body: bytes, headers: dict[str, object], given_s: float | None
    ) -> None:
        """Judge a copy that a process sends on of a message it was first given at this time.

        A failure is one only where the record was looked at, and a conflict is one only with what
        is recorded: a claim is no verdict, its holder may die or fail.
        """
        sent, reason = self.sent[body], headers.get(REASON_HEADER)
        key = record_key(sent.event_id)
        if reason == CONFLICT and not any(
            lineage.recorded.get(key, sent.digest) != sent.digest
            for lineage in self._store.lineages
        ):
            self._trace.violation("parked as a conflict with nothing", life.name, body)
        if (
            reason in (None, FAILED)
            and given_s is not None
            and (life.told_s.get(key, 0.0) < given_s)
        ):
            self._trace.violation(
                "taken for a failure without a look at its record", life.name, body
            )

    def acked(self, life: Life, body: bytes) -> None:
        """Judge an ack: its record is there and done, or a copy of the message is safe."""
        self.acks += 1
        sent = self.sent[body]
        if life in self.must_not_ack:
            self._trace.violation(
                "an ack although etcd is not the one seen before", life.name, body
            )
        if sent.digest and not sent.handled:
            return
        if sent.handled and self._is_done(life, sent):
            return
        self._rested_on_copies[body] += 1
        if self._rested_on_copies[body] > self._sent_on[body]:
            self._trace.violation("early ack", life.name, body)

    def _is_done(self, life: Life, sent: Sent) -> bool:
        key = record_key(sent.event_id)
        if life.lineage is None:
            return False
        for lineage in self._store.lineages[life.lineage :]:
            if lineage.done.get(key) == sent.digest:
                return True
            if lineage.wiped:
                break  # What came after it is another etcd, with which this process has no part.
        return False
