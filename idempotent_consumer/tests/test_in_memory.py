"""The library's help for tests of one's own handlers: it finds what it is to find."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
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


def shipment() -> Service:
    service = Service("shipment", noun="parcels")

    @service.handler("new_order")
    def ship(event: Event) -> list[Put | Publish]:
        return [Put(f"/parcels/{event.id}", b"packed"), Publish("shipped", {"order": event.id})]

    return service


def notify(way: str, *, has_key: bool) -> tuple[Service, Callable[[], object]]:
    """Return a service whose handler calls outside, and what tells what came of its calls.

    A pure one must not: it is there to be found.
    """
    service, receiver = Service("notify", noun="notifications"), Receiver()

    def call(event: Event, _timeout_s: float = 5) -> None:
        receiver.take(event.id if has_key else None, event.id)

    async def wait(event: Event, _timeout_s: float) -> None:
        await asyncio.sleep(1)
        call(event)

    if way == "pure":
        service.handler("new_order")(call)
    else:
        service.claimed_handler("new_order", timeout_s=5)(wait if way == "async" else call)
    return service, receiver.stored


def test_a_run_in_memory_shows_what_came_of_it() -> None:
    world = InMemory(shipment())
    world.publish(*EVENTS, EVENTS[0])
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
def test_a_service_receives_what_it_publishes_as_far_as_its_bindings_say(
    bindings: list[str], handled: list[str]
) -> None:
    service, seen = Service("order", noun="orders", exchange="shop", bindings=bindings), list[str]()

    def handle(event: Event, *following: str) -> list[Publish]:
        seen.append(event.type)
        return [Publish(kind) for kind in following]

    service.handler("new_order")(lambda event: handle(event, "order.packed"))
    service.handler("order.packed")(lambda event: handle(event, "order.shipped"))
    service.handler("order.shipped")(handle)
    world = InMemory(service)
    world.publish(EVENTS[0], routing_key="new_order" if "new_order" in bindings else "x.packed")
    assert seen == handled
    published = [event["type"] for event in world.published]
    assert published == ["order.packed", "order.shipped"][: len(handled)]


def test_an_event_that_no_binding_takes_would_not_arrive() -> None:
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
    service = Service("order", noun="orders")
    service.handler("new_order")(lambda _event: Publish("new_order"))
    with pytest.raises(AssertionError, match=r"again: 'new_order' is event 4\d\d in a row"):
        InMemory(service).publish(EVENTS[0])


def test_a_long_chain_of_a_services_own_events_comes_to_its_end_each_time() -> None:
    service = Service("order", noun="orders")

    @service.handler("step")
    def go_on(event: Event) -> Publish | None:
        left = event.args["left"]
        return Publish("step", {"left": left - 1}) if left else None

    world = InMemory(service)
    for number in range(2):
        world.publish({"id": str(number), "type": "step", "args": {"left": 330}})
    assert world.counts == {"received": 662, "processed": 662}


def test_a_handler_may_publish_thousands() -> None:
    service = Service("order", noun="orders")
    service.handler("new_order")(lambda _event: [Publish("line")] * 2000)
    world = InMemory(service)
    world.publish(EVENTS[0])
    assert world.counts == {"received": 2001, "processed": 1, "ignored": 2000}


def test_what_fails_is_retried_and_then_parked() -> None:
    service = Service("order", noun="orders")

    @service.handler("new_order")
    def fail(_event: Event) -> None:
        raise RuntimeError("out of stock")

    world = InMemory(service)
    world.publish(EVENTS[0], b"no event")
    assert [(letter.reason, letter.error.partition(":")[0]) for letter in world.parked] == [
        ("invalid", "not JSON"),
        ("failed", "RuntimeError"),
    ]
    assert isinstance(world.parked[0], Parked)
    assert world.counts["retried"] == len(Settings().retry_delays)
    assert [str(raised) for raised in world.raised] == ["out of stock"] * 4


@pytest.mark.parametrize("way", ["plain", "async", "pure"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), pytest.fail.Exception("a time-out")])
def test_what_ends_the_test_ends_it_from_within_a_handler_too(
    way: str, error: BaseException
) -> None:
    def end(*_: object) -> None:
        raise error

    async def end_later(_event: Event, _timeout_s: float) -> None:
        end()

    service = Service("order", noun="orders")
    if way == "pure":
        service.handler("new_order")(end)
    else:
        service.claimed_handler("new_order", 5)(end_later if way == "async" else end)
    with pytest.raises(type(error)):
        InMemory(service).publish(EVENTS[0])


def test_what_a_generator_raises_is_kept() -> None:
    service = Service("order", noun="orders")

    @service.handler("new_order")
    def fail(event: Event) -> Iterator[Put]:
        yield Put(f"/orders/{event.id}", b"placed")
        raise RuntimeError("out of stock")

    world = InMemory(service)
    world.publish(EVENTS[0])
    assert [str(raised) for raised in world.raised] == ["out of stock"] * 4
    assert not [step for step in world.steps if "behind its handler" in step]


@pytest.mark.parametrize("is_class", [False, True])
def test_what_a_model_raises_is_kept(*, is_class: bool) -> None:
    class Model:
        def __init__(self, n: int) -> None:
            raise LookupError(n)

    service = Service("order", noun="orders")
    model = Model if is_class else lambda args: Model(**args)
    service.handler("new_order", model=model)(lambda _event, _order: None)
    world = InMemory(service)
    world.publish(EVENTS[0])
    assert [letter.reason for letter in world.parked] == ["invalid"]
    assert [repr(raised) for raised in world.raised] == ["LookupError(0)"]


@pytest.mark.parametrize("events", [EVENTS, [*map(orjson.dumps, EVENTS), b"no event"]])
def test_what_is_recorded_once_passes_both_checks(events: list[dict[str, object] | bytes]) -> None:
    check_duplicates(lambda: (shipment(), lambda: None), events)
    check_crashes(lambda: (shipment(), lambda: None), events)


def test_a_difference_is_told_with_ids_or_bodies_in_the_order_of_deliveries() -> None:
    def make() -> tuple[Service, Callable[[], object]]:
        seen = list[str]()

        def decode(_body: bytes, _properties: Properties) -> Event:
            seen.append("one more")
            raise InvalidEvent

        return Service("order", noun="orders", decode=decode), lambda: seen

    for event, shown in (({"id": "a"}, "a"), (b"body", "b'body'")):
        with pytest.raises(AssertionError, match=f"in the order {shown}, {shown}, {shown}:"):
            check_duplicates(make, [event])


@pytest.mark.parametrize("way", ["plain", "async"])
def test_calls_with_the_events_key_pass_both_checks(way: str) -> None:
    check_duplicates(partial(notify, way, has_key=True), EVENTS)
    check_crashes(partial(notify, way, has_key=True), EVENTS)


@pytest.mark.parametrize("way", ["plain", "async", "pure"])
def test_calls_without_one_are_found_where_a_process_dies_behind_its_call(way: str) -> None:
    check_duplicates(partial(notify, way, has_key=False), EVENTS)
    with pytest.raises(AssertionError, match=r"outside differs killed at .* behind a call with"):
        check_crashes(partial(notify, way, has_key=False), EVENTS)


@pytest.mark.parametrize("way", ["plain", "async"])
def test_an_event_that_is_marked_before_its_call_is_found(way: str) -> None:
    def make() -> tuple[Service, Callable[[], object]]:
        service, receiver, marked = Service("notify", noun="calls"), Receiver(), set[str]()

        def call(event: Event, _timeout_s: float) -> None:
            if event.id not in marked:
                marked.add(event.id)
                receiver.take(event.id)

        async def wait(event: Event, timeout_s: float) -> None:
            await asyncio.create_task(asyncio.to_thread(call, event, timeout_s))

        service.claimed_handler("new_order", timeout_s=5)(wait if way == "async" else call)
        return service, receiver.stored

    check_duplicates(make, EVENTS)
    with pytest.raises(AssertionError, match=r"outside differs killed at .* before a call"):
        check_crashes(make, EVENTS)


def test_a_handler_of_a_dead_process_makes_no_call() -> None:
    receiver = Receiver()
    service = Service("notify", noun="notifications")

    @service.claimed_handler("new_order", timeout_s=5)
    def call(event: Event, _timeout_s: float) -> None:
        try:
            receiver.take(event.id + "/1")
        finally:
            receiver.take(event.id + "/2")

    world = InMemory(service, dies_at=6)
    world.publish(EVENTS[0])
    assert world.steps[-1] == "before a call with the key '0/1'"
    assert receiver.calls == [("0/1", None), ("0/2", None)], "those of the other process"


def test_a_coroutine_that_hangs_is_cancelled_and_no_time_is_lost() -> None:
    service, calls = Service("notify", noun="notifications"), list[str]()

    @service.claimed_handler("new_order", timeout_s=5)
    async def hang(event: Event, _timeout_s: float) -> None:
        calls.append(event.id)
        await asyncio.Event().wait()

    world = InMemory(service)
    world.publish(EVENTS[0])
    assert [(letter.reason, letter.error) for letter in world.parked] == [
        ("failed", "TimeoutError: it took longer than 5 s")
    ]
    assert calls == ["0"] * (1 + len(Settings().retry_delays))


def test_a_claim_of_a_dead_process_may_last_for_three_long_calls() -> None:
    service, receiver = Service("notify", noun="notifications"), Receiver()

    @service.claimed_handler("new_order", timeout_s=1400)
    def call(event: Event, _timeout_s: float) -> None:
        receiver.take(event.id)

    world = InMemory(service, dies_at=6)
    world.publish(EVENTS[0])
    assert world.steps[-1] == "before a call with the key '0'"
    assert world.records == {"0": "done"}


def test_why_something_is_never_settled_is_said() -> None:
    service, receiver = Service("notify", noun="notifications"), Receiver(answer=OSError("refused"))
    service.claimed_handler("new_order", timeout_s=5)(lambda event, _: receiver.take(event.id))
    said = r"not settled after 3815 s. Missing: \{'circuit breaker of new_order.* records: \{'0'"
    with pytest.raises(AssertionError, match=said) as found:
        InMemory(service, Settings(breaker_failures=2)).publish(*EVENTS)
    assert repr(found.value.__cause__) == "OSError('refused')"

    def decode(_body: bytes, _properties: Properties) -> Event:
        raise KeyError("a bug")

    with pytest.raises(AssertionError) as found:
        InMemory(Service("order", noun="orders", decode=decode)).publish(b"1")
    assert repr(found.value.__cause__) == "KeyError('a bug')"


CHECKS = [check_duplicates, check_crashes]


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_that_would_prove_nothing_says_so(check: Any) -> None:
    service = Service("order", noun="orders")
    service.handler("new_order")(lambda _event: [Put(f"/{n}", b"") for n in range(130)])
    with pytest.raises(AssertionError, match="no handler for any of these events"):
        check(lambda: (service, lambda: None), [{**EVENTS[0], "type": "new_oder"}])
    with pytest.raises(AssertionError, match="undisturbed, an event fails too: 130 effects, and"):
        check(lambda: (service, lambda: None), EVENTS)
    check(lambda: (service, lambda: None), EVENTS, Settings(etcd_max_txn_ops=1024))


@pytest.mark.parametrize("check", CHECKS)
def test_an_event_may_have_properties_of_its_own(check: Any) -> None:
    seen = set[str]()

    def make() -> tuple[Service, Callable[[], object]]:
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


def test_retries_may_take_as_long_as_the_handlers_own_delays() -> None:
    service, runs = Service("order", noun="orders"), list[str]()

    @service.handler("new_order", retry_delays=["1s", "1s", "40m"])
    def fail(event: Event) -> None:
        runs.append(event.id)
        raise RetryAfter(2400)

    world = InMemory(service)
    world.publish(EVENTS[0])
    assert [letter.reason for letter in world.parked] == ["failed"]
    assert runs == ["0"] * 4


def test_effects_that_depend_on_how_often_a_handler_runs_are_found() -> None:
    def make() -> tuple[Service, Callable[[], object]]:
        service, runs = Service("order", noun="orders"), list[str]()

        @service.handler("new_order")
        def count(event: Event) -> Put:
            runs.append(event.id)
            return Put("/runs", str(len(runs)).encode())

        return service, lambda: None

    with pytest.raises(AssertionError, match="effects differs killed at step"):
        check_crashes(make, EVENTS)


def test_each_step_is_named_and_one_is_the_last_where_the_process_dies() -> None:
    world = InMemory(shipment(), dies_at=5)
    world.publish(EVENTS[0])
    assert world.steps == [
        "before etcd has /incarnation/shipment",
        "etcd has /incarnation/shipment, its answer is unread",
        "new_order 0: before its handler",
        "new_order 0: behind its handler, before its record",
        "before etcd has /service/shipment/0, /parcels/0",
    ]
    assert world.records == {"0": "done"}


# The fake receiver.


def test_a_receiver_answers_as_it_is_told_and_stores_what_it_answers_well() -> None:
    receiver = Receiver(503, ValueError("no"), answer="taken")
    assert receiver.take("a", 1) == 503
    with pytest.raises(ValueError, match="no"):
        receiver.take("a", 2)
    assert receiver.stored() == []
    assert [receiver.take("b", 3), receiver.take("a", 4)] == ["taken", "taken"]
    assert receiver.stored() == [("a", 4), ("b", 3)]
    assert receiver.calls == [("a", 1), ("a", 2), ("b", 3), ("a", 4)]


def test_a_repeat_by_its_key_is_answered_as_the_first_time_and_stores_nothing() -> None:
    receiver = Receiver(201, 500)
    answers = [receiver.take(key, 1) for key in ("a", "a", "b", None, None)]
    assert answers == [201, 201, 500, 200, 200]
    assert receiver.stored() == [("a", 1), (None, 1), (None, 1)]
