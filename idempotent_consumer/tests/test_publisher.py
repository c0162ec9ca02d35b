"""What is published, when it is sent again, and with which properties."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pika
import pytest
from pika import spec

from fakes.amqp import Rabbit
from idempotent_consumer.amqp import KEEPALIVE
from idempotent_consumer.bus import CLOSE_TIMEOUT_S, Delivery, Epoch
from idempotent_consumer.event import InvalidEvent, Outgoing
from idempotent_consumer.publisher import Message, Publisher, event_message, forwarded_message
from idempotent_consumer.testing.broker import Queue

WHOLE, BARE = pika.BasicProperties(message_id="whole"), pika.BasicProperties(message_id="bare")
QUEUE = "order.retry.1s"
ALARM = "RabbitMQ has an alarm and takes no messages"
FULL = "a queue does not take it now: it may be full, or without a leader"


class Sending(Rabbit):
    """RabbitMQ and a publisher that is connected to it."""

    def __init__(self) -> None:
        super().__init__()
        self.publisher = Publisher(
            ("amqp://localhost/",),
            lambda channel: channel.queue_declare(QUEUE, durable=True, arguments={}),
            self.system,
            self.health,
            self.log,
        )
        self.running = self.start(self.publisher.run())

    def send(
        self, wanted: Callable[[], bool] = lambda: True, body: bytes = b"{}", queue: str = QUEUE
    ) -> asyncio.Future[bool]:
        """Send a message, with everything that follows without time passing."""
        message = Message("", queue, body, WHOLE, BARE, wanted)
        sent: asyncio.Future[bool] = self.do(lambda: self.publisher.send(message))
        return sent

    def confirm(self, *numbers: int, multiple: bool = False) -> None:
        """Confirm messages by their numbers on the channel, one after the other."""
        for number in numbers:
            self.channel.confirm(number, multiple)
            self.loop.run_until_idle()

    @property
    def sent(self) -> list[str]:
        """The properties with which messages have reached the broker, whole or bare."""
        return [each.properties.message_id for each in self.broker.published]

    @property
    def bodies(self) -> list[bytes]:
        return [each.body for each in self.broker.published]


@pytest.fixture
def rabbit() -> Iterator[Sending]:
    rabbit = Sending()
    yield rabbit
    rabbit.loop.kill()


def outcomes(futures: list[asyncio.Future[bool]]) -> list[bool | None]:
    return [future.result() if future.done() else None for future in futures]


# Confirms.


@pytest.mark.parametrize("nacked", [False, True])
@pytest.mark.parametrize(
    ("multiple", "answered"),
    [(True, [True, True, True, None]), (False, [None, None, True, None])],
)
def test_a_confirm_is_for_one_message_or_for_all_up_to_it(
    rabbit: Sending, multiple: bool, answered: list[bool | None], nacked: bool
) -> None:
    """Nacked messages are sent again. Whoever waits for one may have been cancelled."""
    rabbit.broker.confirms, rabbit.broker.nacks = False, lambda _: nacked
    futures = [rabbit.send() for _ in range(4)]
    futures[0].cancel()
    rabbit.confirm(3, multiple=multiple)
    if nacked:
        rabbit.broker.confirms, rabbit.broker.nacks = True, lambda _: False
        rabbit.loop.advance(2)
        assert len(rabbit.sent) == 4 + answered.count(True)
    assert outcomes(futures[1:]) == answered[1:]


# Nacks and losses.


def test_a_nacked_message_is_sent_again_with_all_its_properties(rabbit: Sending) -> None:
    """A queue without a leader nacks for a while, which says nothing about the message."""
    rabbit.broker.nacks = lambda _: True
    future = rabbit.send()
    rabbit.loop.advance(60)
    assert rabbit.publisher.trouble == FULL
    rabbit.broker.nacks = lambda _: False
    rabbit.loop.advance(6)
    assert (future.result(), rabbit.publisher.trouble) == (True, "")
    assert set(rabbit.sent) == {"whole"}
    assert 12 <= len(rabbit.sent) <= 40, "after ever longer waits of at most five seconds"
    rabbit.loop.advance(60)
    assert len(rabbit.attempts) == 1
    line = rabbit.said("RabbitMQ did not take a message, sending it again")[0]
    assert (line["log_level"], line["exchange"], line["routing_key"]) == ("warning", "", QUEUE)
    assert line["error"] == FULL


def test_after_a_confirm_nacked_messages_are_sent_again_soon(rabbit: Sending) -> None:
    for _ in range(20):
        rabbit.broker.nacks = lambda _: True
        rabbit.send()
        rabbit.loop.advance(20)
        rabbit.broker.nacks = lambda _: False
        rabbit.loop.advance(6)
        rabbit.broker.nacks = lambda _: True
        futures = [rabbit.send() for _ in range(10)]
        rabbit.broker.nacks = lambda _: False
        rabbit.loop.advance(1.25)
        assert outcomes(futures) == [True] * 10


def test_messages_lost_together_are_sent_whole_one_after_the_other(rabbit: Sending) -> None:
    """Only if it is alone in flight, a message is known to be the cause."""
    rabbit.broker.confirms = False
    futures = [rabbit.send(body=body) for body in (b"1", b"2")]
    for _ in range(3):
        rabbit.lose_and_wait_s()
    futures.append(rabbit.send(body=b"3"))
    assert rabbit.bodies == [b"1", b"2"] * 3 + [b"1"]
    rabbit.confirm(1, 2, 3)
    assert outcomes(futures) == [True, True, True]
    assert set(rabbit.sent) == {"whole"}


def test_a_message_that_makes_the_broker_close_connections_is_sent_bare(rabbit: Sending) -> None:
    def close_for_it(_queue: str) -> bool:
        last = rabbit.broker.published[-1]
        if (last.body, last.properties.message_id) == (b"it", "whole"):
            rabbit.broker.lose(rabbit.connection)
        return False

    rabbit.broker.confirms, rabbit.broker.nacks = False, close_for_it
    rabbit.lose()
    futures = [rabbit.send(body=body) for body in (b"1", b"2", b"it", b"3", b"4")]
    for _ in range(3):
        rabbit.next_attempt_s()
    rabbit.broker.confirms = True
    rabbit.loop.advance(120)
    assert outcomes(futures) == [True] * 5
    bare = {each.body for each in rabbit.broker.published if each.properties.message_id == "bare"}
    assert bare == {b"it"}
    (line,) = rabbit.said(
        "RabbitMQ closes the connection for a message, sending it without its headers"
    )
    assert (line["log_level"], line["exchange"], line["routing_key"]) == ("warning", "", QUEUE)


def test_a_message_is_sent_bare_after_six_losses_and_before_others(rabbit: Sending) -> None:
    """On a quiet service each message is alone, so a few lost connections say little about it."""
    rabbit.broker.confirms = False
    it = rabbit.send(body=b"it")
    for _ in range(5):
        rabbit.lose_and_wait_s()
    assert rabbit.sent == ["whole"] * 6
    rabbit.lose()
    others = [rabbit.send(body=b"1")]
    rabbit.next_attempt_s()
    others.append(rabbit.send(body=b"2"))
    assert rabbit.sent == ["whole"] * 6 + ["bare"]
    assert rabbit.bodies == [b"it"] * 7
    rabbit.confirm(1, 2, 3)
    assert outcomes([it, *others]) == [True] * 3


def test_a_message_that_always_closes_connections_does_not_stop_the_others(rabbit: Sending) -> None:
    """The user may lack a permission for one routing key: then no properties help."""

    def close_for_it(_queue: str) -> bool:
        if rabbit.broker.published[-1].body == b"it":
            rabbit.broker.lose(rabbit.connection)
        return False

    rabbit.broker.nacks = close_for_it
    it = rabbit.send(body=b"it")
    rabbit.loop.advance(60)
    futures = [rabbit.send(body=body) for body in (b"1", b"2")]
    rabbit.loop.advance(60)
    assert outcomes([it, *futures]) == [None, True, True]
    assert [rabbit.bodies.count(body) for body in (b"1", b"2")] == [1, 1]
    assert rabbit.bodies[-1] == b"it", "it is still tried"


def test_after_a_nack_a_message_is_no_longer_sent_alone(rabbit: Sending) -> None:
    """The broker has read it, so it did not make the broker close the connections."""
    rabbit.broker.confirms = False
    futures = [rabbit.send(body=body) for body in (b"1", b"2")]
    for _ in range(2):
        rabbit.lose_and_wait_s()
    rabbit.broker.confirms, rabbit.broker.nacks = True, lambda _: True
    rabbit.lose_and_wait_s()
    assert rabbit.bodies == [b"1", b"2"] * 4, "alone, one after the other"
    rabbit.broker.confirms, rabbit.broker.nacks = False, lambda _: False
    rabbit.loop.advance(6)
    assert rabbit.bodies == [b"1", b"2"] * 5, "together"
    for _ in range(2):
        rabbit.lose_and_wait_s()
    assert rabbit.bodies == [b"1", b"2"] * 7, "the losses are counted from zero"
    rabbit.confirm(2, multiple=True)
    assert outcomes(futures) == [True, True]


def test_a_message_without_a_confirm_is_sent_again_on_another_connection(rabbit: Sending) -> None:
    """With all its properties: a queue without a majority confirms nothing either."""
    rabbit.broker.confirms = False
    rabbit.send()
    rabbit.loop.advance(9)
    assert rabbit.connection.is_open
    rabbit.next_attempt_s()
    assert rabbit.loop.time() <= 13
    assert [connection.is_closed for connection in rabbit.connections] == [True, False]
    (lost,) = rabbit.said("no connection to RabbitMQ, trying again")
    assert lost["error"] == "no confirm within 10 s"
    assert rabbit.sent == ["whole", "whole"]
    assert rabbit.health.missing == {}
    rabbit.loop.advance(600)
    assert len(rabbit.sent) > 30
    assert set(rabbit.sent) == {"whole"}


def test_each_confirm_extends_the_deadline_of_the_next(rabbit: Sending) -> None:
    """A burst may take longer to send than a single confirm may take."""
    rabbit.broker.confirms = False
    futures = [rabbit.send() for _ in range(4)]
    for confirmed in range(1, 4):
        rabbit.loop.advance(9)
        rabbit.confirm(confirmed)
    assert len(rabbit.connections) == 1
    rabbit.loop.advance(3)
    rabbit.send()
    rabbit.loop.advance(3)
    rabbit.channel.confirm(5)
    rabbit.next_attempt_s()
    assert rabbit.loop.time() <= 27 + 13, "the confirm of a later one does not"
    assert outcomes(futures) == [True, True, True, None]


def test_a_confirm_on_an_abandoned_connection_confirms_nothing_on_the_next(rabbit: Sending) -> None:
    """A frozen broker may go on after its connection was given up. Numbers begin at 1 again."""
    rabbit.broker.confirms = False
    futures = [rabbit.send()]
    old = rabbit.channel
    rabbit.fall_silent()
    rabbit.next_attempt_s()
    assert rabbit.connections[0].is_closed
    futures.append(rabbit.send())
    old.confirm(1)
    rabbit.loop.run_until_idle()
    assert outcomes(futures) == [None, None]


def test_a_returned_message_is_sent_again_once_its_queue_is_declared(rabbit: Sending) -> None:
    """The broker also confirms what no queue takes. That ack does not count."""
    rabbit.broker.delete_queue(QUEUE)
    future = rabbit.send()
    assert not future.done()
    why = f"queue {QUEUE} is missing, it is declared again"
    assert rabbit.publisher.trouble == why
    (line,) = rabbit.said("RabbitMQ did not take a message, sending it again")
    assert (line["error"], line["routing_key"]) == (why, QUEUE)
    rabbit.loop.advance(2)
    assert future.result() is True
    assert rabbit.broker.queues[QUEUE].bodies == [b"{}"]
    assert rabbit.publisher.trouble == ""


def test_only_what_no_queue_takes_is_sent_again(rabbit: Sending) -> None:
    """The other unconfirmed messages are stored, and would be doubled."""
    rabbit.broker.confirms = False
    others = [rabbit.send(body=b"before"), rabbit.send(body=b"after")]
    lost = [rabbit.send(body=b"lost", queue="nowhere") for _ in range(2)]
    rabbit.broker.confirms = True
    rabbit.confirm(4, multiple=True)
    rabbit.loop.advance(60)
    assert outcomes(others + lost) == [True, True, None, None]
    assert rabbit.broker.queues[QUEUE].bodies == [b"before", b"after"]
    assert len(rabbit.connections) == 1
    assert 2 * 12 <= rabbit.bodies.count(b"lost") <= 2 * 40
    said = len(rabbit.said("RabbitMQ did not take a message, sending it again"))
    assert said == rabbit.bodies.count(b"lost") / 2, "one line for all messages to one queue"
    rabbit.broker.queues["nowhere"] = Queue("nowhere", {})
    rabbit.loop.advance(6)
    assert outcomes(lost) == [True, True]


def test_trouble_says_that_an_exchange_has_no_queue_for_a_message(rabbit: Sending) -> None:
    rabbit.broker.exchanges["events"] = []
    message = Message("events", "new_order", b"{}", WHOLE, BARE, lambda: True)
    rabbit.do(lambda: rabbit.publisher.send(message))
    assert rabbit.publisher.trouble == "no queue takes what is sent to 'events' as 'new_order'"


def test_a_confirm_of_more_than_was_sent_is_for_what_was_sent(rabbit: Sending) -> None:
    """The numbers up to it are not counted one by one."""
    rabbit.broker.confirms = False
    futures = [rabbit.send() for _ in range(2)]
    ack = spec.Basic.Ack(2**63, multiple=True)
    rabbit.do(lambda: rabbit.connection.receive(ack))
    assert outcomes(futures) == [True, True]


# Alarms.


def test_after_an_alarm_each_confirm_has_all_its_time(rabbit: Sending) -> None:
    """During the alarm the broker does not read, so it has not received the message."""
    assert rabbit.connection.params.tcp_options == KEEPALIVE
    assert "TCP_USER_TIMEOUT" not in KEEPALIVE
    rabbit.broker.confirms = False
    rabbit.broker.set_alarm(True)
    rabbit.send()
    rabbit.loop.advance(60)
    assert rabbit.connection.is_open
    rabbit.broker.set_alarm(False)
    rabbit.loop.advance(9)
    assert rabbit.connection.is_open
    rabbit.next_attempt_s()
    assert [connection.is_closed for connection in rabbit.connections] == [True, False]


def test_what_is_sent_during_an_alarm_waits_for_its_end(rabbit: Sending) -> None:
    rabbit.broker.set_alarm(True)
    wanted = {"yet": True}
    futures = [rabbit.send() for _ in range(3)]
    unwanted = rabbit.send(lambda: wanted["yet"])
    wanted["yet"] = False
    assert rabbit.publisher.trouble == ALARM
    (line,) = rabbit.said(f"{ALARM}: retries and dead letters wait, consuming goes on")
    assert line["log_level"] == "warning"
    assert outcomes(futures) == [None] * 3
    rabbit.broker.set_alarm(False)
    rabbit.loop.run_until_idle()
    assert outcomes([*futures, unwanted]) == [*[True] * 3, False]
    assert rabbit.publisher.trouble == ""
    rabbit.broker.set_alarm(True)
    futures.append(rabbit.send())
    rabbit.lose()
    rabbit.broker.set_alarm(False)
    rabbit.next_attempt_s()
    assert outcomes(futures) == [True] * 4, "the next connection is not blocked"


@pytest.mark.parametrize("lost", [False, True])
def test_an_alarm_that_is_over_is_no_longer_the_trouble(rabbit: Sending, lost: bool) -> None:
    """It is over when the connection is lost, too."""
    rabbit.broker.confirms = False
    rabbit.broker.set_alarm(True)
    rabbit.send()
    assert rabbit.publisher.trouble == ALARM
    if lost:
        rabbit.broker.away = True
        rabbit.lose()
    else:
        rabbit.broker.set_alarm(False)
        rabbit.loop.run_until_idle()
    assert rabbit.publisher.trouble == ""


def test_connections_lost_during_an_alarm_are_not_counted(rabbit: Sending) -> None:
    """The broker may be killed again and again for want of memory. It has not read the message."""
    rabbit.broker.set_alarm(True)
    future = rabbit.send()
    for _ in range(7):
        rabbit.lose_and_wait_s()
    rabbit.broker.set_alarm(False)
    rabbit.loop.run_until_idle()
    assert future.result() is True
    assert set(rabbit.sent) == {"whole"}


# What is no longer wanted.


def test_what_is_no_longer_wanted_is_not_sent_again(rabbit: Sending) -> None:
    rabbit.broker.nacks = lambda _: True
    wanted = {"yet": True}
    futures = [rabbit.send(lambda: wanted["yet"])]
    rabbit.broker.confirms = False
    futures.append(rabbit.send(lambda: wanted["yet"]))
    wanted["yet"] = False
    assert rabbit.send(lambda: False).result() is False
    rabbit.lose_and_wait_s()
    rabbit.loop.advance(2)
    assert outcomes(futures) == [False, False]
    assert len(rabbit.sent) == 2


# The end.


@pytest.mark.parametrize("answers", [True, False])
def test_what_is_unconfirmed_when_it_closes_is_given_up(rabbit: Sending, answers: bool) -> None:
    rabbit.broker.nacks = lambda _: True
    futures = [rabbit.send()]
    rabbit.broker.confirms = False
    futures.append(rabbit.send())
    if not answers:
        rabbit.fall_silent()
    began_s = rabbit.loop.time()
    rabbit.loop.run_until_complete(rabbit.publisher.close())
    assert rabbit.loop.time() - began_s <= CLOSE_TIMEOUT_S
    rabbit.loop.run_until_idle()
    assert outcomes(futures) == [False, False]
    assert rabbit.running.result() is None


# Messages.


def test_an_events_routing_key_is_its_type_cut_to_what_amqp_allows() -> None:
    short = event_message(Outgoing(b'{"id":"1","type":"new_order"}'))
    assert (short.exchange, short.routing_key) == ("events", "new_order")
    assert short.properties.delivery_mode == 2
    long = Outgoing(('{"id":"1","type":"%s"}' % ("ä" * 200)).encode())
    assert event_message(long).routing_key == "ä" * 127
    with pytest.raises(InvalidEvent):
        event_message(Outgoing(b"{}"))


def test_a_forwarded_message_is_wanted_as_long_as_its_delivery_can_be_settled() -> None:
    epoch = Epoch(1, None)
    delivery = Delivery(epoch, 1, pika.BasicProperties(headers={"trace": "1"}), b"{}")
    epoch.arrived(1)
    forwarded = forwarded_message(delivery, QUEUE, {"x-attempts": 1})
    assert (forwarded.exchange, forwarded.routing_key, forwarded.body) == ("", QUEUE, b"{}")
    assert forwarded.properties.headers == {"trace": "1", "x-attempts": 1}
    assert forwarded.bare.headers == {"x-attempts": 1}
    assert forwarded.wanted()
    epoch.end()
    assert not forwarded.wanted()
