"""A channel's deliveries: which acks go out, and that none goes out on another channel."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from idempotent_consumer.bus import Delivery, Epoch


class Channel:
    """Keeps the acks; it is its own connection too."""

    def __init__(self) -> None:
        self.is_open = self.is_read = True
        self.acks: list[tuple[int, bool]] = []

    @property
    def connection(self) -> Channel:
        return self

    def pause_reading(self) -> None:
        assert self.is_read
        self.is_read = False

    def resume_reading(self) -> None:
        assert not self.is_read
        self.is_read = True

    def basic_ack(self, delivery_tag: int, multiple: bool = False) -> None:
        self.acks.append((delivery_tag, multiple))


def epoch_with(deliveries: int) -> tuple[Epoch, Channel, list[Delivery]]:
    channel = Channel()
    epoch = Epoch(1, channel)
    for tag in range(1, deliveries + 1):
        epoch.arrived(tag, 10.0 * tag)
    return epoch, channel, [Delivery(epoch, t, None, b"") for t in range(1, deliveries + 1)]


def test_a_settled_prefix_is_one_ack() -> None:
    epoch, channel, deliveries = epoch_with(5)
    for delivery in deliveries[:3]:
        assert delivery.settle()
    epoch.flush()
    assert channel.acks == [(3, True)]
    assert epoch.in_hand == 2


def test_past_a_gap_nothing_is_acked_at_first_and_each_singly_in_the_end() -> None:
    """A multiple ack over the gap would ack what is still in hand."""
    epoch, channel, deliveries = epoch_with(6)
    for number in (0, 1, 3, 5):
        deliveries[number].settle()
    epoch.flush()
    assert channel.acks == [(2, True)]
    epoch.flush_past_gap()
    assert channel.acks == [(2, True), (4, False), (6, False)]


def test_with_the_first_in_hand_there_is_no_multiple_ack() -> None:
    epoch, channel, deliveries = epoch_with(3)
    deliveries[1].settle()
    deliveries[2].settle()
    epoch.flush_past_gap()
    assert channel.acks == [(2, False), (3, False)]


def test_a_gap_that_closes_is_one_ack_for_all() -> None:
    epoch, channel, deliveries = epoch_with(4)
    deliveries[2].settle()
    epoch.flush()
    for number in (1, 0, 3):
        deliveries[number].settle()
    epoch.flush()
    assert channel.acks == [(4, True)]


def test_nothing_settled_is_no_ack() -> None:
    epoch, channel, _ = epoch_with(2)
    epoch.flush()
    assert channel.acks == []


def test_nothing_is_acked_twice() -> None:
    epoch, channel, deliveries = epoch_with(1)
    deliveries[0].settle()
    epoch.flush()
    epoch.flush_past_gap()
    assert channel.acks == [(1, True)]


def test_a_channel_that_is_closing_gets_no_ack() -> None:
    epoch, channel, deliveries = epoch_with(1)
    deliveries[0].settle()
    channel.is_open = False
    epoch.flush_past_gap()
    assert channel.acks == []


def test_after_the_end_nothing_is_settled_and_what_was_in_hand_is_counted() -> None:
    epoch, channel, deliveries = epoch_with(3)
    deliveries[0].settle()
    assert epoch.end() == 2
    assert not deliveries[1].alive
    assert not deliveries[1].settle()
    channel.is_open = False
    epoch.flush_past_gap()
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
            epoch.flush_past_gap()
            for tag, multiple in channel.acks:
                assert tag in unacked, "an ack that names nothing closes the channel"
                unacked -= {t for t in unacked if t <= tag} if multiple else {tag}
            channel.acks.clear()
            assert unacked == set(range(1, number + 1)) - settled


def test_with_too_many_bytes_in_hand_nothing_is_read_until_half_of_them_are_settled() -> None:
    channel = Channel()
    epoch = Epoch(1, channel, max_bytes=100)
    assert [epoch.arrived(tag, size_bytes=40) for tag in (1, 2)] == [False, False]
    assert channel.is_read
    assert [epoch.arrived(tag, size_bytes=40) for tag in (3, 4)] == [True, False]
    for tag, is_read in ((3, False), (1, False), (2, True), (4, True)):
        epoch.settle(tag)
        assert channel.is_read == is_read
    epoch.arrived(5, size_bytes=101)
    assert (channel.is_read, epoch.pauses) == (False, 2)


def test_a_channel_that_ends_is_read_on() -> None:
    """Its connection is closed, and the broker's agreement has to be read."""
    channel = Channel()
    epoch = Epoch(1, channel, max_bytes=100)
    epoch.arrived(1, size_bytes=101)
    epoch.end()
    assert channel.is_read
