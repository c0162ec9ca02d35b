"""The RabbitMQ in memory: what a test does with it, beyond what a real one does.

What AMQP has is held to a real RabbitMQ in ``tests/integration/test_broker_contract.py``, and what
a client does is pika's own code.
"""

from __future__ import annotations

from typing import Any

import pytest

from idempotent_consumer.testing.broker import FakeBroker, Queue
from idempotent_consumer.testing.loop import Loop


class Client:
    """A process that consumes "q". ``seen`` has what it is given."""

    def __init__(self, broker: FakeBroker) -> None:
        self.loop, self.seen = Loop(broker.agenda), list[bytes]()
        self.channel: Any = None
        self.do(
            lambda: broker.connect(
                None, on_open_callback=lambda opened: opened.channel(on_open_callback=self._consume)
            )
        )

    def do(self, what: Any) -> None:
        """Do something in a step of the process, and let all follow that needs no time."""
        self.loop.call_soon(what)
        self.loop.run_until_idle()

    def _consume(self, channel: Any) -> None:
        self.channel = channel
        channel.basic_consume("q", lambda *delivered: self.seen.append(delivered[-1]))


@pytest.fixture
def broker() -> FakeBroker:
    broker = FakeBroker(Loop().agenda)
    broker.queues["q"] = Queue("q", {})
    for body in (b"1", b"2", b"3"):
        broker.publish("", "q", body)
    return broker


@pytest.fixture
def client(broker: FakeBroker) -> Client:
    return Client(broker)


def test_what_a_dead_process_has_written_arrives_before_its_end(
    broker: FakeBroker, client: Client
) -> None:
    broker.connections[0].to_broker.latency_s = lambda: 1.0
    client.do(lambda: client.channel.basic_ack(1))
    client.loop.kill()
    broker.gone(client.loop)
    assert broker.acked == []
    broker.agenda.run()
    assert [message.body for message in broker.acked] == [b"1"]
    assert broker.queues["q"].bodies == [b"2", b"3"]
    assert (broker.sessions, broker.connections) == ([], [])


@pytest.mark.parametrize(("kept", "acked"), [(0, []), (1, [b"1"]), (2, [b"1", b"2"])])
def test_what_is_under_way_is_lost_with_a_connection_but_for_what_is_kept(
    broker: FakeBroker, client: Client, kept: int, acked: list[bytes]
) -> None:
    (connection,) = broker.connections
    connection.to_broker.latency_s = lambda: 1.0
    client.do(lambda: [client.channel.basic_ack(tag) for tag in (1, 2)])
    assert broker.lose(connection, kept=(kept, 0), noticed_s=(5.0, 9.0)) == 2 - kept
    client.loop.advance(4.9)
    assert connection.is_open
    assert broker.sessions != []
    client.loop.advance(5)
    assert connection.is_closed
    assert [message.body for message in broker.acked] == acked
    assert broker.queues["q"].bodies == [b"1", b"2", b"3"][kept:]


def test_consumers_take_turns(broker: FakeBroker, client: Client) -> None:
    other = Client(broker)
    for body in (b"4", b"5", b"6"):
        broker.publish("", "q", body)
    client.loop.run_until_idle()
    assert [each.seen[-2:] for each in (client, other)] == [[b"4", b"6"], [b"5"]]


def test_what_arrives_behind_a_cancel_is_handed_back_and_does_not_count(
    broker: FakeBroker, client: Client
) -> None:
    client.loop.call_soon(lambda: client.channel.basic_cancel(client.channel.consumer_tags[0]))
    broker.publish("", "q", b"4")
    client.loop.run_until_idle()
    assert (client.seen[3:], broker.arrived[client.loop]) == ([], 3)
    assert [message.returns for message in broker.queues["q"].ready] == [1]
