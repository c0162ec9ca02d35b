"""What happens to the world at a time: the broker, etcd and the network fail."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pika.exceptions

from simulation.amqp import Connection
from simulation.broker import Broker
from simulation.etcd import Server
from simulation.trace import Trace

HEARTBEATS_S = 20.0
"""A connection without a sign of life is given up after so long."""


class Faults:
    """The hand that does it."""

    def __init__(
        self,
        rng: Random,
        broker: Broker,
        server: Server,
        trace: Trace,
        connections: Callable[[], list[Connection]],
    ) -> None:
        self._rng, self._broker, self._server, self._trace = rng, broker, server, trace
        self._connections = connections
        self.timed: dict[str, Callable[[], None]] = {
            "etcd away": lambda: self._etcd_away("etcd away", 0.5, 8.0),
            "etcd away for longer than a lease": lambda: self._etcd_away(
                "etcd away for longer than a lease", 16.0, 45.0
            ),
            "etcd out of space": self._out_of_space,
            "lease revoked": self._revoke,
            "connection lost": self._lose_one,
            "channel closed": self._close_channel,
            "consumer cancelled": self._cancel_consumer,
            "broker restarted": self._restart_broker,
            "alarm": lambda: self.alarm(1.0, 15.0),
            "queue deleted": self._delete_queue,
        }

    def stop_all(self) -> None:
        """Let nothing fail any more."""
        self._server.faulty = self._broker.faulty = False
        self._server.away_until_s = self._broker.away_until_s = 0.0
        self._server.store.out_of_space = False

    def cut(self, connection: Connection) -> None:
        """Lose a connection: each side notices it in its own time, and some frames arrive."""
        rng, agenda = self._rng, self._broker.agenda
        lost = connection.to_broker.cut(rng.randint(0, connection.to_broker.under_way))
        lost += connection.to_client.cut(rng.randint(0, connection.to_client.under_way))
        self._trace.note(connection.life.name, f"loses a connection, and {lost} frames with it")
        now_s, session = agenda.now_s, connection.session
        slow_s = rng.choice([0.01, HEARTBEATS_S])
        if session is not None:
            waits_s = max(0.0, connection.to_broker.idle_at_s - now_s) + rng.uniform(0, slow_s)
            agenda.later(waits_s, session.end)
        waits_s = max(0.0, connection.to_client.idle_at_s - now_s) + rng.uniform(0, slow_s)
        error = pika.exceptions.StreamLostError("reset")
        agenda.later(waits_s, lambda: connection.lost(error), connection.life)

    def leave(self, connection: Connection) -> None:
        """End a connection whose process is gone; what it had not written yet is lost."""
        connection.to_broker.cut(self._rng.randint(0, connection.to_broker.under_way))
        session, agenda = connection.session, self._broker.agenda
        if session is not None:
            waits_s = max(0.0, connection.to_broker.idle_at_s - agenda.now_s)
            agenda.later(waits_s + self._rng.expovariate(20), session.end)

    def go_silent(self, connection: Connection, seconds: float) -> None:
        """Let the broker give up a connection whose process is frozen."""
        session = connection.session
        if session is None or seconds < HEARTBEATS_S:
            return

        def give_up() -> None:
            if session.alive:
                self._trace.fault("heartbeats missed", connection.life.name)
                session.end()
                error = pika.exceptions.StreamLostError("closed by the broker")
                connection.to_broker.cut(0)
                connection.to_client.send(lambda: connection.lost(error))

        self._broker.agenda.later(HEARTBEATS_S, give_up)

    def _etcd_away(self, kind: str, least_s: float, most_s: float) -> None:
        seconds = self._rng.uniform(least_s, most_s)
        self._trace.fault(kind, "etcd", round(seconds, 1))
        server = self._server
        server.away_until_s = max(server.away_until_s, server.agenda.now_s + seconds)

    def _out_of_space(self) -> None:
        store, seconds = self._server.store, self._rng.uniform(1.0, 10.0)
        self._trace.fault("etcd out of space", "etcd", round(seconds, 1))
        store.out_of_space = True

        def healed() -> None:
            store.out_of_space = False

        self._server.agenda.later(seconds, healed)

    def _revoke(self) -> None:
        lease = self._server.store.lease_of_claims(self._rng)
        if lease is not None:
            self._trace.fault("lease revoked", "etcd", lease)
            self._server.store.revoke(lease)

    def _one(self, suits: Callable[[Connection], bool]) -> Connection | None:
        found = [connection for connection in self._connections() if suits(connection)]
        return self._rng.choice(found) if found else None

    def _lose_one(self) -> None:
        connection = self._one(lambda _: True)
        if connection is not None:
            self._trace.fault("connection lost", connection.life.name)
            self.cut(connection)

    def _close_channel(self) -> None:
        connection = self._one(
            lambda c: c.session is not None and c.session.alive and c.session.has_channel
        )
        if connection is not None and connection.session is not None:
            self._trace.fault("channel closed", connection.life.name)
            error = pika.exceptions.ChannelClosedByBroker(541, "INTERNAL_ERROR")
            connection.session.close_channel(error)

    def _cancel_consumer(self) -> None:
        connection = self._one(lambda c: c.session is not None and c.session.consumes)
        if connection is not None and connection.session is not None:
            self._trace.fault("consumer cancelled", connection.life.name)
            connection.session.cancel_consumer()

    def _restart_broker(self) -> None:
        seconds = self._rng.uniform(0.5, 10.0)
        self._trace.fault("broker restarted", "broker", round(seconds, 1))
        self._broker.away_until_s = self._broker.agenda.now_s + seconds
        for connection in self._connections():
            self.cut(connection)

    def alarm(self, least_s: float, most_s: float) -> None:
        """Let the broker run out of memory, or of disk: it reads nothing more of what is sent."""
        seconds = self._rng.uniform(least_s, most_s)
        self._trace.fault("alarm", "broker", round(seconds, 1))
        self._broker.alarm_until_s = self._broker.agenda.now_s + seconds
        for connection in self._connections():
            if connection.session is not None:
                connection.session.block()

    def _delete_queue(self) -> None:
        empty = [queue for queue, waiting in self._broker.waiting.items() if not waiting]
        if empty:
            queue = self._rng.choice(empty)
            self._trace.fault("queue deleted", "broker", queue)
            self._broker.declared.discard(queue)
