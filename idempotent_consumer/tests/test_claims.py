"""What happens to each delivery of an event whose handler has an outside effect."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest

from fakes.events import Claimed, Pure, body
from fakes.world import Order, World
from idempotent_consumer.calls import Handler
from idempotent_consumer.event import Event
from idempotent_consumer.flow import CATCH_UP_EVERY_S
from idempotent_consumer.records import CLAIMED, DONE, RELEASED
from idempotent_consumer.service import FINISH_WITHIN_S
from idempotent_consumer.settings import Settings
from idempotent_consumer.testing import etcd
from idempotent_consumer.testing.broker import Ack
from idempotent_consumer.testing.etcd import Call, Fate
from idempotent_consumer.testing.loop import Threads

TIMEOUT_S = 5.0
OTHERS_TURN_S = 2.0
# Each ask has a transaction of its own, and waits for no other.
TWO_AT_ONCE = Settings(enable_etcd=True, calls_at_once=2, batch_size=1)
ONE_AT_ONCE = Settings(enable_etcd=True, calls_at_once=1)
RETRIES_MUCH_LATER = Settings(enable_etcd=True, retry_delays=(("1h", 3600),))


@pytest.fixture
def order() -> Iterator[Order]:
    """A process with a handler whose calls end when the test says so."""
    with World() as world:
        yield world.start(Claimed(waits=True))


class Plain:
    """A plain claimed handler. ``states`` are those of the events' records during their calls."""

    def __init__(self, world: World, takes_s: float = 0.0) -> None:
        self._world, self._takes_s = world, takes_s
        self.calls, self.states = list[str](), list[str]()
        self.handler = Handler(self.call, TIMEOUT_S)

    def call(self, event: Event, _timeout_s: float) -> None:
        process = self._world.processes[-1]
        self.calls.append(event.id)
        self.states.append(process.record(event.id).state)
        process.spend(self._takes_s)


@pytest.fixture
def plain(order: Order) -> Plain:
    return Plain(order.world)


def threads_that_start_after(*delays_s: float) -> Callable[[int], Threads]:
    """Return a maker of threads whose first jobs wait this long, as if all threads were busy."""
    left = iter(delays_s)
    return lambda threads: Threads(threads, lambda: next(left, 0.0))


# One process.


def test_an_event_is_claimed_then_called_then_done_then_acked(order: Order) -> None:
    order.etcd.script("Txn", etcd.Fate(answers_s=1.0))
    order.deliver(body("1"))
    assert (order.record().state, order.claimed.calls) == (CLAIMED, [])
    order.advance(1.0)
    assert (order.record().state, order.claimed.calls) == (CLAIMED, ["1"])
    assert order.acks == []
    order.claimed.end()
    assert order.record().state == DONE
    assert order.acks == [Ack(1, (1,), True)]
    assert order.counts() == {"received": 1, "processed": 1, "sent": 1}


def test_a_slow_call_holds_up_nothing_else(order: Order) -> None:
    """Without its ack, the others are acked singly, a moment later."""
    order.deliver(body("1"), body("2"), body("3"))
    order.claimed.end("2", "3")
    assert order.acks == []
    order.advance(CATCH_UP_EVERY_S)
    assert order.acks == [Ack(1, (2,), False), Ack(1, (3,), False)]
    order.claimed.end("1")
    assert order.acks[-1] == Ack(1, (1,), True)


# Slots.


@pytest.mark.parametrize("is_coroutine", [True, False])
def test_no_more_is_claimed_than_can_be_called(order: Order, is_coroutine: bool) -> None:
    """A process that dies leaves two claims behind until their lease ends, not fifty.

    etcd loses requests, so that the records of finished calls are late.
    """
    chance, most = Random(1), 0

    def fate(_: Call) -> Fate:
        late_s = chance.random()
        return etcd.REQUEST_LOST if chance.random() < 0.3 else Fate(late_s, late_s)

    plain = Plain(order.world, takes_s=1.0)
    handler = Claimed().handler if is_coroutine else plain.handler
    order = order.world.start(handler, settings=TWO_AT_ONCE)
    order.etcd.fate = fate
    order.deliver(*(body(str(n)) for n in range(50)))
    while order.count("processed") < 50:
        order.advance(0.05)
        most = max(most, order.claims())
    assert most == 2
    assert all(change.kv.lease for change in order.store.puts("/service/order/"))


