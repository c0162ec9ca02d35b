"""A receiver that is down: its handler's circuit breaker opens, holds events, probes and closes."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from fakes.events import body
from fakes.world import DEAD_LETTERS, Order, World
from idempotent_consumer import Event, Reject, RetryAfter, Service
from idempotent_consumer.calls import FIRST_PROBE_S, LONGEST_PROBE_S, Handler
from idempotent_consumer.metrics import SEND_EVERY_S
from idempotent_consumer.testing.process import SETTINGS

NAME = "circuit breaker of new_order"
FAILURES = 3
OPENS_AT_ONCE = replace(SETTINGS, breaker_failures=1)
DOWN = ConnectionError("refused")


@pytest.fixture
def world() -> Iterator[World]:
    with World() as world:
        yield world


class Receiver:
    """What a claimed handler calls: it raises while it is ``down``.

    ``calls`` are the times of its calls, with the ids of their events.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.down: BaseException | None = DOWN
        self.calls: list[tuple[float, str]] = []
        self.handler = Handler(self.call, 5.0)

    async def call(self, event: Event, _timeout_s: float) -> None:
        self.calls.append((self.world.agenda.now_s, event.id))
        if self.down is not None:
            raise self.down

    @property
    def ids(self) -> list[str]:
        return [event_id for _, event_id in self.calls]

    def start(self, **changes: object) -> Order:
        """Start a process that calls it."""
        settings = replace(SETTINGS, **{"breaker_failures": FAILURES, **changes})  # type: ignore[arg-type]
        return self.world.start(self.handler, settings=settings)

    def opened(self, events: int = FAILURES, **changes: object) -> Order:
        """Start a process whose breaker is opened by its first calls."""
        process = self.start(**changes)
        for number in range(events):
            process.deliver(body(str(number)))
        assert NAME in process.running.health.missing
        return process


@pytest.fixture
def receiver(world: World) -> Receiver:
    return Receiver(world)


def test_a_held_event_is_called_with_its_args_as_they_were_sent(
    receiver: Receiver, world: World
) -> None:
    """Like one that is retried, whatever its handler did to them."""
    paid = list[int]()

    async def pay(event: Event, _timeout_s: float) -> None:
        event.args["n"] *= 100
        paid.append(event.args["n"])
        await receiver.call(event, _timeout_s)

    process = world.start(Handler(pay, 5.0), settings=OPENS_AT_ONCE)
    process.deliver(body("1", n=1))
    receiver.down = None
    process.advance(FIRST_PROBE_S)
    assert paid == [100, 100]


@pytest.mark.parametrize("again", [SystemExit("bug"), Event("1", "another", {})])
def test_a_held_event_that_its_decoder_reads_otherwise_is_called_as_it_was(
    receiver: Receiver, world: World, again: Event | SystemExit
) -> None:
    made = iter([Event("1", "new_order", {}), again])

    def decode(_body: bytes, _properties: object) -> Event:
        event = next(made)
        if isinstance(event, BaseException):
            raise event
        return event

    process = world.start(receiver.handler, settings=OPENS_AT_ONCE, decode=decode)
    process.deliver(b"1")
    receiver.down = None
    process.advance(FIRST_PROBE_S)
    assert (receiver.ids, process.states()[-1], next(made, None)) == (["1", "1"], "done", None)


def test_it_opens_after_so_many_failures_in_a_row(receiver: Receiver) -> None:
    process = receiver.start()
    process.deliver(body("1"))
    process.deliver(body("2"))
    receiver.down = None
    process.deliver(body("3"))
    receiver.down = DOWN
    process.deliver(body("4"))
    process.deliver(body("5"))
    assert process.running.health.missing == {}
    assert process.metrics.gauges == {"orders_breaker_open": 0}
    process.deliver(body("6"))
    (why,) = process.running.health.missing.values()
    assert why.startswith("open: ConnectionError: refused (test_breaker.py:")
    for _ in range(2):  # The gauge is repeated while the breaker is open.
        assert process.metrics.gauges == {"orders_breaker_open": 1}
        process.metrics.gauges.clear()
        process.advance(SEND_EVERY_S)
    (line,) = process.logged("circuit breaker opened")
    assert (line["log_level"], line["type"], line["failures"]) == ("warning", "new_order", FAILURES)


def test_one_event_at_a_time_probes_after_waits_that_grow(receiver: Receiver) -> None:
    process = receiver.opened()
    process.deliver(body("a"), body("b"))
    opened_s, before = receiver.world.agenda.now_s, len(receiver.calls)
    process.advance(200)
    at_s = [round(at_s - opened_s) for at_s, _ in receiver.calls[before:]]
    assert at_s == [1, 3, 7, 15, 31, 61, 91, 121, 151, 181]
    assert (FIRST_PROBE_S, LONGEST_PROBE_S) == (1.0, 30.0)
    # The event that opened it, those that came next, and the retries of the first two.
    assert receiver.ids[before : before + 5] == ["2", "a", "b", "0", "1"]


