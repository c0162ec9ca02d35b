"""Deliveries on their way in: arrived, acked, gone back with their channel, or not taken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pika
import pytest

from fakes.amqp import Rabbit
from idempotent_consumer.amqp import TCP_OPTIONS
from idempotent_consumer.bus import (
    ANSWERS_WITHIN_S,
    ASKED_EVERY_S,
    GONE_WITHIN_S,
    LAST_ACKS_S,
    MAX_BYTES_IN_FLIGHT,
    Delivery,
    Intake,
    prefetch,
    queue_arguments,
)
from idempotent_consumer.settings import Settings

SETTINGS = Settings(rabbitmq_urls=("amqp://h/",))
PREFETCH = 10


class Defect(Exception):
    """What no code of ours should raise."""


@pytest.fixture
def rabbit() -> Iterator[Rabbit]:
    rabbit = Rabbit()
    yield rabbit
    rabbit.loop.kill()


@pytest.fixture
def returned() -> list[int]:
    return []


@pytest.fixture
def intake(rabbit: Rabbit, returned: list[int]) -> Intake:
    return Intake(
        "order", SETTINGS, PREFETCH, rabbit.system, rabbit.health, rabbit.log, returned.append
    )


@pytest.fixture
def running(rabbit: Rabbit, intake: Intake) -> Any:
    """Let it consume."""
    return rabbit.start(intake.run())


def publish(rabbit: Rabbit, *bodies: bytes) -> None:
    for body in bodies:
        rabbit.broker.publish("events", "new_order", body)
    rabbit.loop.run_until_idle()


def arrived(rabbit: Rabbit, intake: Intake) -> list[Delivery]:
    """Return what has arrived by now; none is an empty list."""
    task = rabbit.start(intake.deliveries())
    if not task.done():
        task.cancel()
        rabbit.loop.run_until_idle()
        return []
    deliveries: list[Delivery] = task.result()
    return deliveries


def acked(rabbit: Rabbit) -> list[bytes]:
    return [message.body for message in rabbit.broker.acked]


def ready(rabbit: Rabbit) -> list[bytes]:
    return rabbit.broker.queues["order"].bodies


@pytest.mark.usefixtures("running")
def test_what_a_service_consumes_is_declared_and_bound(rabbit: Rabbit) -> None:
    declared = {queue.name: queue.arguments for queue in rabbit.broker.queues.values()}
    assert declared == queue_arguments("order", SETTINGS.retry_delays)
    assert rabbit.broker.exchanges == {"events": ("topic", [("#", "order")])}
    assert rabbit.health.missing == {}
    assert rabbit.connection.params.tcp_options == TCP_OPTIONS


@pytest.mark.usefixtures("running")
def test_deliveries_come_in_their_order_and_are_acked_once_settled(
    rabbit: Rabbit, intake: Intake
) -> None:
    publish(rabbit, b"1", b"2", b"3")
    deliveries = arrived(rabbit, intake)
    assert [delivery.body for delivery in deliveries] == [b"1", b"2", b"3"]
    assert intake.in_hand == 3
    for number in (0, 2):
        deliveries[number].settle()
    rabbit.do(intake.flush)
    assert (acked(rabbit), intake.in_hand) == ([b"1"], 1)
    rabbit.do(intake.flush_past_gap)
    assert acked(rabbit) == [b"1", b"3"]


@pytest.mark.usefixtures("running")
def test_whoever_waits_for_deliveries_gets_what_comes(rabbit: Rabbit, intake: Intake) -> None:
    waiting = rabbit.start(intake.deliveries())
    assert not waiting.done()
    publish(rabbit, b"1")
    assert [delivery.body for delivery in waiting.result()] == [b"1"]
    assert not rabbit.start(intake.deliveries()).done()


@pytest.mark.usefixtures("running")
def test_a_delivery_of_any_form_arrives(rabbit: Rabbit, intake: Intake) -> None:
    """The empty ones are left to pika."""
    properties = pika.BasicProperties(headers={"x-attempts": 2})
    for body in (b"", b"1"):
        rabbit.broker.publish("events", "new_order", body, properties)
    rabbit.loop.run_until_idle()
    assert [(d.body, d.attempts) for d in arrived(rabbit, intake)] == [(b"", 2), (b"1", 2)]


@pytest.mark.usefixtures("running")
def test_no_more_are_in_hand_than_the_prefetch(rabbit: Rabbit, intake: Intake) -> None:
    publish(rabbit, *(b"%d" % number for number in range(PREFETCH + 5)))
    assert len(arrived(rabbit, intake)) == PREFETCH


@pytest.mark.parametrize(("batch_size", "expected"), [(1, 8), (512, 4096), (100_000, 32_767)])
def test_the_prefetch_is_for_the_batches_in_flight_and_as_many_behind_them(
    batch_size: int, expected: int
) -> None:
    assert prefetch(batch_size) == expected


@pytest.mark.usefixtures("running")
def test_what_is_unacked_comes_again_on_another_channel_and_is_settled_there_alone(
    rabbit: Rabbit, intake: Intake, returned: list[int]
) -> None:
    publish(rabbit, b"1", b"2")
    first = arrived(rabbit, intake)
    first[0].settle()
    rabbit.lose_and_wait_s()
    assert returned == [1]
    again = arrived(rabbit, intake)
    assert [delivery.body for delivery in again] == [b"1", b"2"]
    assert not any(delivery.alive or delivery.settle() for delivery in first)
    rabbit.do(intake.flush_past_gap)
    assert acked(rabbit) == []
    again[1].settle()
    rabbit.do(intake.flush_past_gap)
    assert acked(rabbit) == [b"2"]
    assert (again[1].epoch.number, again[1].tag) == (2, 2)


@pytest.mark.usefixtures("running")
def test_what_had_arrived_on_a_lost_channel_is_handed_over_all_the_same(
    rabbit: Rabbit, intake: Intake
) -> None:
    """It is counted as returned, and so as received."""
    publish(rabbit, b"1")
    rabbit.lose()
    assert [delivery.alive for delivery in arrived(rabbit, intake)] == [False]


@pytest.mark.usefixtures("running")
def test_each_channel_is_told_once_as_returned(
    rabbit: Rabbit, intake: Intake, returned: list[int]
) -> None:
    publish(rabbit, b"1")
    rabbit.broker.delete_queue("order")
    rabbit.loop.advance(GONE_WITHIN_S)
    assert returned == [1]
    rabbit.next_attempt_s()
    rabbit.lose_and_wait_s()
    assert returned == [1, 0]
    publish(rabbit, b"2")
    assert [delivery.body for delivery in arrived(rabbit, intake)] == [b"1", b"2"]


# A consumer that the broker cancels.


def cancel(rabbit: Rabbit) -> None:
    """Cancel the consumer of a queue that stays, as after its consumer time-out."""
    (consumer,) = rabbit.broker.queues["order"].consumers
    consumer.channel.cancelled_by_broker(consumer)
    rabbit.loop.run_until_idle()


def why(rabbit: Rabbit) -> list[str]:
    """Return why connections have been lost."""
    return [line["error"] for line in rabbit.lines.entries if "error" in line]


@pytest.mark.usefixtures("running")
def test_a_queue_that_is_gone_was_deleted(rabbit: Rabbit) -> None:
    rabbit.broker.delete_queue("order")
    rabbit.loop.advance(GONE_WITHIN_S)
    (deleted,) = why(rabbit)
    assert "no queue 'order' in vhost '/'" in deleted
    assert deleted.endswith(": it was deleted, and is declared anew")
    rabbit.next_attempt_s()
    assert len(rabbit.broker.queues["order"].consumers) == 1


@pytest.mark.usefixtures("running")
def test_a_queue_that_is_there_means_that_a_delivery_was_unacked_for_too_long(
    rabbit: Rabbit,
) -> None:
    """The oldest one in hand tells for how long: until the cancel, not until the queue was seen."""
    publish(rabbit, b"1")
    rabbit.loop.advance(7)
    publish(rabbit, b"2")
    rabbit.loop.advance(1)
    cancel(rabbit)
    rabbit.loop.advance(GONE_WITHIN_S)
    (cancelled,) = why(rabbit)
    assert "longer than the broker's consumer_timeout (the oldest for 8.0 s)" in cancelled
    assert "deleted" not in cancelled


@pytest.mark.usefixtures("running")
def test_a_delivery_that_was_acked_meanwhile_is_not_said_to_be_held(rabbit: Rabbit) -> None:
    cancel(rabbit)
    rabbit.loop.advance(GONE_WITHIN_S)
    assert "consumer_timeout (none is unacked now)" in why(rabbit)[0]


@pytest.mark.usefixtures("running")
def test_a_deleted_queue_is_looked_for_only_once_it_can_be_gone(rabbit: Rabbit) -> None:
    """The broker cancels consumers first: asked at once, it says that the queue is there."""
    cancel(rabbit)
    del rabbit.broker.queues["order"]
    rabbit.loop.advance(GONE_WITHIN_S)
    assert "it was deleted" in why(rabbit)[0]


def test_a_cancel_that_comes_with_the_answer_to_consuming_is_not_missed(
    rabbit: Rabbit, intake: Intake
) -> None:
    """In one read of the socket, as when the queue is deleted in that moment."""
    rabbit.broker.latency_s = lambda: 0.1
    rabbit.start(intake.run())
    queues = rabbit.broker.queues
    rabbit.loop.agenda.run(enough=lambda: "order" in queues and bool(queues["order"].consumers))
    rabbit.broker.delete_queue("order")
    rabbit.loop.advance(10)
    assert len(queues["order"].consumers) == 1


@pytest.mark.usefixtures("running")
def test_what_a_cancelled_consumer_holds_goes_back_and_another_consumes(
    rabbit: Rabbit, returned: list[int]
) -> None:
    """Its channel would keep the deliveries that are not overdue, and get no others."""
    publish(rabbit, b"1", b"2", b"3")
    cancel(rabbit)
    rabbit.loop.advance(GONE_WITHIN_S)
    assert returned == [3]
    rabbit.next_attempt_s()
    (consumer,) = rabbit.broker.queues["order"].consumers
    assert len(consumer.channel.unacked) == 3


@pytest.mark.usefixtures("running")
def test_a_connection_that_is_lost_meanwhile_is_lost_for_its_own_reason(rabbit: Rabbit) -> None:
    cancel(rabbit)
    rabbit.lose()
    rabbit.loop.advance(GONE_WITHIN_S)
    (lost,) = why(rabbit)
    assert "cancelled" not in lost


# A broker that is cut off from the others.


CLUSTER = Settings(rabbitmq_urls=("amqp://a/", "amqp://b/"))


def intake_of(rabbit: Rabbit, settings: Settings, max_bytes: int = MAX_BYTES_IN_FLIGHT) -> Intake:
    """Return an intake that consumes."""
    system, health, log = rabbit.system, rabbit.health, rabbit.log
    intake = Intake("order", settings, PREFETCH, system, health, log, lambda _: None, max_bytes)
    rabbit.start(intake.run())
    return intake


def test_a_broker_of_several_that_has_a_majority_is_kept(rabbit: Rabbit) -> None:
    intake = intake_of(rabbit, CLUSTER)
    rabbit.loop.advance(20 * (ASKED_EVERY_S + ANSWERS_WITHIN_S))
    assert len(rabbit.attempts) == 1
    publish(rabbit, b"1")
    assert [delivery.body for delivery in arrived(rabbit, intake)] == [b"1"]


def test_a_broker_that_answers_nothing_that_takes_a_majority_is_left_for_another(
    rabbit: Rabbit,
) -> None:
    """It still answers heartbeats, so nothing else would tell."""
    intake_of(rabbit, CLUSTER)
    rabbit.fall_silent()
    rabbit.loop.advance(ASKED_EVERY_S + ANSWERS_WITHIN_S + 1)
    assert why(rabbit) == ["no answer within 5 s: this broker may be cut off from the others"]
    rabbit.next_attempt_s()
    assert {host for _, host in rabbit.attempts} == {"a", "b"}


def test_a_single_broker_is_not_asked(rabbit: Rabbit) -> None:
    """There is no other to go to."""
    intake_of(rabbit, SETTINGS)
    rabbit.fall_silent()
    rabbit.loop.advance(20 * (ASKED_EVERY_S + ANSWERS_WITHIN_S))
    assert why(rabbit) == []


@pytest.mark.parametrize("after_s", [ASKED_EVERY_S / 2, ASKED_EVERY_S])
def test_a_cancel_by_a_broker_of_several_is_a_cancel(rabbit: Rabbit, after_s: float) -> None:
    intake_of(rabbit, CLUSTER)
    rabbit.loop.advance(after_s)
    cancel(rabbit)
    rabbit.loop.advance(ASKED_EVERY_S + GONE_WITHIN_S)
    assert "the broker cancelled the consumer" in why(rabbit)[0]


def test_a_broker_of_several_is_not_left_while_nothing_is_read(rabbit: Rabbit) -> None:
    """Its answer may have come: it stands behind deliveries that wait."""
    intake = intake_of(rabbit, CLUSTER, max_bytes=0)
    publish(rabbit, b"1")
    rabbit.loop.advance(20 * (ASKED_EVERY_S + ANSWERS_WITHIN_S))
    assert why(rabbit) == []
    (delivery,) = arrived(rabbit, intake)
    delivery.settle()
    rabbit.fall_silent()
    rabbit.loop.advance(ASKED_EVERY_S + 2 * ANSWERS_WITHIN_S + 1)
    assert len(why(rabbit)) == 1


# Large deliveries.


def test_what_is_in_hand_is_bounded_in_bytes(rabbit: Rabbit) -> None:
    """The bodies and what stands in the properties, which is two bytes at the least."""
    intake = intake_of(rabbit, SETTINGS, max_bytes=100)
    publish(rabbit, *(b"%d" % number * 48 for number in range(1, 6)))
    first = arrived(rabbit, intake)
    assert [delivery.body[:1] for delivery in first] == [b"1", b"2", b"3"]
    assert arrived(rabbit, intake) == []
    for delivery in first[:2]:
        delivery.settle()
    assert [delivery.body[:1] for delivery in arrived(rabbit, intake)] == [b"4", b"5"]
    (warning,) = rabbit.said(
        "what is in flight is large: no more is read until half of it is settled"
    )
    assert (warning["deliveries"], warning["bytes"]) == (3, 100)


def test_one_delivery_that_is_larger_than_the_bound_is_taken_alone(rabbit: Rabbit) -> None:
    intake = intake_of(rabbit, SETTINGS, max_bytes=100)
    publish(rabbit, b"1" * 1000, b"2")
    (large,) = arrived(rabbit, intake)
    large.settle()
    assert [delivery.body for delivery in arrived(rabbit, intake)] == [b"2"]


def test_a_channel_lost_while_nothing_is_read_is_followed_by_another(rabbit: Rabbit) -> None:
    intake = intake_of(rabbit, SETTINGS, max_bytes=0)
    publish(rabbit, b"1", b"2")
    rabbit.lose_and_wait_s()
    rabbit.loop.run_until_idle()
    assert [(d.body, d.alive) for d in arrived(rabbit, intake)] == [(b"1", False), (b"1", True)]


def test_at_the_stop_what_was_not_read_goes_back_and_the_close_is_agreed(rabbit: Rabbit) -> None:
    intake = intake_of(rabbit, SETTINGS, max_bytes=0)
    publish(rabbit, b"1", b"2")
    rabbit.do(intake.stop)
    assert [delivery.body for delivery in arrived(rabbit, intake)] == [b"1"]
    began_s = rabbit.loop.time()
    rabbit.loop.run_until_complete(intake.close())
    assert rabbit.loop.time() - began_s == LAST_ACKS_S
    assert sorted(ready(rabbit)) == [b"1", b"2"]


# The stop.


@pytest.mark.usefixtures("running")
def test_after_the_stop_nothing_more_is_taken_and_what_is_in_hand_can_be_settled(
    rabbit: Rabbit, intake: Intake
) -> None:
    publish(rabbit, b"1")
    (delivery,) = arrived(rabbit, intake)
    assert rabbit.connection.reader is not None
    rabbit.do(intake.stop)
    assert rabbit.connection.reader is None, "it would go on past pika, which hands deliveries back"
    publish(rabbit, b"2")
    assert arrived(rabbit, intake) == []
    assert ready(rabbit) == [b"2"]
    delivery.settle()
    rabbit.do(intake.flush)
    assert acked(rabbit) == [b"1"]


def test_what_is_on_its_way_at_the_stop_goes_back(rabbit: Rabbit, intake: Intake) -> None:
    rabbit.broker.latency_s = lambda: 0.1
    rabbit.start(intake.run())
    rabbit.loop.advance(5)
    rabbit.broker.publish("events", "new_order", b"1")
    rabbit.do(intake.stop)
    rabbit.loop.advance(1)
    assert (arrived(rabbit, intake), intake.in_hand) == ([], 0)
    assert ready(rabbit) == [b"1"]


def test_stopped_before_it_is_connected_it_consumes_nothing(
    rabbit: Rabbit, intake: Intake, returned: list[int]
) -> None:
    rabbit.broker.latency_s = lambda: 0.1
    running = rabbit.start(intake.run())
    rabbit.do(intake.stop)
    rabbit.loop.advance(5)
    assert rabbit.broker.queues["order"].consumers == []
    assert rabbit.broker.sessions == []
    rabbit.loop.run_until_complete(intake.close())
    assert (running.result(), returned) == (None, [])


def test_a_channel_lost_after_the_stop_is_followed_by_no_consumer(
    rabbit: Rabbit, intake: Intake, running: Any, returned: list[int]
) -> None:
    publish(rabbit, b"1")
    rabbit.do(intake.stop)
    rabbit.lose()
    rabbit.loop.advance(10)
    assert rabbit.broker.queues["order"].consumers == []
    assert (intake.in_hand, returned) == (0, [1])
    rabbit.loop.run_until_complete(intake.close())
    assert running.done()


def test_it_closes_when_the_last_acks_are_safe_and_the_rest_goes_back(
    rabbit: Rabbit, intake: Intake, running: Any, returned: list[int]
) -> None:
    publish(rabbit, b"1", b"2")
    arrived(rabbit, intake)[0].settle()
    rabbit.do(intake.flush)
    began_s = rabbit.loop.time()
    rabbit.loop.run_until_complete(intake.close())
    assert rabbit.loop.time() - began_s == LAST_ACKS_S
    assert (acked(rabbit), ready(rabbit), returned) == ([b"1"], [b"2"], [1])
    assert running.result() is None


def test_a_defect_in_what_is_told_ends_it(rabbit: Rabbit) -> None:
    def returned(_: int) -> None:
        raise Defect

    intake = Intake("order", SETTINGS, PREFETCH, rabbit.system, rabbit.health, rabbit.log, returned)
    running = rabbit.start(intake.run())
    rabbit.lose()
    with pytest.raises(ExceptionGroup) as raised:
        running.result()
    assert raised.group_contains(Defect)