# Two processes.


def test_an_event_that_waits_for_another_process_asks_a_few_times_a_second_and_is_logged_once(
    order: Order,
) -> None:
    warning = "waits for another process that does not end it"
    order.world.start(Claimed(waits=True, timeout_s=600.0)).deliver(body("1"))
    order.deliver(body("1"))
    before = len(order.etcd.sent("Txn"))
    order.advance(5)
    assert order.logged(warning) == []
    order.advance(55)
    assert 60 < len(order.etcd.sent("Txn")) - before < 60 * 8
    order.advance(250)
    (line,) = order.logged(warning)
    assert line["event_id"] == "1"


def test_an_attempt_to_claim_that_applies_late_ends_by_itself(order: Order) -> None:
    """Its lease is not kept alive, so it holds an event up for one lease at most."""
    order = order.world.start(Claimed(fails=1), settings=RETRIES_MUCH_LATER)
    order.etcd.script("Txn", etcd.Fate(12, error=etcd.TIMED_OUT))
    order.deliver(body("1"))
    order.advance(1)
    assert order.record().state == RELEASED
    order.store.delete("/service/order/1")  # As if another process had claimed it, and died.
    order.advance(11.5)
    assert order.record().state == CLAIMED, "no process is calling"
    order.advance(15)
    assert order.store.keys("/service/") == []


# The lease and the call.


def etcd_is_away(order: Order) -> None:
    """With its lease of 15 s the claim might end during the call."""
    order.etcd.fate = lambda _: etcd.REQUEST_LOST
    order.advance(10.5)
    assert order.count("sent") == 0
    order.etcd.fate = lambda _: etcd.FINE


@pytest.mark.parametrize(
    ("waits_s", "happens"),
    [
        (10.5, etcd_is_away),
        (1.0, lambda order: order.world.skip(60)),
        # Meanwhile the loop's clock stands still, and etcd's does not.
        (1.0, lambda order: order.world.suspend(3600)),
    ],
    ids=["etcd is away", "the process is frozen", "its machine is suspended"],
)
def test_a_call_that_its_lease_does_not_cover_is_claimed_again(
    order: Order, plain: Plain, waits_s: float, happens: Callable[[Order], None]
) -> None:
    """It waits for a thread. By then the claim has ended, or may end during the call."""
    order = order.world.start(plain.handler, threads=threads_that_start_after(waits_s))
    order.deliver(body("1"))
    happens(order)
    order.advance(6)
    assert plain.states == [CLAIMED]
    assert order.counts() == {"received": 1, "processed": 1, "sent": 1}


@pytest.mark.parametrize(
    ("fails", "n", "others", "ended"),
    [
        (0, 0, "nobody", {"processed": 1, "sent": 1, "claim_lost": 1}),
        (0, 1, "calls", {"processed_skipped": 1, "sent": 1, "claim_lost": 1}),
        # The call was made, and the record is another event's: the operator learns of both.
        (0, 2, "done", {"conflicted": 1, "sent": 1, "claim_lost": 1}),
        (1, 0, "nobody", {"retried": 1}),
        # A retry would only wait as well, and be too many once the other is done.
        (1, 1, "calls", {"processed_skipped": 1}),
    ],
)
def test_a_claim_that_is_lost_during_the_call_is_counted(
    order: Order, fails: int, n: int, others: str, ended: dict[str, int]
) -> None:
    """If no other process has taken it, it is recorded, or its failed call is retried."""
    order.claimed.fails = fails
    order.deliver(body("1", n=1))
    order.store.revoke(order.store.get("/service/order/1").lease)
    theirs = Claimed(waits=others == "calls", timeout_s=60.0)
    if others != "nobody":
        order.world.start(theirs).deliver(body("1", n=n))
    order.claimed.end()
    if others == "calls":
        order.advance(30)
        assert (order.acks, order.forwarded) == ([], [])
        theirs.end()
        order.advance(OTHERS_TURN_S)
    assert order.claimed.calls == ["1"]
    assert order.counts() == {"received": 1, **ended}
    assert len(order.logged("twice")) == ended.get("claim_lost", 0)
    keys = order.store.keys("/service/order/")
    assert [order.record().state for _ in keys] == ([] if "retried" in ended else [DONE])