def test_the_first_success_closes_it(receiver: Receiver) -> None:
    process = receiver.opened()
    process.deliver(*(body(f"more {number}") for number in range(50)))
    process.advance(120)
    receiver.down, receiver.calls = None, []
    process.advance(LONGEST_PROBE_S + 1)
    assert process.running.health.missing == {}
    assert process.metrics.gauges == {"orders_breaker_open": 0}
    assert len(process.logged("circuit breaker closed")) == 1
    assert sorted(receiver.ids) == sorted(["0", "1", "2", *(f"more {n}" for n in range(50))])
    assert (process.count("processed"), process.in_hand) == (FAILURES + 50, 0)
    receiver.down, receiver.calls = DOWN, []
    for number in range(FAILURES):
        process.deliver(body(f"again {number}"))
    assert NAME in process.running.health.missing
    process.advance(FIRST_PROBE_S)
    assert receiver.ids == ["again 0", "again 1", "again 2", "again 2"], "the wait is 1 s again"


@pytest.mark.parametrize("is_due", [False, True])
def test_a_breaker_that_opens_again_at_once_waits_as_long_as_the_first_time(
    world: World, is_due: bool
) -> None:
    """Whether the probe of the first time was still to come, or due with no event to send."""
    receiver = Receiver(world)

    async def call(event: Event, timeout_s: float) -> None:
        if event.id == "slow":
            await asyncio.sleep(1.5 if is_due else 0.5)
        else:
            await receiver.call(event, timeout_s)

    settings = replace(OPENS_AT_ONCE, retry_delays=(("1h", 3600),))
    process = world.start(Handler(call, 5.0), settings=settings)
    process.deliver(body("slow"), body("1"))
    receiver.down = None
    if is_due:
        process.lose_channel()
        process.broker.queues["order"].ready.clear()
        process.advance(FIRST_PROBE_S)
    process.advance(0.5)
    assert process.running.health.missing == {}
    receiver.down, receiver.calls = DOWN, []
    process.deliver(body("2"))
    process.advance(FIRST_PROBE_S - 0.1)
    assert receiver.ids == ["2"]
    process.advance(0.2)
    assert receiver.ids == ["2", "2"]


def test_if_a_probe_is_due_the_next_event_to_come_is_it(receiver: Receiver) -> None:
    process = receiver.opened(1, breaker_failures=1)
    process.lose_channel()
    process.broker.queues["order"].ready.clear()
    process.advance(60)
    receiver.down, receiver.calls = None, []
    process.deliver(body("late"))
    assert receiver.ids[:1] == ["late"]
    assert process.running.health.missing == {}


def test_a_probe_that_cancels_its_own_task_is_followed_by_the_next(world: World) -> None:
    receiver = Receiver(world)

    async def call(event: Event, timeout_s: float) -> None:
        task = asyncio.current_task()
        if receiver.down and task is not None:
            asyncio.get_running_loop().call_later(0.1, task.cancel)
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(1.0)
        await receiver.call(event, timeout_s)

    process = world.start(Handler(call, 5.0), settings=OPENS_AT_ONCE)
    process.deliver(body("a"), body("b"))
    process.advance(2.0)
    assert NAME in process.running.health.missing
    receiver.down = None
    process.advance(LONGEST_PROBE_S)
    assert process.running.health.missing == {}
    assert (process.count("processed"), process.in_hand) == (2, 0)


@pytest.mark.parametrize("etcd", [True, False])
def test_a_stop_does_not_wait_for_what_is_held(receiver: Receiver, etcd: bool) -> None:
    process = receiver.opened(enable_etcd=etcd)
    process.deliver(body("a"))
    process.advance(120)
    process.stop()
    process.advance(2.0)
    assert process.task.done()
    assert len(process.broker.queues["order"].ready) == 4
    assert process.count("failed") == 0


@pytest.mark.parametrize("before_probe_s", [0.1, 0.3, 0.9])
def test_no_probe_is_sent_after_the_stop(receiver: Receiver, before_probe_s: float) -> None:
    """It would be cut off, and called again by another process."""
    process = receiver.opened()
    process.advance(FIRST_PROBE_S - before_probe_s)
    called = len(receiver.calls)
    process.stop()
    process.advance(2.0)
    assert process.task.done()
    assert len(receiver.calls) == called
    assert process.claims() == 0


# What a handler asks for by what it raises.


def refuse(*_: object) -> None:
    raise Reject("no such customer")


@pytest.mark.parametrize("handler", [Handler(refuse), Handler(refuse, 5.0)])
def test_a_rejected_event_is_parked_at_once(world: World, handler: Handler) -> None:
    process = world.start(handler)
    process.deliver(body("1"))
    headers = [parked.headers for parked in process.parked]
    assert [each["x-reason"] for each in headers] == ["rejected"]
    assert headers[0]["x-error"] == "Reject: no such customer"
    assert "x-attempts" not in headers[0]
    assert process.counts()["rejected"] == 1
    assert len(process.logged("parked: its handler rejected it")) == 1


