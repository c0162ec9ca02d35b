"""The service writes one document for each event, even if something happens twice."""

import json
from collections.abc import Callable

import placeholder
from idempotent_consumer import Service
from idempotent_consumer.testing import InMemory, check_crashes, check_duplicates

EVENTS = [{"id": f"order-{n}", "type": "new_order", "args": {"number": n}} for n in range(3)]


def make() -> tuple[Service, Callable[[], object]]:
    """Return the service, and what the outside has seen of it: nothing, its handler is pure."""
    return placeholder.service, lambda: None


def test_each_event_is_handled_once_and_leaves_its_document() -> None:
    world = InMemory(placeholder.service)
    world.publish(*EVENTS, EVENTS[0])
    assert world.counts == {"received": 4, "processed": 3, "processed_skipped": 1}
    assert len(world.effects) == len(EVENTS)
    assert json.loads(world.effects["/documents/placeholder/order-1"]) == {
        "id": "order-1",
        "item": "",
        "number": 1,
    }


def test_an_event_that_the_model_does_not_take_is_parked_with_its_words() -> None:
    world = InMemory(placeholder.service)
    world.publish({"id": "order-1", "type": "new_order", "args": {"nmber": 2}})
    (parked,) = world.parked
    assert parked.reason == "invalid"
    assert "nmber" in parked.error
    assert world.effects == {}


def test_nobody_sees_a_duplicate() -> None:
    check_duplicates(make, EVENTS)


def test_nobody_sees_that_a_process_died() -> None:
    check_crashes(make, EVENTS)