# The stop.


def test_a_process_that_ends_starts_no_call_to_cut_off(order: Order, plain: Plain) -> None:
    """It releases the claim, so another process need not wait for the lease to end.

    Calls that have enough time left are made.
    """
    order = order.world.start(plain.handler, threads=threads_that_start_after(1.9, 2.1))
    order.deliver(body("1"), body("2"))
    order.stop()
    order.advance(FINISH_WITHIN_S + 3)
    assert plain.calls == ["1"]
    assert [order.record(event_id).state for event_id in "12"] == [DONE, RELEASED]
    assert order.task.done()
    assert order.forwarded == []
    assert order.broker.queues["order"].bodies == [body("2")]
    other = order.world.start(Claimed())
    other.deliver(body("2"))
    assert other.counts() == {"received": 1, "processed": 1, "sent": 1}


@pytest.mark.parametrize("left_s", [0.0, 0.01, 0.02, 0.05])
def test_a_claim_that_is_waited_for_is_released_if_the_process_ends(
    order: Order, plain: Plain, left_s: float
) -> None:
    """Its time runs out while the event waits to claim again."""
    order = order.world.start(plain.handler, threads=threads_that_start_after(10.5))
    order.deliver(body("1"))
    order.etcd.fate = lambda _: etcd.REQUEST_LOST
    order.advance(10.5 - (FINISH_WITHIN_S - TIMEOUT_S) + left_s)
    order.stop()
    order.advance(FINISH_WITHIN_S - TIMEOUT_S)
    order.etcd.fate = lambda _: etcd.FINE
    order.advance(3.0)
    assert plain.calls == []
    assert order.record().state == RELEASED
    assert order.broker.queues["order"].bodies == [body("1")]


def test_a_process_that_ends_claims_nothing_without_time_to_call(order: Order) -> None:
    order = order.world.start(Claimed(waits=True), settings=ONE_AT_ONCE)
    order.deliver(body("1"), body("2"))
    order.stop()
    order.advance(FINISH_WITHIN_S - TIMEOUT_S)
    order.claimed.end()
    order.advance(3)
    assert order.claimed.calls == ["1"]
    assert order.states() == [CLAIMED, DONE]
    assert order.task.done()


def test_the_stop_waits_for_a_call_whose_delivery_has_gone_back(order: Order) -> None:
    """Without its record, whoever takes the delivery next would call again."""
    order.deliver(body("1"))
    order.broker.away = True
    order.lose_channel()
    assert order.in_hand == 0
    order.stop()
    order.advance(3)
    assert not order.task.done()
    order.claimed.end()
    order.advance(3)
    assert order.task.done()
    assert order.record().state == DONE


@pytest.mark.parametrize("steps", range(20))
def test_a_call_may_end_in_any_of_the_last_steps_of_a_stop(order: Order, steps: int) -> None:
    """While etcd is down, what it would have recorded is not sent any more. That is no defect."""
    call = Claimed(waits=True, timeout_s=60.0)
    handlers = {"new_order": call.handler, "pure": Pure().handler}
    order = order.world.start(handlers, settings=TWO_AT_ONCE)
    order.deliver(body("1"))
    order.etcd.fate = lambda call: Fate(None) if call.method == "Txn" else etcd.FINE
    order.deliver(body("2", "pure"))
    order.stop()
    order.advance(FINISH_WITHIN_S - 0.1)
    order.world.agenda.run(enough=lambda: not order.broker.sessions)
    left = iter(range(steps))
    order.world.agenda.run(enough=lambda: next(left, None) is None or order.task.done())
    try:
        call.end()
        order.advance(1.0)
    except RuntimeError as error:
        raise AssertionError("a defect") from error
    assert order.task.done()
    assert order.record().state == CLAIMED


# Defects, and calls that hang.


