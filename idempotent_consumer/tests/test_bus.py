"""Consuming from RabbitMQ: a connection that recovers, deliveries, and their acks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from random import Random
from typing import Any

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.amqp import Rabbit
from idempotent_consumer import bus
from idempotent_consumer.amqp import LARGEST_READ_BYTES, TCP_OPTIONS
from idempotent_consumer.bus import ClientChannel, Delivery, Epoch
from idempotent_consumer.settings import Settings
from idempotent_consumer.testing.broker import Message, Queue


class Defect(Exception):
    """A defect of the code that uses a connection."""


# A connection that recovers.

AT_ONCE_S = 0.25
"""The longest wait after the first failure."""

TIMES = 30
LOSS = "no connection to RabbitMQ, trying again"
RESET = "Stream connection lost: ConnectionResetError(104, 'reset')"


class Recovering(Rabbit):
    """RabbitMQ, and a connection to one of its nodes, each of which has a letter as its name."""

    def __init__(self, nodes: str = "h") -> None:
        super().__init__()
        urls = [f"amqp://{node}/" for node in nodes]
        self.kept = bus.RecoveringConnection(
            "rabbitmq", urls, TCP_OPTIONS, self.system, self.health, self.log
        )

    def run(self, use: Callable[[ClientChannel], Any] | None = None) -> Any:
        """Keep a connection: ``use`` it, or report it as ready when it is open."""
        return self.start(self.kept.run(use or self._ready_until_lost))

    def close(self) -> float:
        """Close it; return how long that took."""
        began_s = self.loop.time()
        self.loop.run_until_complete(self.kept.close())
        return self.loop.time() - began_s

    async def _ready_until_lost(self, client: ClientChannel) -> None:
        self.kept.ready()
        await client.reply()


@pytest.fixture
def rabbit() -> Iterator[Recovering]:
    rabbit = Recovering()
    yield rabbit
    rabbit.loop.kill()


# How soon.


def hold(rabbit: Recovering, seconds: float) -> float:
    """Keep a connection for so long; return the wait until the next."""
    rabbit.loop.advance(seconds)
    return rabbit.lose_and_wait_s()


def test_the_waits_grow_unless_a_connection_has_held(rabbit: Recovering) -> None:
    """Each new connection costs every unacked delivery one of its returns."""
    rabbit.run()
    assert max(hold(rabbit, 11) for _ in range(TIMES)) <= AT_ONCE_S
    assert max(hold(rabbit, 9) for _ in range(TIMES)) > 4 * AT_ONCE_S
    rabbit.broker.away = True
    assert hold(rabbit, 11) <= AT_ONCE_S
    times_s = [rabbit.next_attempt_s() for _ in range(TIMES)]
    assert max(later - sooner for sooner, later in pairwise(times_s)) > 4 * AT_ONCE_S


def test_health_and_log_say_what_is_missing(rabbit: Recovering) -> None:
    assert rabbit.health.missing == {"rabbitmq": "not connected yet"}
    rabbit.run()
    assert rabbit.health.missing == {}
    rabbit.lose()
    assert rabbit.health.missing == {"rabbitmq": RESET}
    rabbit.next_attempt_s()
    assert rabbit.health.missing == {}
    warning, connected = rabbit.lines.entries[1:]
    assert 0 <= warning.pop("again_in_s") <= AT_ONCE_S
    which = {"connection": "rabbitmq", "node": "h:5672"}
    assert warning == {"event": LOSS, "log_level": "warning", "error": RESET, **which}
    assert connected == {"event": "connected to RabbitMQ", "log_level": "info", **which}


def test_a_failure_that_stays_the_same_is_logged_now_and_then(rabbit: Recovering) -> None:
    """A refused login would be logged several times a second."""
    rabbit.broker.away = True
    rabbit.run()
    said_s = [0.0]
    for _ in range(TIMES):
        before = len(rabbit.said(LOSS))
        at_s = rabbit.next_attempt_s()
        said_s += [at_s] * (len(rabbit.said(LOSS)) - before)
    assert 3 <= len(said_s) < TIMES / 3
    assert min(later - sooner for sooner, later in pairwise(said_s)) >= bus.SAID_EVERY_S
    rabbit.broker.away = False
    rabbit.next_attempt_s()
    before = len(rabbit.said(LOSS))
    for _ in range(2):
        hold(rabbit, 1)
    assert len(rabbit.said(LOSS)) == before + 2, "after a connection it is logged at once"


def nodes_tried(nodes: str, times: int, seed: int = 1) -> str:
    rabbit = Recovering(nodes)
    rabbit.system.random.setstate(Random(seed).getstate())
    rabbit.broker.away = True
    rabbit.run()
    while len(rabbit.attempts) < times:
        rabbit.next_attempt_s()
    rabbit.loop.kill()
    return "".join(node for _, node in rabbit.attempts)


@pytest.mark.parametrize("nodes", ["a", "ab", "abc"])
def test_each_node_is_tried_before_any_is_tried_again(nodes: str) -> None:
    tried = nodes_tried(nodes, 300)
    rounds = [tried[at : at + len(nodes)] for at in range(0, 300, len(nodes))]
    assert all(sorted(each) == list(nodes) for each in rounds)
    assert nodes == "a" or all(one != other for one, other in pairwise(tried))
    assert {nodes_tried(nodes, 1, seed) for seed in range(100)} == set(nodes), "at random"


# What ends it.


async def declare_wrongly(client: ClientChannel) -> None:
    client.channel.queue_declare("order", durable=True, arguments={"x-max-length": 1})
    await client.reply()


async def ask_a_channel_that_has_gone(client: ClientChannel) -> None:
    """pika refuses to send, which is no defect: the loss could not be known yet."""
    client.lose("the first reason")
    client.channel.close()
    client.channel.queue_declare("order")


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (declare_wrongly, "rabbitmqctl delete_queue"),
        (ask_a_channel_that_has_gone, "the first reason"),
    ],
)
def test_a_lost_channel_is_followed_by_another_connection(
    rabbit: Recovering, use: Callable[[ClientChannel], Any], says: str
) -> None:
    rabbit.broker.queues["order"] = Queue("order", {"x-max-length": 2})
    rabbit.run(use)
    assert says in rabbit.health.missing["rabbitmq"]
    assert rabbit.connection.is_closed
    rabbit.next_attempt_s()
    assert len(rabbit.attempts) == 2


async def fail(_: ClientChannel) -> None:
    raise Defect


def failing_in_a_callback(*losses: str) -> Callable[[ClientChannel], Any]:
    async def use(client: ClientChannel) -> None:
        def callback(*_: object) -> None:
            for loss in losses:
                client.lose(loss)
            raise Defect

        client.channel.basic_qos(prefetch_count=1, callback=client.callback(callback))
        await client.reply()

    return use


@pytest.mark.parametrize(
    "use",
    [fail, failing_in_a_callback(), failing_in_a_callback("a loss")],
    ids=["at once", "in a callback", "in a callback after the loss"],
)
def test_a_defect_ends_it(rabbit: Recovering, use: Callable[[ClientChannel], Any]) -> None:
    running = rabbit.run(use)
    assert running.done()
    assert [type(error) for error in running.exception().exceptions] == [Defect]
    assert rabbit.connection.is_closed
    assert rabbit.said(LOSS) == []
    rabbit.loop.run_until_complete(rabbit.kept.close())


def test_callbacks_of_a_channel_that_was_given_up_are_ignored(rabbit: Recovering) -> None:
    heard: list[str] = []
    callbacks: list[Callable[..., None]] = []

    async def use(client: ClientChannel) -> None:
        callbacks.append(client.callback(heard.append))
        await client.reply()

    rabbit.run(use)
    callbacks[0]("before")
    rabbit.lose()
    callbacks[0]("after")
    assert heard == ["before"]


# Its end.


@pytest.mark.parametrize(
    ("before", "takes_s"),
    [
        (lambda *_: None, 0),
        (lambda rabbit, _: rabbit.lose(), 0),
        (lambda rabbit, _: rabbit.fall_silent(), bus.CLOSE_TIMEOUT_S),
        # As if another task of the service had a defect.
        (lambda _, running: running.cancel(), 0),
    ],
    ids=["the broker answers", "before the next attempt", "no answer", "cancelled"],
)
def test_it_closes_its_connection_and_opens_no_other(
    rabbit: Recovering, before: Callable[..., object], takes_s: float
) -> None:
    """If the broker does not answer, the socket is closed."""
    running = rabbit.run()
    before(rabbit, running)
    assert rabbit.close() == takes_s
    rabbit.loop.run_until_idle()
    assert rabbit.connection.is_closed
    rabbit.loop.advance(60)
    assert running.cancelled() or running.result() is None
    assert len(rabbit.attempts) == 1


def test_it_closes_while_a_connection_is_being_opened(rabbit: Recovering) -> None:
    rabbit.broker.latency_s = lambda: 5.0
    running = rabbit.run(fail)
    assert rabbit.close() <= bus.CLOSE_TIMEOUT_S
    rabbit.loop.advance(60)
    assert running.result() is None
    assert rabbit.broker.sessions == []


def test_closed_before_it_was_run_it_does_not_connect(rabbit: Recovering) -> None:
    assert rabbit.close() == 0
    assert rabbit.run(fail).result() is None
    assert rabbit.attempts == []


# Deliveries and acks.


class Channel:
    """Records the acks."""

    def __init__(self) -> None:
        self.is_open = True
        self.acks: list[tuple[int, bool]] = []

    def basic_ack(self, delivery_tag: int, multiple: bool = False) -> None:
        self.acks.append((delivery_tag, multiple))


def deliveries_of(epoch: Epoch, number: int) -> list[Delivery]:
    for tag in range(1, number + 1):
        epoch.arrived(tag)
    return [Delivery(epoch, tag, None, b"") for tag in range(1, number + 1)]


def test_after_the_end_nothing_is_settled_and_the_unsettled_are_counted() -> None:
    channel = Channel()
    epoch = Epoch(1, channel)
    deliveries = deliveries_of(epoch, 3)
    deliveries[0].settle()
    assert epoch.end() == 2
    assert not deliveries[1].alive
    assert not deliveries[1].settle()
    channel.is_open = False
    epoch.flush(past_gap=True)
    assert channel.acks == []


@given(st.integers(1, 40), st.data())
def test_exactly_the_settled_are_acked_in_any_order(number: int, data: st.DataObject) -> None:
    """The acks are applied as the broker does: a multiple ack is for everything up to its tag."""
    channel = Channel()
    epoch = Epoch(1, channel)
    deliveries = deliveries_of(epoch, number)
    unacked, settled = set(range(1, number + 1)), set[int]()
    for delivery in data.draw(st.permutations(deliveries)):
        delivery.settle()
        settled.add(delivery.tag)
        if data.draw(st.booleans()):
            epoch.flush()
        if data.draw(st.booleans()):
            epoch.flush(past_gap=True)
            for tag, multiple in channel.acks:
                assert tag in unacked, "an ack that names nothing closes the channel"
                unacked -= {t for t in unacked if t <= tag} if multiple else {tag}
            channel.acks.clear()
            assert unacked == set(range(1, number + 1)) - settled
            assert epoch.in_hand == len(unacked)


@pytest.mark.parametrize(
    ("headers", "attempts"),
    [
        *(({"x-attempts": number}, number) for number in (0, 2, 1000)),
        *((headers, 0) for headers in (None, {}, {"X-Attempts": 5})),
        *(({"x-attempts": value}, 0) for value in ("3", -1, True, 2**63, 1001, 1.5, None, [1])),
    ],
)
def test_attempts_are_believed_only_if_they_make_sense(headers: Any, attempts: int) -> None:
    arrived = Delivery(Epoch(1, None), 1, pika.BasicProperties(headers=headers), b"")
    assert arrived.attempts == attempts


# Consuming.

ONE = Settings(rabbitmq_urls=("amqp://h/",))
SEVERAL = Settings(rabbitmq_urls=("amqp://a/", "amqp://b/"))
PREFETCH = 10


class Consuming(Rabbit):
    """RabbitMQ and the intake of the service "order", which is consuming."""

    def __init__(
        self,
        settings: Settings = ONE,
        max_bytes: int = bus.MAX_BYTES_IN_FLIGHT,
        latency_s: float = 0.0,
    ) -> None:
        super().__init__()
        self.broker.latency_s = lambda: latency_s
        self.returned: list[int] = []
        self.intake = bus.Intake(
            bus.Topology("order", retry_delays=settings.retry_delays),
            *(settings.rabbitmq_urls, PREFETCH, self.system, self.health, self.log),
            *(self.returned.append, max_bytes),
        )
        self.running = self.start(self.intake.run())

    def publish(self, *bodies: bytes, properties: Any = None) -> None:
        for body in bodies:
            self.broker.publish("events", "new_order", body, properties)
        self.loop.run_until_idle()

    def arrived(self) -> list[Delivery]:
        """Return what has arrived by now, which may be nothing."""
        task = self.start(self.intake.deliveries())
        if not task.done():
            task.cancel()
            self.loop.run_until_idle()
            return []
        deliveries: list[Delivery] = task.result()
        return deliveries

    def bodies(self) -> list[bytes]:
        """Return the bodies of what has arrived by now."""
        return [delivery.body for delivery in self.arrived()]

    def cancel(self) -> None:
        """Cancel the consumer as RabbitMQ does after the consumer time-out."""
        (consumer,) = self.broker.queues["order"].consumers
        consumer.cancelled_by_broker()
        self.loop.run_until_idle()

    def close(self) -> None:
        """Close it, which takes as long as the last acks may need."""
        began_s = self.loop.time()
        self.loop.run_until_complete(self.intake.close())
        assert self.loop.time() - began_s == bus.LAST_ACKS_S

    @property
    def acked(self) -> list[bytes]:
        return [message.body for message in self.broker.acked]

    @property
    def ready(self) -> list[bytes]:
        return self.broker.queues["order"].bodies

    @property
    def why(self) -> list[str]:
        """Why connections have been lost."""
        return [line["error"] for line in self.lines.entries if "error" in line]


Start = Callable[..., Consuming]


@pytest.fixture
def start() -> Iterator[Start]:
    """Give a function that starts an intake."""
    with ExitStack() as stack:

        def start(*arguments: Any, **options: Any) -> Consuming:
            order = Consuming(*arguments, **options)
            stack.callback(order.loop.kill)
            return order

        yield start


@pytest.fixture
def order(start: Start) -> Consuming:
    """Give an intake with a single broker."""
    return start()


def test_a_services_queues_are_declared_and_bound(order: Consuming) -> None:
    declared = {queue.name: queue.arguments for queue in order.broker.queues.values()}
    assert declared == bus.queue_arguments("order", ONE.retry_delays)
    assert order.broker.exchanges == {"events": [("#", "order")]}
    assert order.health.missing == {}
    assert order.connection.params.tcp_options == TCP_OPTIONS


def test_deliveries_of_any_form_are_waited_for(order: Consuming) -> None:
    """Those with an empty body are left to pika."""
    waiting = order.start(order.intake.deliveries())
    assert not waiting.done()
    properties = pika.BasicProperties(headers={"x-attempts": 2})
    order.publish(b"1", properties=properties)
    order.publish(b"", b"2", properties=properties)
    found = [*waiting.result(), *order.arrived()]
    assert [(each.body, each.attempts) for each in found] == [(b"1", 2), (b"", 2), (b"2", 2)]
    assert order.intake.in_hand == 3
    assert not order.start(order.intake.deliveries()).done()


def test_the_prefetch_is_for_twice_the_batches_in_flight(order: Consuming) -> None:
    assert [bus.prefetch(batch_size) for batch_size in (1, 512, 100_000)] == [8, 4096, 32_767]
    order.publish(*(b"%d" % number for number in range(PREFETCH + 5)))
    assert len(order.arrived()) == PREFETCH


# A consumer that the broker cancels.


def cancel_holding_two(order: Consuming) -> None:
    """The age of the oldest is that at the cancel, not that when the queue was found."""
    order.loop.advance(3)
    order.publish(b"1")
    order.loop.advance(7)
    order.publish(b"2")
    order.loop.advance(1)
    order.cancel()


def cancel_and_delete(order: Consuming) -> None:
    """As the broker does: right after the cancel, the queue is still there."""
    order.cancel()
    del order.broker.queues["order"]


def cancel_and_lose(order: Consuming) -> None:
    order.cancel()
    order.lose()


DELETED = "no queue 'order' in vhost '/': it was deleted, and is declared again"
CANCELLED = (
    "the broker cancelled the consumer, whose queue is still there: probably a delivery was "
    "unacked for longer than the broker's consumer_timeout"
)


@pytest.mark.parametrize(
    ("fault", "says", "held"),
    [
        (lambda order: order.broker.delete_queue("order"), DELETED, 0),
        (cancel_and_delete, DELETED, 0),
        (Consuming.cancel, f"{CANCELLED} (none is unacked now)", 0),
        (cancel_holding_two, f"{CANCELLED} (the oldest for 8.0 s)", 2),
        (cancel_and_lose, RESET, 0),
    ],
    ids=["deleted", "cancelled, and deleted", "cancelled", "two unacked", "cancelled, and lost"],
)
def test_the_log_says_why_the_broker_has_cancelled_a_consumer(
    order: Consuming, fault: Callable[[Consuming], None], says: str, held: int
) -> None:
    """A new channel is needed: the old one would keep its deliveries, and get no others."""
    fault(order)
    order.loop.advance(bus.GONE_WITHIN_S)
    (lost,) = order.why
    assert lost.endswith(says)
    assert order.returned == [held]
    order.loop.advance(1)
    (consumer,) = order.broker.queues["order"].consumers
    assert len(consumer.unacked) == held


def test_a_cancel_that_arrives_with_the_answer_to_consuming_is_not_missed(start: Start) -> None:
    """Both can come in one read of the socket, if the queue is deleted in that moment."""
    order = start(latency_s=0.1)
    queues = order.broker.queues
    order.loop.agenda.run(enough=lambda: "order" in queues and bool(queues["order"].consumers))
    order.broker.publish("events", "new_order", b"1")
    order.broker.delete_queue("order")
    order.loop.advance(10)
    assert len(queues["order"].consumers) == 1


def test_no_ack_covers_a_delivery_that_pika_drops_after_a_cancel(order: Consuming) -> None:
    """A large one is left to pika, which has no consumer for it any more."""
    order.publish(b"1")
    (consumer,) = order.broker.queues["order"].consumers
    consumer.cancelled_by_broker()
    for body in (b"x" * (LARGEST_READ_BYTES + 1), b"2"):
        consumer.deliver(Message(0, body, b"\0\0", "events", "new_order"))
    order.loop.run_until_idle()
    for delivery in order.arrived():
        order.do(delivery.settle)
    order.do(order.intake.flush)
    assert order.acked == [b"1"]


# A broker that is cut off from the others.

LONG_S = 20 * (bus.ASKED_EVERY_S + bus.ANSWERS_WITHIN_S)


@pytest.mark.parametrize("after_s", [bus.ASKED_EVERY_S / 2, bus.ASKED_EVERY_S, LONG_S])
def test_a_broker_that_has_a_majority_is_kept(start: Start, after_s: float) -> None:
    order = start(SEVERAL)
    order.loop.advance(after_s)
    assert len(order.attempts) == 1
    order.publish(b"1")
    assert order.bodies() == [b"1"]
    order.cancel()
    order.loop.advance(bus.ASKED_EVERY_S + bus.GONE_WITHIN_S)
    assert "the broker cancelled the consumer" in order.why[0]


def test_a_broker_that_does_not_answer_is_left_if_there_is_another(start: Start) -> None:
    """It still answers heartbeats, so nothing else would notice."""
    order, alone = start(SEVERAL), start(ONE)
    for each in (order, alone):
        each.fall_silent()
        each.loop.advance(bus.ASKED_EVERY_S + bus.ANSWERS_WITHIN_S + 1)
    assert order.why == ["no answer within 5 s: this broker may be cut off from the others"]
    order.next_attempt_s()
    assert {host for _, host in order.attempts} == {"a", "b"}
    assert alone.why == []


def test_a_broker_of_several_is_not_left_while_reading_is_paused(start: Start) -> None:
    """Its answer may have arrived, after deliveries that have not been read."""
    order = start(SEVERAL, max_bytes=0)
    order.publish(b"1")
    order.loop.advance(LONG_S)
    assert order.why == []
    (delivery,) = order.arrived()
    delivery.settle()
    order.fall_silent()
    order.loop.advance(bus.ASKED_EVERY_S + 2 * bus.ANSWERS_WITHIN_S + 1)
    assert len(order.why) == 1


# Large deliveries.


def test_unsettled_deliveries_are_bounded_in_bytes(start: Start) -> None:
    """What counts is the body and 16 times the properties, which have at least two bytes."""
    order = start(max_bytes=200)
    order.publish(*(b"%d" % number * 48 for number in range(1, 6)))
    first = order.arrived()
    assert [delivery.body[:1] for delivery in first] == [b"1", b"2", b"3"]
    for delivery in first[:2]:
        assert order.arrived() == []
        order.do(delivery.settle)
    assert [body[:1] for body in order.bodies()] == [b"4", b"5"]
    (warning,) = order.said(
        "what is in flight is large: no more is read until half of it is settled"
    )
    assert (warning["deliveries"], warning["bytes"]) == (3, 200)


def test_a_body_of_many_small_values_counts_by_the_memory_it_takes(start: Start) -> None:
    order = start(max_bytes=2**20)
    small, plain = b"[%s{}]" % (b"{}," * 12_000), b'["%s"]' % (b"x" * 36_000)
    order.publish(small, plain, small)
    assert order.bodies() == [small]
    order = start(max_bytes=2**20)
    order.publish(plain, plain, small)
    assert order.bodies() == [plain, plain, small]


# The stop.


@pytest.mark.parametrize("settings", [ONE, SEVERAL], ids=["one broker", "several"])
def test_after_the_stop_deliveries_can_be_settled(start: Start, settings: Settings) -> None:
    """It closes when the last acks are safe, and the rest is requeued."""
    order = start(settings)
    order.publish(b"1", b"2")
    delivery, _ = order.arrived()
    assert order.connection.reader is not None
    order.do(order.intake.stop)
    assert order.connection.reader is None, "pika returns deliveries, which it would go on reading"
    order.loop.advance(LONG_S)
    order.publish(b"3")
    assert (order.arrived(), order.ready) == ([], [b"3"])
    delivery.settle()
    order.do(order.intake.flush)
    assert order.acked == [b"1"]
    order.close()
    assert (order.acked, sorted(order.ready), order.returned) == ([b"1"], [b"2", b"3"], [1])
    assert order.running.result() is None


def test_stopped_before_it_is_connected_it_consumes_nothing(start: Start) -> None:
    order = start(latency_s=0.1)
    order.do(order.intake.stop)
    order.loop.advance(5)
    assert order.broker.queues["order"].consumers == []
    assert order.broker.sessions == []
    order.close()
    assert (order.running.result(), order.returned) == (None, [])
