"""A connection that recovers: how soon, to which node, and what ends it for good."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from itertools import pairwise
from random import Random
from typing import Any

import pytest

from fakes.amqp import Rabbit
from idempotent_consumer.amqp import TCP_OPTIONS
from idempotent_consumer.bus import CLOSE_TIMEOUT_S, ClientChannel, RecoveringConnection
from idempotent_consumer.testing.broker import Queue

AT_ONCE_S = 0.25
"""The longest wait after a first failure."""

TIMES = 30
NODES = ["a", "b", "c"]


class Defect(Exception):
    """What no code of ours should raise."""


@pytest.fixture
def rabbit() -> Iterator[Rabbit]:
    rabbit = Rabbit()
    yield rabbit
    rabbit.loop.kill()


def connection_to(rabbit: Rabbit, nodes: list[str] | None = None) -> RecoveringConnection:
    return RecoveringConnection(
        "rabbitmq",
        [f"amqp://{node}/" for node in nodes or ["h"]],
        TCP_OPTIONS,
        rabbit.system,
        rabbit.health,
        rabbit.log,
    )


@pytest.fixture
def connection(rabbit: Rabbit) -> RecoveringConnection:
    return connection_to(rabbit)


@pytest.fixture
def running(rabbit: Rabbit, connection: RecoveringConnection) -> Any:
    """Keep the connection, which is ready as soon as it is open."""
    return rabbit.start(connection.run(ready_until_lost(connection)))


def ready_until_lost(connection: RecoveringConnection) -> Callable[[ClientChannel], Any]:
    async def use(client: ClientChannel) -> None:
        connection.ready()
        await client.reply()

    return use


def defects(error: BaseException) -> list[BaseException]:
    """Return what is in an exception group."""
    if isinstance(error, BaseExceptionGroup):
        return [each for inner in error.exceptions for each in defects(inner)]
    return [error]


# How soon.


def hold(rabbit: Rabbit, seconds: float) -> float:
    """Let a connection be there for so long; return the wait until the next."""
    rabbit.loop.advance(seconds)
    return rabbit.lose_and_wait_s()


@pytest.mark.usefixtures("running")
def test_a_connection_that_held_is_followed_by_another_at_once(rabbit: Rabbit) -> None:
    assert max(hold(rabbit, 11) for _ in range(TIMES)) <= AT_ONCE_S


@pytest.mark.usefixtures("running")
def test_connections_that_do_not_hold_follow_each_other_ever_more_slowly(rabbit: Rabbit) -> None:
    """Each of them costs every delivery in hand one of its returns."""
    assert max(hold(rabbit, 9) for _ in range(TIMES)) > 4 * AT_ONCE_S
    assert hold(rabbit, 11) <= AT_ONCE_S


@pytest.mark.usefixtures("running")
def test_a_broker_that_refuses_is_asked_ever_more_slowly(rabbit: Rabbit) -> None:
    """Also when the connection before had held."""
    rabbit.broker.away = True
    assert hold(rabbit, 11) <= AT_ONCE_S
    times_s = [rabbit.next_attempt_s() for _ in range(TIMES)]
    assert max(later - sooner for sooner, later in pairwise(times_s)) > 4 * AT_ONCE_S


@pytest.mark.usefixtures("running")
def test_health_and_log_say_what_is_missing_and_since_when_it_is_back(rabbit: Rabbit) -> None:
    assert rabbit.health.missing == {}
    rabbit.lose()
    lost = "Stream connection lost: ConnectionResetError(104, 'reset')"
    assert rabbit.health.missing == {"rabbitmq": lost}
    rabbit.next_attempt_s()
    assert rabbit.health.missing == {}
    warning, connected = rabbit.lines.entries[1:]
    again_in_s = warning.pop("again_in_s")
    assert 0 <= again_in_s <= AT_ONCE_S
    assert warning == {
        "event": "no connection to RabbitMQ, trying again",
        "log_level": "warning",
        "connection": "rabbitmq",
        "error": lost,
        "node": "h:5672",
    }
    assert connected == {
        "event": "connected to RabbitMQ",
        "log_level": "info",
        "connection": "rabbitmq",
        "node": "h:5672",
    }


@pytest.mark.usefixtures("connection")
def test_before_the_first_connection_health_says_so(rabbit: Rabbit) -> None:
    assert rabbit.health.missing == {"rabbitmq": "not connected yet"}


# To which node.


def nodes_tried(rabbit: Rabbit, nodes: list[str], times: int) -> list[str]:
    rabbit.broker.away = True
    connection = connection_to(rabbit, nodes)
    rabbit.start(connection.run(ready_until_lost(connection)))
    while len(rabbit.attempts) < times:
        rabbit.next_attempt_s()
    return [node for _, node in rabbit.attempts]


def test_each_node_is_tried_before_any_is_tried_again(rabbit: Rabbit) -> None:
    tried = nodes_tried(rabbit, NODES, 150)
    assert all(sorted(tried[at : at + 3]) == NODES for at in range(0, 150, 3))


def test_the_node_that_was_lost_is_never_the_next(rabbit: Rabbit) -> None:
    assert all(one != other for one, other in pairwise(nodes_tried(rabbit, NODES, 300)))


def test_the_first_node_is_a_random_one() -> None:
    first = set()
    for seed in range(100):
        rabbit = Rabbit()
        rabbit.system.random.setstate(Random(seed).getstate())
        first.add(nodes_tried(rabbit, NODES, 1)[0])
        rabbit.loop.kill()
    assert first == set(NODES)


@pytest.mark.parametrize("nodes", [["a"], ["a", "b"]])
def test_one_node_or_two_are_tried_in_turn(rabbit: Rabbit, nodes: list[str]) -> None:
    tried = nodes_tried(rabbit, nodes, 20)
    assert all(set(tried[at : at + len(nodes)]) == set(nodes) for at in range(18))


# What ends it.


def test_a_channel_that_the_broker_closes_is_followed_by_another_connection(
    rabbit: Rabbit,
) -> None:
    async def declare_wrongly(client: ClientChannel) -> None:
        client.channel.queue_declare("order", durable=True, arguments={"x-max-length": 1})
        await client.reply()

    rabbit.broker.queues["order"] = Queue("order", {"x-max-length": 2})
    rabbit.start(connection_to(rabbit).run(declare_wrongly))
    assert "rabbitmqctl delete_queue" in rabbit.health.missing["rabbitmq"]
    assert rabbit.connection.is_closed
    rabbit.next_attempt_s()
    assert len(rabbit.attempts) == 2


def test_what_was_asked_of_a_channel_that_had_gone_is_a_loss_with_its_own_reason(
    rabbit: Rabbit, connection: RecoveringConnection
) -> None:
    """pika refuses to send: no defect, as nobody could have known."""

    async def declare(client: ClientChannel) -> None:
        client.channel.is_open = False
        client.lose("the first reason")
        client.channel.queue_declare("order")

    rabbit.start(connection.run(declare))
    assert rabbit.health.missing == {"rabbitmq": "the first reason"}


async def fail(_: ClientChannel) -> None:
    raise Defect


async def fail_in_a_callback(client: ClientChannel) -> None:
    def callback(*_: object) -> None:
        raise Defect

    client.channel.basic_qos(prefetch_count=1, callback=client.callback(callback))
    await client.reply()


async def fail_in_a_callback_behind_the_loss(client: ClientChannel) -> None:
    def callback(*_: object) -> None:
        client.lose("a loss")
        raise Defect

    client.channel.basic_qos(prefetch_count=1, callback=client.callback(callback))
    await client.reply()


@pytest.mark.parametrize("use", [fail, fail_in_a_callback, fail_in_a_callback_behind_the_loss])
def test_a_defect_ends_it_and_is_no_lost_connection(
    rabbit: Rabbit, connection: RecoveringConnection, use: Callable[[ClientChannel], Any]
) -> None:
    running = rabbit.start(connection.run(use))
    assert running.done()
    assert [type(error) for error in defects(running.exception())] == [Defect]
    assert rabbit.connection.is_closed
    assert rabbit.said("no connection to RabbitMQ, trying again") == []
    rabbit.loop.run_until_complete(connection.close())


# The end.


def close(rabbit: Rabbit, connection: RecoveringConnection) -> float:
    """Close it; return how long that took."""
    began_s = rabbit.loop.time()
    rabbit.loop.run_until_complete(connection.close())
    return rabbit.loop.time() - began_s


def test_it_closes_its_connection_and_opens_no_other(
    rabbit: Rabbit, connection: RecoveringConnection, running: Any
) -> None:
    assert close(rabbit, connection) == 0
    assert rabbit.connection.is_closed
    rabbit.loop.advance(60)
    assert running.result() is None
    assert len(rabbit.attempts) == 1


def test_it_closes_while_it_waits_for_the_next_attempt(
    rabbit: Rabbit, connection: RecoveringConnection, running: Any
) -> None:
    rabbit.lose()
    assert close(rabbit, connection) == 0
    rabbit.loop.advance(60)
    assert running.result() is None
    assert len(rabbit.attempts) == 1


def test_it_closes_while_a_connection_is_being_opened(
    rabbit: Rabbit, connection: RecoveringConnection
) -> None:
    rabbit.broker.latency_s = lambda: 5.0
    running = rabbit.start(connection.run(fail))
    assert close(rabbit, connection) <= CLOSE_TIMEOUT_S
    rabbit.loop.advance(60)
    assert running.result() is None
    assert rabbit.broker.sessions == []


def test_a_broker_that_does_not_answer_is_left_to_itself(
    rabbit: Rabbit, connection: RecoveringConnection, running: Any
) -> None:
    rabbit.fall_silent()
    assert close(rabbit, connection) == CLOSE_TIMEOUT_S
    assert running.done()


def test_a_broker_that_does_not_answer_the_end_of_a_connection_does_not_hold_up_the_next(
    rabbit: Rabbit, connection: RecoveringConnection
) -> None:
    clients: list[ClientChannel] = []

    async def use(client: ClientChannel) -> None:
        clients.append(client)
        await client.reply()

    rabbit.start(connection.run(use))
    rabbit.fall_silent()
    clients[0].lose("it is of no use")
    lost_s = rabbit.loop.time()
    assert rabbit.next_attempt_s() - lost_s <= CLOSE_TIMEOUT_S + AT_ONCE_S
    called: list[object] = []
    clients[0].callback(called.append)("what the broker sends when it goes on")
    clients[1].callback(called.append)("what it sends on the connection that is used")
    assert called == ["what it sends on the connection that is used"]


def test_it_can_be_closed_before_it_was_run(
    rabbit: Rabbit, connection: RecoveringConnection
) -> None:
    assert close(rabbit, connection) == 0
    running = rabbit.start(connection.run(fail))
    assert running.result() is None
    assert rabbit.attempts == []


def test_a_cancelled_run_closes_its_connection(
    rabbit: Rabbit, connection: RecoveringConnection, running: Any
) -> None:
    """As when another task of the service has a defect."""
    running.cancel()
    rabbit.loop.run_until_idle()
    assert running.cancelled()
    assert rabbit.connection.is_closed
    rabbit.loop.run_until_complete(asyncio.wait_for(connection.close(), 1))