def test_a_call_that_does_not_return_is_logged_once(order: Order) -> None:
    order = order.world.start(Plain(order.world, takes_s=5 * TIMEOUT_S).handler)
    order.deliver(body("1"))
    stuck = []
    for _ in range(5):
        order.advance(TIMEOUT_S)
        stuck.append(list(order.running.health.stuck))
    assert stuck == [[], [], [], ["calls"], []]
    (line,) = order.logged("calls do not return")
    assert (line["log_level"], line["calls"]) == ("error", 1)


@pytest.mark.parametrize("method", ["LeaseKeepAlive", "LeaseGrant", "Txn", "Range"])
def test_a_defect_in_any_task_ends_the_run(order: Order, method: str) -> None:
    """Otherwise leases, commits or the guard would stop unnoticed."""

    def fate(call: object) -> Fate:
        if getattr(call, "method", "") == method:
            raise RuntimeError("a defect")
        return etcd.FINE

    order.etcd.fate = fate
    order.broker.publish("", "order", body("1"))
    with pytest.raises(ExceptionGroup) as raised:
        order.advance(10)
    assert raised.group_contains(RuntimeError, match="a defect")
    assert order.task.done()


def fail(*_: object) -> None:
    raise RuntimeError("wrong")


@pytest.mark.parametrize(
    "leave",
    [
        lambda loop: loop.call_later(0.1, fail),
        lambda loop: loop.create_task(asyncio.sleep(0.1)).add_done_callback(fail),
        lambda loop: loop.create_future().set_exception(RuntimeError("wrong")),
    ],
)
def test_an_error_in_what_a_handler_has_left_to_the_loop_is_logged(
    order: Order, leave: Callable[[asyncio.AbstractEventLoop], object]
) -> None:
    """The service goes on."""

    async def call(_event: Event, _timeout_s: float) -> None:
        leave(asyncio.get_running_loop())
        await asyncio.sleep(1)

    order = order.world.start(Handler(call, TIMEOUT_S))
    order.deliver(body("1"))
    order.advance(2)
    assert order.count("processed") == 1
    (line,) = order.logged("something that a handler left to the event loop has failed")
    assert (line["log_level"], str(line["exc_info"])) == ("error", "wrong")


def raised_in(*modules: str) -> BaseException:
    """Return an exception that the last of these modules raised, each called by the one before."""
    names: dict[str, Any] = {"call": None}
    for module in reversed(modules):
        names = {"__name__": module, "called": names["call"]}
        exec("def call(): called() if called else int('wrong')", names)  # noqa: S102
    try:
        names["call"]()
    except ValueError as error:
        frames = error.__traceback__
        return error.with_traceback(frames and frames.tb_next)
    raise AssertionError("it has raised nothing")


@pytest.mark.parametrize(
    ("modules", "is_own"),
    [
        (["idempotent_consumer.flow"], True),
        (["idempotent_consumer.calls", "client"], True),
        (["pika.connection", "idempotent_consumer.bus"], True),
        (["grpc._cython.cygrpc", "idempotent_consumer.etcd"], True),
        (["pika.connection"], True),
        (["grpc._cython.cygrpc"], False),
        (["client"], False),
        (["client", "idempotent_consumer.producer"], False),
        (["pika.connection", "client"], False),
        ([], False),
    ],
)
def test_an_error_is_a_defect_if_it_was_raised_in_code_of_this_library(
    order: Order, modules: list[str], is_own: bool
) -> None:
    error = raised_in("asyncio.events", *modules)
    context = {"message": "Exception in callback", "exception": error}
    assert order.running.defect_of(context) is (error if is_own else None)
    assert len(order.logged("something that a handler left")) == (not is_own)


def test_deliveries_that_went_back_are_not_kept(order: Order) -> None:
    """While etcd is down, each lost channel brings the same events again."""
    order.etcd.fate = lambda call: etcd.REQUEST_LOST if call.method == "Txn" else etcd.FINE
    order.deliver(body("1"), body("1", item="other"))
    for _ in range(20):
        order.lose_channel()
        order.advance(10)
    (flight,) = order.running.consumer._in_flight.values()
    (other,) = flight.others.values()
    assert (len(flight.deliveries), len(other.deliveries)) == (1, 1)
