"""What a message carries when it is sent on, and how often it has failed."""

from __future__ import annotations

from typing import Any

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st

from idempotent_consumer.amqp import forwarded_properties
from idempotent_consumer.bus import Delivery, Epoch

OURS: dict[str, object] = {"x-reason": "invalid", "x-error": "not JSON"}


def with_headers(headers: Any) -> Delivery:
    return Delivery(Epoch(1, None), 1, pika.BasicProperties(headers=headers), b"")


def encoded_size(properties: pika.BasicProperties) -> int:
    return sum(map(len, properties.encode()))


def test_what_describes_the_body_is_kept() -> None:
    kept = {
        "content_type": "application/json",
        "content_encoding": "utf-8",
        "priority": 3,
        "correlation_id": "c",
        "reply_to": "r",
        "message_id": "m",
        "timestamp": 1_700_000_000,
        "type": "t",
        "app_id": "a",
    }
    sent = forwarded_properties(pika.BasicProperties(**kept, headers={"trace": "abc"}), OURS)
    assert {name: getattr(sent, name) for name in kept} == kept
    assert sent.headers == {"trace": "abc", **OURS}


def test_it_is_always_persistent() -> None:
    assert forwarded_properties(pika.BasicProperties(delivery_mode=1), OURS).delivery_mode == 2


@pytest.mark.parametrize("name", ["expiration", "user_id", "cluster_id"])
def test_what_would_end_or_refuse_it_is_dropped(name: str) -> None:
    """An expiration would end its wait, and the broker checks a user id against the sender."""
    assert getattr(forwarded_properties(pika.BasicProperties(**{name: "1000"}), OURS), name) is None


@pytest.mark.parametrize("name", ["CC", "BCC"])
def test_it_goes_nowhere_else(name: str) -> None:
    assert (
        forwarded_properties(pika.BasicProperties(headers={name: ["other"]}), OURS).headers == OURS
    )


@pytest.mark.parametrize(
    "name",
    [
        "x-death",
        "x-first-death-queue",
        "x-first-death-reason",
        "x-last-death-exchange",
        "x-delivery-count",
        "x-acquired-count",
    ],
)
def test_the_brokers_own_headers_are_dropped(name: str) -> None:
    """RabbitMQ drops a message that its x-death shows to go round in a circle."""
    headers = {name: [{"queue": "order"}] if name == "x-death" else "1"}
    assert forwarded_properties(pika.BasicProperties(headers=headers), OURS).headers == OURS


@pytest.mark.parametrize("name", ["CCTV", "BCC-list", "CC-"])
def test_a_producers_header_that_only_begins_like_one_of_those_is_kept(name: str) -> None:
    sent = forwarded_properties(pika.BasicProperties(headers={name: "kept"}), OURS)
    assert sent.headers == {name: "kept", **OURS}


def test_ours_win_over_theirs() -> None:
    sent = forwarded_properties(pika.BasicProperties(headers={"x-reason": "mine"}), OURS)
    assert sent.headers["x-reason"] == "invalid"


def test_a_message_without_headers_gets_ours() -> None:
    assert forwarded_properties(pika.BasicProperties(), OURS).headers == OURS


@pytest.mark.parametrize(
    "properties",
    [
        pika.BasicProperties(headers={"x": object()}),
        pika.BasicProperties(headers={"x" * 256: "name too long"}),
        pika.BasicProperties(headers={"x": 2**70}),
        pika.BasicProperties(headers={"x": "a" * 70_000}),
        pika.BasicProperties(headers={f"x{n}": "a" * 100 for n in range(1000)}),
        pika.BasicProperties(content_type="a" * 300),
        pika.BasicProperties(headers={"x": {"y": [object()]}}),
    ],
)
def test_what_cannot_be_written_in_one_frame_gives_way_to_our_headers(
    properties: pika.BasicProperties,
) -> None:
    """The body and the reason arrive; a message that closes the connection each time does not."""
    sent = forwarded_properties(properties, OURS)
    assert sent.headers == OURS
    assert encoded_size(sent) < 64 * 1024


HEADER_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.text(max_size=20)
    | st.binary(max_size=20)
    | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.text(max_size=300), HEADER_VALUES, max_size=6))
def test_whatever_headers_arrive_it_can_be_sent_on(headers: dict[str, Any]) -> None:
    sent = forwarded_properties(pika.BasicProperties(headers=headers), OURS)
    assert encoded_size(sent) <= 64 * 1024
    assert sent.headers is not None
    assert OURS.items() <= sent.headers.items()


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (None, 0),
        ({}, 0),
        ({"x-attempts": 2}, 2),
        ({"x-attempts": 1000}, 1000),
        ({"x-attempts": "3"}, 0),
        ({"x-attempts": -1}, 0),
        ({"x-attempts": True}, 0),
        ({"x-attempts": 2**63}, 0),
        ({"x-attempts": 1001}, 0),
        ({"x-attempts": 1.5}, 0),
        ({"x-attempts": None}, 0),
        ({"x-attempts": [1]}, 0),
        ({"X-Attempts": 5}, 0),
    ],
)
def test_attempts_are_believed_only_where_they_make_sense(headers: Any, expected: int) -> None:
    assert with_headers(headers).attempts == expected
