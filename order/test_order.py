"""The order service: one document for each event, under the event's own key."""

import json

import pytest

import order
from idempotent_consumer import Event, Put, encode_id


def placed(event_id: str, **args: object) -> Put:
    put = order.place_order(Event(event_id, "new_order", args))
    assert isinstance(put, Put)
    return put


def test_it_handles_exactly_new_order_and_has_no_effect_outside() -> None:
    assert list(order.service.handlers) == ["new_order"]
    assert not order.service.handlers["new_order"].claimed
    assert (order.service.name, order.service.noun) == ("order", "orders")


def test_the_order_is_one_effect_under_its_events_id() -> None:
    put, args = placed("123", item="bicycle", n=2), {"item": "bicycle", "n": 2}
    assert put.key == "/orders/123"
    assert json.loads(put.value) == {"id": "123", "status": "placed", "args": args}


@pytest.mark.parametrize("event_id", ["a/b", "é", "\0", "x" * 10_000, "sha256:0", "a b\n"])
def test_any_id_has_a_key_of_its_own(event_id: str) -> None:
    put = placed(event_id)
    assert put.key == "/orders/" + encode_id(event_id)
    assert json.loads(put.value)["id"] == event_id


def test_the_same_event_gives_the_same_bytes() -> None:
    """Two replicas that handle the same event write the same order."""
    assert placed("1", a=1) == placed("1", a=1)
