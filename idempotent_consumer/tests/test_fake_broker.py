"""The RabbitMQ in memory: what becomes of the frames under way when a connection is lost.

``tests/integration/test_broker_contract.py`` compares the rest with a real RabbitMQ.
"""

from __future__ import annotations

import asyncio

import pytest

from idempotent_consumer.testing.broker import FakeBroker, Queue
from idempotent_consumer.testing.loop import Loop


@pytest.mark.parametrize(("kept", "acked"), [(0, []), (1, [b"1"]), (2, [b"1", b"2"])])
def test_a_lost_connection_loses_all_frames_under_way_but_those_kept(
    kept: int, acked: list[bytes]
) -> None:
    loop = Loop()
    broker = FakeBroker(loop.agenda)
    broker.queues["q"] = Queue("q", {})
    for body in (b"1", b"2", b"3"):
        broker.publish("", "q", body)

    async def ack_two_and_lose_the_connection() -> int:
        opened = loop.create_future()
        connection = broker.connect(
            None,
            on_open_callback=lambda opening: opening.channel(on_open_callback=opened.set_result),
        )
        channel = await opened
        channel.basic_consume("q", lambda *_: None)
        await asyncio.sleep(1)
        connection.to_broker.latency_s = lambda: 1.0
        for tag in (1, 2):
            channel.basic_ack(tag)
        return broker.lose(connection, kept=(kept, 0), noticed_s=(5.0, 9.0))

    assert loop.run_until_complete(ack_two_and_lose_the_connection()) == 2 - kept
    (connection,) = broker.connections
    loop.advance(4.9)
    assert connection.is_open
    assert broker.sessions != []
    loop.advance(5)
    assert connection.is_closed
    assert [message.body for message in broker.acked] == acked
    assert broker.queues["q"].bodies == [b"1", b"2", b"3"][kept:]