def test_rejections_open_nothing_and_close_nothing(receiver: Receiver) -> None:
    process = receiver.start()
    receiver.down = Reject("no")
    process.deliver(*(body(f"no {number}") for number in range(2 * FAILURES)))
    assert process.running.health.missing == {}
    receiver.down = DOWN
    process.deliver(*(body(str(number)) for number in range(FAILURES)))
    receiver.down = Reject("no")
    process.deliver(*(body(f"held {number}") for number in range(5)))
    process.advance(FIRST_PROBE_S)
    # Each probe was rejected, and followed by the next one at once.
    assert NAME in process.running.health.missing
    assert process.count("rejected") == 2 * FAILURES + FAILURES + 5


@pytest.mark.parametrize(
    ("seconds", "waited_s"),
    [
        (0.5, [1, 10, 60]),
        (1, [1, 10, 60]),
        (1.5, [10, 10, 60]),
        (60, [60, 60, 60]),
        (3600, [60, 60, 60]),
        (math.inf, [60, 60, 60]),
        (-1, [1, 10, 60]),
        ("1.5", [10, 10, 60]),
    ],
)
def test_retry_after_takes_a_long_enough_delay(
    receiver: Receiver, seconds: float | str, waited_s: list[int]
) -> None:
    """It never comes sooner than the regular retry: the event would soon have no retries left."""
    receiver.down = RetryAfter(seconds, "the receiver answered 503")
    process = receiver.world.start(receiver.handler)
    process.deliver(body("1"))
    process.advance(300)
    queues = [f"order.retry.{wait_s}s" for wait_s in waited_s]
    assert [message.routing_key for message in process.forwarded] == [*queues, DEAD_LETTERS]
    (parked,) = process.parked
    assert parked.headers["x-error"] == "RetryAfter: the receiver answered 503"
    assert parked.headers["x-attempts"] == 4


@pytest.mark.parametrize("seconds", ["soon", "", math.nan, None, timedelta(seconds=30)])
def test_retry_after_something_that_is_no_number_is_an_ordinary_failure(
    world: World, seconds: Any
) -> None:
    def ask(_event: Event) -> None:
        raise RetryAfter(seconds, "busy")

    process = world.start(Handler(ask))
    process.deliver(body("1"))
    (retry,) = process.forwarded
    assert retry.routing_key == "order.retry.1s"
    assert "(test_breaker.py:" in retry.headers["x-error"]


@pytest.mark.parametrize("seconds", [None, "soon"])
def test_a_subclass_that_says_no_seconds_asks_for_no_wait(receiver: Receiver, seconds: Any) -> None:
    class Busy(RetryAfter):
        def __init__(self) -> None:
            if seconds:
                self.seconds = seconds

    receiver.down = Busy()
    process = receiver.world.start(receiver.handler)
    process.deliver(body("1"))
    process.advance(20)
    assert [m.routing_key for m in process.forwarded] == [f"order.retry.{n}s" for n in (1, 10, 60)]


# What is set for one handler.


def test_a_handler_has_retry_delays_of_its_own(world: World) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no")

    service = Service("order", noun="orders")
    service.handler("pure", retry_delays=["2s", "1m"])(fail)
    service.claimed_handler("claimed", timeout_s=1, retry_delays=[])(fail)
    service.handler("other")(fail)
    process = world.start(service.handlers)
    assert {"order.retry.2s", "order.retry.1m", "order.retry.10s"} <= set(process.broker.queues)
    for event_type in ("pure", "claimed", "other"):
        process.deliver(body(event_type, event_type))
    process.advance(120)
    sent = {
        name: [m.routing_key for m in process.forwarded if name.encode() in m.body]
        for name in service.handlers
    }
    assert sent == {
        "pure": ["order.retry.2s", "order.retry.1m", DEAD_LETTERS],
        "claimed": [DEAD_LETTERS],
        "other": ["order.retry.1s", "order.retry.10s", "order.retry.60s", DEAD_LETTERS],
    }


def test_a_handler_has_a_limit_of_its_own_besides_the_common_one(world: World) -> None:
    under_way, most = Counter[str](), Counter[str]()

    async def call(event: Event, _timeout_s: float) -> None:
        under_way[event.type] += 1
        most[event.type] = max(most[event.type], under_way[event.type])
        await asyncio.sleep(1.0)
        under_way[event.type] -= 1

    handlers = {"few": Handler(call, 5.0, at_once=2), "many": Handler(call, 5.0)}
    process = world.start(handlers, settings=replace(SETTINGS, calls_at_once=10))
    process.deliver(*(body(f"{name} {n}", name) for n in range(20) for name in handlers))
    process.advance(60)
    assert (most["few"], most["many"] >= 8) == (2, True)
    assert process.count("processed") == 40
