"""Deliveries taken from the socket's bytes are the ones that pika would have made of them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pika import frame, spec
from pika.channel import ContentFrameAssembler

from idempotent_consumer.amqp import LARGEST_READ_BYTES, Connection, Properties, Reader

CHANNEL, CONSUMER = 1, "ctag1.1"
FRAME_BYTES = 50


class Wire(Connection):
    """pika's connection without a socket; ``seen`` is what came of the bytes, in order."""

    def __init__(self, *, reads: bool) -> None:
        self._frame_buffer, self.bytes_received = b"", 0
        self._assembler = ContentFrameAssembler()
        self.seen: list[Any] = []
        self.left_to_pika = 0
        if reads:
            self.reader = Reader(CHANNEL, CONSUMER, self._deliver)

    def feed(self, data: bytes, cuts: list[int]) -> None:
        """Let the data arrive in pieces."""
        places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
        for start, end in pairwise(places):
            self._on_data_available(data[start:end])

    def _deliver(self, deliveries: list[tuple[int, bytes, bytes]]) -> None:
        for tag, properties, body in deliveries:
            self.seen.append((CHANNEL, CONSUMER, tag, str(Properties().decode(properties)), body))

    def _process_frame(self, frame_value: Any) -> None:
        """Put together what pika has decoded, as its channel does."""
        self.left_to_pika += 1
        if isinstance(frame_value, frame.Heartbeat):
            self.seen.append("heartbeat")
        elif isinstance(frame_value, frame.Method) and not spec.has_content(
            frame_value.method.INDEX
        ):
            self.seen.append(str(frame_value.method))
        elif found := self._assembler.process(frame_value):
            method, header, body = found
            deliver = method.method
            self.seen.append(
                (
                    method.channel_number,
                    deliver.consumer_tag,
                    deliver.delivery_tag,
                    str(header.properties),
                    body,
                )
            )


def delivery(
    tag: int,
    body: bytes,
    properties: pika.BasicProperties | None = None,
    channel: int = CHANNEL,
    consumer: str = CONSUMER,
) -> bytes:
    """Return a delivery as a broker with small frames sends it."""
    deliver = spec.Basic.Deliver(consumer, tag, False, "events", "new_order")
    frames = [
        frame.Method(channel, deliver),
        frame.Header(channel, len(body), properties or pika.BasicProperties()),
        *(
            frame.Body(channel, body[at : at + FRAME_BYTES])
            for at in range(0, len(body), FRAME_BYTES)
        ),
    ]
    return b"".join(each.marshal() for each in frames)


TAGS = st.integers(1, 2**64 - 1)
PROPERTIES = st.builds(
    pika.BasicProperties,
    content_type=st.none() | st.just("application/json"),
    headers=st.none() | st.dictionaries(st.text(max_size=5), st.integers(0, 9), max_size=3),
    delivery_mode=st.none() | st.just(2),
)
DELIVERIES = st.builds(delivery, TAGS, st.binary(max_size=2 * FRAME_BYTES + 5), PROPERTIES)
OTHERS = (
    st.builds(delivery, TAGS, st.binary(max_size=9), channel=st.just(2))
    | st.builds(
        delivery, TAGS, st.binary(max_size=9), consumer=st.sampled_from(["ctag1.2", "ctag1.10", ""])
    )
    | st.sampled_from(
        [
            frame.Heartbeat().marshal(),
            frame.Method(CHANNEL, spec.Basic.Ack(7, True)).marshal(),
            frame.Method(CHANNEL, spec.Basic.Cancel(CONSUMER)).marshal(),
        ]
    )
)


@given(st.lists(DELIVERIES | OTHERS, max_size=8), st.lists(st.integers(0, 4000), max_size=12))
def test_whatever_comes_in_whatever_pieces_is_read_as_pika_reads_it(
    parts: list[bytes], cuts: list[int]
) -> None:
    data = b"".join(parts)
    ours, pikas = Wire(reads=True), Wire(reads=False)
    ours.feed(data, cuts)
    pikas.feed(data, [])
    assert ours.seen == pikas.seen
    assert ours.bytes_received == pikas.bytes_received == len(data)


@given(st.lists(st.integers(0, 4000), max_size=12))
def test_ordinary_deliveries_are_not_left_to_pika(cuts: list[int]) -> None:
    """Wherever the data is cut, but in the few bytes that tell what begins there."""
    data = b"".join(delivery(tag, b'{"id":"1"}') for tag in range(1, 6))
    step = len(data) // 5
    wire = Wire(reads=True)
    wire.feed(data, [cut for cut in cuts if (cut % (len(data) + 1)) % step > 20])
    assert [seen[2] for seen in wire.seen] == [1, 2, 3, 4, 5]
    assert wire.left_to_pika == 0


@pytest.mark.parametrize("at", ["method", "header", "body"])
def test_a_frame_without_its_end_is_an_error_as_it_is_to_pika(at: str) -> None:
    data = bytearray(delivery(1, b"body"))
    ends = [place for place, byte in enumerate(data) if byte == spec.FRAME_END]
    data[dict(zip(("method", "header", "body"), ends, strict=True))[at]] = 0
    with pytest.raises(pika.exceptions.InvalidFrameError):
        Wire(reads=True).feed(bytes(data), [])


def test_a_large_body_is_pikas_from_its_first_bytes_on() -> None:
    wire = Wire(reads=True)
    data = delivery(1, b"x" * LARGEST_READ_BYTES + b"x")
    wire.feed(data, list(range(0, len(data), 4096)))
    assert wire.seen[0][4] == b"x" * LARGEST_READ_BYTES + b"x"
    assert wire.left_to_pika == 2 + len(range(0, LARGEST_READ_BYTES + 1, FRAME_BYTES))


def test_without_a_consumer_everything_is_pikas() -> None:
    """After a cancel pika hands back what still arrives."""
    wire = Wire(reads=True)
    wire.reader = None
    wire.feed(delivery(1, b"body"), [])
    assert wire.left_to_pika == 3


def test_properties_that_cannot_be_decoded_are_read_as_none() -> None:
    assert Properties().decode(b"\xff") == pika.BasicProperties()
    assert Properties().decode(b"\x80\x00\x04text") == pika.BasicProperties(content_type="text")
