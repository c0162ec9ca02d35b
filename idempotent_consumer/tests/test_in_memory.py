"""A service in memory, the checks of handlers, and the fake receiver."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import orjson
import pytest

from idempotent_consumer import (
    Event,
    InvalidEvent,
    Properties,
    Publish,
    Put,
    RetryAfter,
    Service,
    Settings,
    cloudevents,
)
from idempotent_consumer.testing import InMemory, Parked, Receiver, check_crashes, check_duplicates

EVENTS = [{"id": str(n), "type": "new_order", "args": {"n": n}} for n in range(3)]
Made = tuple[Service, Callable[[], object]]


def pure(handler: Callable[..., Any], **options: Any) -> Service:
    service = Service("order", noun="orders")
    register: Any = service.handler("new_order", **options)
    register(handler)
    return service


def claimed(handler: Callable[..., Any], timeout_s: float = 5) -> Service:
    service = Service("notify", noun="notifications")
    service.claimed_handler("new_order", timeout_s)(handler)
    return service


def calling(way: str, call: Callable[..., None]) -> Service:
    """Return a service whose handler makes a call, from the loop, a thread, or a task's thread.

    A "pure" handler must not: the checks have to find it.
    """

    async def wait(*given: Any) -> None:
        await asyncio.sleep(1)
        if way == "task":
            await asyncio.create_task(asyncio.to_thread(call, *given))
        else:
            call(*given)

    return pure(call) if way == "pure" else claimed(call if way == "plain" else wait)


def run(service: Service, *events: Any, **options: Any) -> InMemory:
    """Run a service on some events, by default on one."""
    world = InMemory(service, **options)
    world.publish(*events or EVENTS[:1])
    return world


def shipment() -> Service:
    service = Service("shipment", noun="parcels")

    @service.handler("new_order")
    def ship(event: Event) -> list[Put | Publish]:
        return [Put(f"/parcels/{event.id}", b"packed"), Publish("shipped", {"order": event.id})]

    return service


def test_a_run_shows_effects_records_and_published_events() -> None:
    world = run(shipment(), *EVENTS, EVENTS[0])
    assert world.effects == {f"/parcels/{n}": b"packed" for n in range(3)}
    assert world.records == {"0": "done", "1": "done", "2": "done"}
    assert [(event["id"], event["args"]) for event in world.published] == [
        (f"{n}/shipment/0", {"order": str(n)}) for n in range(3)
    ]
    handled = {"processed": 3, "processed_skipped": 1}
    assert world.counts == {"received": 7, **handled, "ignored": 3}, "it gets its own events too"


@pytest.mark.parametrize(
    ("bindings", "handled"),
    [
        (["#"], ["new_order", "order.packed", "order.shipped"]),
        (["*.packed"], ["new_order", "order.packed"]),
        (["new_order"], ["new_order"]),
    ],
)
def test_a_service_receives_what_it_publishes_if_its_bindings_take_it(
    bindings: list[str], handled: list[str]
) -> None:
    service, seen = Service("order", noun="orders", exchange="shop", bindings=bindings), list[str]()
    following = {"new_order": "order.packed", "order.packed": "order.shipped"}

    def handle(event: Event) -> Publish | None:
        seen.append(event.type)
        return Publish(following[event.type]) if event.type in following else None

    for kind in (*following, "order.shipped"):
        service.handler(kind)(handle)
    world = InMemory(service)
    world.publish(EVENTS[0], routing_key="new_order" if "new_order" in bindings else "x.packed")
    assert seen == handled
    published = [event["type"] for event in world.published]
    assert published == ["order.packed", "order.shipped"][: len(handled)]


def test_an_event_that_no_binding_takes_is_refused() -> None:
    service = Service("order", noun="orders", bindings=["shop.*", "order.#"])
    service.handler("new_order")(lambda _event: None)
    world, event = InMemory(service, dies_at=1), EVENTS[0]
    with pytest.raises(AssertionError, match=r"no binding of order takes 'new_order': shop"):
        world.publish(event)
    text: Any = orjson.dumps(event).decode()
    with pytest.raises(TypeError, match="message's body as bytes"):
        world.publish(text)
    with pytest.raises(AssertionError, match="takes 'shop'"):
        world.publish((orjson.dumps(event), {"routing_key": "shop"}), routing_key="shop.eu")
    world.publish(event, (EVENTS[1], {"routing_key": "order"}), routing_key="shop.eu")
    world.publish(orjson.dumps(EVENTS[2]))
    assert world.counts == {"received": 3, "processed": 3}


def test_a_service_that_keeps_itself_busy_is_found() -> None:
    with pytest.raises(AssertionError, match=r"again: 'new_order' is event 4\d\d in a row"):
        run(pure(lambda _event: Publish("new_order")))


def test_a_long_chain_of_a_services_own_events_is_no_endless_one() -> None:
    def go_on(event: Event) -> Publish | None:
        left = event.args["left"]
        return Publish("new_order", {"left": left - 1}) if left else None

    world = InMemory(pure(go_on))
    for event in EVENTS[:2]:
        world.publish({**event, "args": {"left": 330}})
    assert world.counts == {"received": 662, "processed": 662}


def test_a_handler_may_publish_thousands() -> None:
    world = run(pure(lambda _event: [Publish("line")] * 2000))
    assert world.counts == {"received": 2001, "processed": 1, "ignored": 2000}


def fail(*_: object, **_args: object) -> None:
    raise RuntimeError("out of stock")


def fail_late(event: Event) -> Iterator[Put]:
    yield Put(f"/orders/{event.id}", b"placed")
    fail()


class FailingModel:
    def __init__(self, n: int) -> None:
        fail(n)


@pytest.mark.parametrize(
    ("service", "reason", "runs"),
    [
        (pure(fail), "failed", 1 + len(Settings().retry_delays)),
        (pure(fail_late), "failed", 1 + len(Settings().retry_delays)),
        (pure(fail, model=fail), "invalid", 1),
        (pure(fail, model=FailingModel), "invalid", 1),
    ],
    ids=["a function", "a generator", "a model", "a class as a model"],
)
def test_what_fails_is_parked_and_what_it_raises_is_kept(
    service: Service, reason: str, runs: int
) -> None:
    world = run(service)
    assert [type(letter) for letter in world.parked] == [Parked]
    assert world.parked[0][:2] == (orjson.dumps(EVENTS[0]), reason)
    assert world.parked[0].error.startswith("RuntimeError: out of stock")
    assert world.counts["retried"] == runs - 1
    assert [str(raised) for raised in world.raised] == ["out of stock"] * runs
    assert not [step for step in world.steps if "behind its handler" in step]


def test_what_is_no_event_is_parked() -> None:
    (letter,) = run(shipment(), b"no event").parked
    assert (letter.reason, letter.error.partition(":")[0]) == ("invalid", "not JSON")


@pytest.mark.parametrize("way", ["plain", "async", "pure"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), pytest.fail.Exception("a time-out")])
def test_an_exception_that_ends_the_test_passes_through_a_handler(
    way: str, error: BaseException
) -> None:
    def end(*_: object) -> None:
        raise error

    with pytest.raises(type(error)):
        run(calling(way, end))


def test_a_handler_of_a_dead_process_makes_no_call() -> None:
    receiver = Receiver()

    def call(event: Event, _timeout_s: float) -> None:
        try:
            receiver.take(event.id + "/1")
        finally:
            receiver.take(event.id + "/2")

    world = run(claimed(call), dies_at=6)
    assert world.steps[-1] == "before a call with the key '0/1'"
    assert receiver.calls == [("0/1", None), ("0/2", None)], "those of the other process"


def test_a_coroutine_that_hangs_is_cancelled_at_its_time_out() -> None:
    calls = list[str]()

    async def hang(event: Event, _timeout_s: float) -> None:
        calls.append(event.id)
        await asyncio.Event().wait()

    world = run(claimed(hang))
    assert [(letter.reason, letter.error) for letter in world.parked] == [
        ("failed", "TimeoutError: it took longer than 5 s")
    ]
    assert calls == ["0"] * (1 + len(Settings().retry_delays))


def test_a_claim_of_a_dead_process_may_last_for_three_long_calls() -> None:
    receiver = Receiver(answer=None)
    world = run(claimed(lambda event, _: receiver.take(event.id), timeout_s=1400), dies_at=6)
    assert world.steps[-1] == "before a call with the key '0'"
    assert world.records == {"0": "done"}


def test_retries_may_take_as_long_as_the_handlers_own_delays() -> None:
    runs = list[str]()

    def fail_slowly(event: Event) -> None:
        runs.append(event.id)
        raise RetryAfter(2400)

    world = run(pure(fail_slowly, retry_delays=["1s", "1s", "40m"]))
    assert [letter.reason for letter in world.parked] == ["failed"]
    assert runs == ["0"] * 4


def test_each_step_is_named_and_the_process_dies_at_its_last() -> None:
    world = run(shipment(), dies_at=5)
    assert world.steps == [
        "before etcd has /incarnation/shipment",
        "etcd has /incarnation/shipment, its answer is unread",
        "new_order 0: before its handler",
        "new_order 0: behind its handler, before its record",
        "before etcd has /service/shipment/0, /parcels/0",
    ]
    assert world.records == {"0": "done"}


def test_what_a_process_has_sent_before_its_end_arrives() -> None:
    undisturbed = run(shipment()).steps
    (unread,) = [
        n for n, step in enumerate(undisturbed, start=1) if "its confirm is unread" in step
    ]
    repeated = run(shipment(), dies_at=unread)
    assert repeated.steps == undisturbed[:unread]
    assert [event["id"] for event in repeated.published] == ["0/shipment/0"] * 2


def test_an_event_that_is_never_settled_fails_with_the_reason() -> None:
    receiver = Receiver(answer=OSError("refused"))
    service = claimed(lambda event, _: receiver.take(event.id))
    said = r"not settled after 3815 s. Missing: \{'circuit breaker of new_order.* records: \{'0'"
    with pytest.raises(AssertionError, match=said) as found:
        run(service, *EVENTS, settings=Settings(breaker_failures=2))
    assert repr(found.value.__cause__) == "OSError('refused')"

    def decode(_body: bytes, _properties: Properties) -> Event:
        raise KeyError("a bug")

    with pytest.raises(AssertionError) as found:
        run(Service("order", noun="orders", decode=decode), b"1")
    assert repr(found.value.__cause__) == "KeyError('a bug')"


# The checks.


@pytest.mark.parametrize("events", [EVENTS, [*map(orjson.dumps, EVENTS), b"no event"]])
def test_what_is_recorded_once_passes_both_checks(events: list[dict[str, object] | bytes]) -> None:
    check_duplicates(lambda: (shipment(), lambda: None), events)
    check_crashes(lambda: (shipment(), lambda: None), events)


def test_a_difference_is_shown_with_ids_or_bodies_in_the_order_of_deliveries() -> None:
    def make() -> Made:
        seen = list[str]()

        def decode(_body: bytes, _properties: Properties) -> Event:
            seen.append("one more")
            raise InvalidEvent

        return Service("order", noun="orders", decode=decode), lambda: seen

    for event, shown in (({"id": "a"}, "a"), (b"body", "b'body'")):
        with pytest.raises(AssertionError, match=f"in the order {shown}, {shown}, {shown}:"):
            check_duplicates(make, [event])


def caller(way: str, *, has_key: bool) -> Made:
    receiver = Receiver()

    def call(event: Event, *_timeout_s: float) -> None:
        receiver.take(event.id if has_key else None, event.id)

    return calling(way, call), receiver.stored


@pytest.mark.parametrize("way", ["plain", "async"])
def test_calls_with_the_events_key_pass_both_checks(way: str) -> None:
    check_duplicates(partial(caller, way, has_key=True), EVENTS)
    check_crashes(partial(caller, way, has_key=True), EVENTS)


def marker(way: str) -> Made:
    """Return a service that marks an event before its call."""
    receiver, marked = Receiver(), set[str]()

    def call(event: Event, _timeout_s: float) -> None:
        if event.id not in marked:
            marked.add(event.id)
            receiver.take(event.id)

    return calling(way, call), receiver.stored


def counter() -> Made:
    """Return a service whose effect depends on how often its handler runs."""
    runs = count(1)
    return pure(lambda _event: Put("/runs", str(next(runs)).encode())), lambda: None


@pytest.mark.parametrize(
    ("make", "difference"),
    [
        *[
            (partial(caller, way, has_key=False), "outside differs killed at .* behind a call with")
            for way in ("plain", "async", "pure")
        ],
        (partial(marker, "plain"), "outside differs killed at .* before a call"),
        (partial(marker, "task"), "outside differs killed at .* before a call"),
        (counter, "effects differs killed at step"),
    ],
)
def test_what_only_a_crash_repeats_or_loses_fails_the_check(
    make: Callable[[], Made], difference: str
) -> None:
    check_duplicates(make, EVENTS)
    with pytest.raises(AssertionError, match=difference):
        check_crashes(make, EVENTS)


CHECKS = [check_duplicates, check_crashes]


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_that_would_prove_nothing_says_so(check: Any) -> None:
    service = pure(lambda _event: [Put(f"/{n}", b"") for n in range(130)])
    with pytest.raises(AssertionError, match="no handler for any of these events"):
        check(lambda: (service, lambda: None), [{**EVENTS[0], "type": "new_oder"}])
    with pytest.raises(AssertionError, match="undisturbed, an event fails too: 130 effects, and"):
        check(lambda: (service, lambda: None), EVENTS)
    check(lambda: (service, lambda: None), EVENTS, Settings(etcd_max_txn_ops=1024))


@pytest.mark.parametrize("check", CHECKS)
def test_an_event_may_have_properties_of_its_own(check: Any) -> None:
    seen = set[str]()

    def make() -> Made:
        service = Service("order", noun="orders", decode=cloudevents.decode)
        service.handler("new_order")(lambda event: seen.add(event.id))
        return service, lambda: None

    attributes = {"specversion": "1.0", "source": "/shop", "type": "new_order"}
    binary = {f"cloudEvents:{name}": value for name, value in attributes.items()}
    messages = [({"n": n}, {"headers": {**binary, "cloudEvents:id": str(n)}}) for n in range(2)]
    structured = {**attributes, "id": "2", "data": {"n": 2}}
    properties = {"content_type": "application/cloudevents+json"}
    check(make, [*messages, (structured, properties)], content_type="application/json")
    assert seen == {"/shop 0", "/shop 1", "/shop 2"}


# The fake receiver.


def test_a_receiver_gives_its_answers_in_order_and_stores_successful_calls() -> None:
    receiver = Receiver(503, ValueError("no"), answer="taken")
    assert receiver.take("a", 1) == 503
    with pytest.raises(ValueError, match="no"):
        receiver.take("a", 2)
    assert receiver.stored() == []
    assert [receiver.take("b", 3), receiver.take("a", 4)] == ["taken", "taken"]
    assert receiver.stored() == [("a", 4), ("b", 3)]
    assert receiver.calls == [("a", 1), ("a", 2), ("b", 3), ("a", 4)]


def test_a_repeat_by_its_key_gets_the_same_answer_and_is_not_stored_again() -> None:
    receiver = Receiver(201, 500)
    answers = [receiver.take(key, 1) for key in ("a", "a", "b", None, None)]
    assert answers == [201, 201, 500, 200, 200]
    assert receiver.stored() == [("a", 1), (None, 1), (None, 1)]
