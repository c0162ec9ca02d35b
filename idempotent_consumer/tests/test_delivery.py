"""A delivery: which ack settles it, and what it is sent on with."""

from __future__ import annotations

from typing import Any

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st

from idempotent_consumer.amqp import forwarded_properties
from idempotent_consumer.bus import Delivery, Epoch


class Channel:
    """Keeps the acks."""

    def __init__(self) -> None:
        self.is_open = True
        self.acks: list[tuple[int, bool]] = []

    def basic_ack(self, delivery_tag: int, multiple: bool = False) -> None:
        self.acks.append((delivery_tag, multiple))


def epoch_with(deliveries: int) -> tuple[Epoch, Channel, list[Delivery]]:
    channel = Channel()
    epoch = Epoch(1, channel)
    for tag in range(1, deliveries + 1):
        epoch.arrived(tag)
    return epoch, channel, [Delivery(epoch, t, None, b"") for t in range(1, deliveries + 1)]


def test_after_the_end_nothing_is_settled_and_what_was_in_hand_is_counted() -> None:
    epoch, channel, deliveries = epoch_with(3)
    deliveries[0].settle()
    assert epoch.end() == 2
    assert not deliveries[1].alive
    assert not deliveries[1].settle()
    channel.is_open = False
    epoch.flush(past_gap=True)
    assert channel.acks == []


@given(st.integers(1, 40), st.data())
def test_in_any_order_exactly_the_settled_are_acked(number: int, data: Any) -> None:
    """Read as the broker reads it: multiple means everything up to the tag."""
    epoch, channel, deliveries = epoch_with(number)
    order = data.draw(st.permutations(range(number)))
    unacked, settled = set(range(1, number + 1)), set()
    for position in order:
        deliveries[position].settle()
        settled.add(position + 1)
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


# What it is sent on with. All else stays the bytes that came.

OURS: dict[str, object] = {"x-reason": "invalid", "x-error": "not JSON"}


@pytest.mark.parametrize(
    "properties",
    [
        pika.BasicProperties(headers={"x": object()}),
        pika.BasicProperties(headers={"x" * 256: "name too long"}),
        pika.BasicProperties(headers={"x": 2**70}),
        pika.BasicProperties(headers={"x": "a" * 131_000}),
        pika.BasicProperties(headers={f"x{n}": "a" * 100 for n in range(1500)}),
        pika.BasicProperties(content_type="a" * 300),
        pika.BasicProperties(headers={"x": {"y": [object()]}}),
    ],
)
def test_what_does_not_fit_a_frame_gives_way_to_our_headers(
    properties: pika.BasicProperties,
) -> None:
    """The body and the reason arrive; a message that closes the connection each time does not."""
    sent = forwarded_properties(properties, OURS)
    assert sent.headers == OURS
    assert sum(map(len, sent.encode())) < 64 * 1024


def test_what_fits_a_frame_is_sent_on() -> None:
    headers = {"x": "a" * 130_000}
    assert (
        forwarded_properties(pika.BasicProperties(headers=headers), OURS).headers == headers | OURS
    )


NO_ATTEMPTS: list[Any] = [None, {}, {"X-Attempts": 5}]
NONSENSE = ("3", -1, True, 2**63, 1001, 1.5, None, [1])


@pytest.mark.parametrize(
    ("headers", "attempts"),
    [
        *(({"x-attempts": number}, number) for number in (0, 2, 1000)),
        *((headers, 0) for headers in NO_ATTEMPTS),
        *(({"x-attempts": nonsense}, 0) for nonsense in NONSENSE),
    ],
)
def test_attempts_are_believed_only_where_they_make_sense(headers: Any, attempts: int) -> None:
    arrived = Delivery(Epoch(1, None), 1, pika.BasicProperties(headers=headers), b"")
    assert arrived.attempts == attempts
