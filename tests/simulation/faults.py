"""What happens to the world at a time: the broker, etcd and the network fail."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from pika.exceptions import StreamLostError

from idempotent_consumer.testing.amqp import Connection
from idempotent_consumer.testing.broker import ChannelError, ServerChannel
from simulation.broker import SimulatedBroker
from simulation.etcd import SimulatedEtcd
from simulation.trace import Trace

HEARTBEATS_S = 20.0
"""A connection without a sign of life is given up after so long."""


class Faults:
    """The hand that does it."""

    def __init__(
        self, rng: Random, broker: SimulatedBroker, etcd: SimulatedEtcd, trace: Trace
    ) -> None:
        self._rng, self._broker, self._etcd, self._trace = rng, broker, etcd, trace
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
        self._etcd.faulty = self._broker.faulty = False
        self._etcd.away_until_s, self._broker.away = 0.0, False
        self._etcd.store.out_of_space = False

    def cut(self, connection: Connection) -> None:
        """Lose a connection: each side notices it in its own time, and some frames arrive."""
        rng, agenda = self._rng, self._broker.agenda
        lost = connection.to_broker.cut(rng.randint(0, connection.to_broker.under_way))
        lost += connection.to_client.cut(rng.randint(0, connection.to_client.under_way))
        self._trace.note(connection.loop.name, f"loses a connection, and {lost} frames with it")
        now_s, slow_s = agenda.now_s, rng.choice([0.01, HEARTBEATS_S])
        waits_s = max(0.0, connection.to_broker.idle_at_s - now_s) + rng.uniform(0, slow_s)
        agenda.later(waits_s, connection.end_session)
        waits_s = max(0.0, connection.to_client.idle_at_s - now_s) + rng.uniform(0, slow_s)
        error = StreamLostError("reset")
        agenda.later(waits_s, lambda: connection.lost(error), connection.loop)

    def leave(self, connection: Connection) -> None:
        """End a connection whose process is gone; what it had not written yet is lost."""
        agenda = self._broker.agenda
        connection.to_broker.cut(self._rng.randint(0, connection.to_broker.under_way))
        self._broker.connections.remove(connection)
        waits_s = max(0.0, connection.to_broker.idle_at_s - agenda.now_s)
        agenda.later(waits_s + self._rng.expovariate(20), connection.end_session)

    def go_silent(self, connection: Connection, seconds: float) -> None:
        """Let the broker give up a connection whose process is frozen."""
        session = connection.session
        if session is None or seconds < HEARTBEATS_S:
            return

        def give_up() -> None:
            if session.alive:
                self._trace.fault("heartbeats missed", connection.loop.name)
                session.end()
                error = StreamLostError("closed by the broker")
                connection.to_broker.cut(0)
                connection.to_client.send(lambda: connection.lost(error))

        self._broker.agenda.later(HEARTBEATS_S, give_up)

    def _etcd_away(self, kind: str, least_s: float, most_s: float) -> None:
        etcd, seconds = self._etcd, self._rng.uniform(least_s, most_s)
        self._trace.fault(kind, "etcd", round(seconds, 1))
        etcd.away_until_s = max(etcd.away_until_s, etcd.agenda.now_s + seconds)
        if self._rng.random() < 0.5:
            etcd.end_watches()

    def _out_of_space(self) -> None:
        store, seconds = self._etcd.store, self._rng.uniform(1.0, 10.0)
        self._trace.fault("etcd out of space", "etcd", round(seconds, 1))
        store.out_of_space = True

        def healed() -> None:
            store.out_of_space = False

        self._etcd.agenda.later(seconds, healed)

    def _revoke(self) -> None:
        lease = self._etcd.store.lease_of_claims(self._rng)
        if lease is not None:
            self._trace.fault("lease revoked", "etcd", lease)
            self._etcd.store.revoke(lease)

    def _one(self, suits: Callable[[Connection], bool]) -> Connection | None:
        found = [one for one in self._broker.connections if suits(one)]
        return self._rng.choice(found) if found else None

    def _lose_one(self) -> None:
        connection = self._one(lambda _: True)
        if connection is not None:
            self._trace.fault("connection lost", connection.loop.name)
            self.cut(connection)

    def _close_channel(self) -> None:
        connection = self._one(lambda c: bool(_channels(c)))
        if connection is not None and connection.session is not None:
            self._trace.fault("channel closed", connection.loop.name)
            error = ChannelError(541, "INTERNAL_ERROR")
            connection.session.close_channel(_channels(connection)[0], error)

    def _cancel_consumer(self) -> None:
        connection = self._one(lambda c: any(channel.consumers for channel in _channels(c)))
        if connection is not None:
            self._trace.fault("consumer cancelled", connection.loop.name)
            (channel,) = _channels(connection)
            channel.cancelled_by_broker(next(iter(channel.consumers.values())))

    def _restart_broker(self) -> None:
        broker, seconds = self._broker, self._rng.uniform(0.5, 10.0)
        self._trace.fault("broker restarted", "broker", round(seconds, 1))
        broker.away, broker.away_until_s = True, broker.agenda.now_s + seconds
        for connection in list(broker.connections):
            self.cut(connection)

        def back() -> None:
            if broker.agenda.now_s >= broker.away_until_s:
                broker.away = False

        broker.agenda.later(seconds, back)

    def alarm(self, least_s: float, most_s: float) -> None:
        """Let the broker run out of memory, or of disk: it reads nothing more of what is sent."""
        broker, seconds = self._broker, self._rng.uniform(least_s, most_s)
        self._trace.fault("alarm", "broker", round(seconds, 1))
        until_s = broker.alarm_until_s = broker.agenda.now_s + seconds
        broker.set_alarm(True)

        def over() -> None:
            if broker.alarm_until_s == until_s:
                broker.set_alarm(False)

        broker.agenda.later(seconds, over)

    def _delete_queue(self) -> None:
        queues = self._broker.queues
        empty = [n for n in self._broker.retry_queues if n in queues and not queues[n].ready]
        if empty:
            queue = self._rng.choice(empty)
            self._trace.fault("queue deleted", "broker", queue)
            self._broker.delete_queue(queue)


def _channels(connection: Connection) -> list[ServerChannel]:
    """Return the channels that the broker has with a connection."""
    session = connection.session
    return list(session.channels.values()) if session is not None and session.alive else []
