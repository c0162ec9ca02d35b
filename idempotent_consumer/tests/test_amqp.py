"""AMQP with pika: parameters, errors, reading and writing, headers, and pika's private names."""

from __future__ import annotations

import asyncio
import inspect
import ssl
import struct
from collections.abc import Coroutine
from datetime import UTC, datetime
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pika
import pika.exceptions as amqp
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pika import frame, spec
from pika.channel import ContentFrameAssembler

from fakes.headers import (
    DOUBLE,
    FLOAT,
    HOSTILE,
    NAN,
    array,
    encoded,
    entry,
    header_entries,
    table,
)
from idempotent_consumer.amqp import (
    LARGEST_READ_BYTES,
    TCP_OPTIONS,
    Connection,
    Properties,
    Reader,
    explain,
    forwarded_properties,
    keep_header_bytes,
    parameters_of,
)
from idempotent_consumer.settings import SettingsError


class Workflow(Exception):
    """As pika wraps the errors of its attempts to connect."""

    def __init__(self, *inner: Exception) -> None:
        super().__init__("a workflow failed")
        self.exceptions = inner


REFUSED = "user or the password"
LOGIN = amqp.ConnectionClosedByBroker(403, "ACCESS_REFUSED - Login was refused")
LATE = "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out"
OTHER_TYPE = "PRECONDITION_FAILED - inequivalent arg 'type' for exchange 'events' in vhost '/'"
OTHER_ARGUMENTS = "PRECONDITION_FAILED - inequivalent arg 'x-delivery-limit'"


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (amqp.ChannelClosedByBroker(406, OTHER_ARGUMENTS), "delete_queue"),
        (amqp.ChannelClosedByBroker(406, LATE), "timed out"),
        (amqp.ChannelClosedByBroker(404, "NOT_FOUND - no queue 'order'"), "declared again"),
        (amqp.ProbableAuthenticationError(repr(LOGIN)), REFUSED),
        (LOGIN, REFUSED),
        (Workflow(Workflow(amqp.ProbableAuthenticationError(repr(LOGIN)))), REFUSED),
        # A broker can be shut down during the login, too.
        (amqp.ProbableAuthenticationError(repr(amqp.StreamLostError("EOF"))), "EOF"),
        (amqp.ConnectionOpenAborted("Connection.close() called"), "does not answer"),
        (Workflow(OSError(111, "Connection refused")), "Connection refused"),
        (amqp.ConnectionClosedByBroker(320, "CONNECTION_FORCED - by an operator"), "an operator"),
        (TimeoutError(), "TimeoutError"),
        (amqp.ChannelClosedByBroker(406, OTHER_TYPE), "exchange="),
        (amqp.IncompatibleProtocolError("Transport indicated EOF"), "15672"),
    ],
)
def test_an_error_is_explained_in_one_line(error: Exception, part: str) -> None:
    """Deleting something costs events, so it is advised only for arguments that differ."""
    line = explain(error)
    assert part in line
    assert ("delete " in line) == (part in ("delete_queue", "exchange="))
    assert "\n" not in line
    assert len(line) <= 700


@pytest.mark.parametrize(
    ("url", "name", "value"),
    [
        ("amqp://h/", "heartbeat", 10),
        ("amqp://h/?heartbeat=60", "heartbeat", 60),
        ("amqp://h/?heartbeat=65535", "heartbeat", 65_535),
        ("amqp://h/", "tcp_options", TCP_OPTIONS),
        ("amqp://h/", "client_properties", {"connection_name": "test"}),
        ("amqp://h/?tcp_options={'TCP_KEEPIDLE':1}", "tcp_options", {"TCP_KEEPIDLE": 1}),
        ("amqp://h/" + "v" * 255, "virtual_host", "v" * 255),
    ],
)
def test_a_url_gets_our_options_unless_it_has_its_own(url: str, name: str, value: object) -> None:
    assert getattr(parameters_of(url, "test"), name) == value


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("amqp://h/?heartbeat=0", "without heartbeats a frozen broker is never noticed"),
        ("amqp://h/?heartbeat=soon", "heartbeat"),
        ("amqp://h/?heartbeat=65536", "heartbeat takes at most 65535 seconds"),
        ("amqp://h/?heartbeat=-1", "heartbeat"),
        ("amqp://h/?heartbeat=5&heartbeat=6", "its query has heartbeat more than once"),
        ("amqp://h/" + "v" * 256, "its virtual host is longer"),
        ("amqp://h/?tcp_options={'TCP_KEEPIDLE':0}", "tcp_options: Invalid argument"),
        (f"amqp://h/?tcp_options={{'TCP_KEEPIDLE':{2**40}}}", "tcp_options"),
        ("amqp://h/?tcp_options={'TCP_KEEPIDLE':'3'}", "tcp_options"),
        # A letter, as of a single URL where several are expected. pika takes it for localhost.
        ("a", "write amqp://"),
    ],
)
def test_a_url_that_no_connection_could_use_is_a_wrong_setting(url: str, says: str) -> None:
    with pytest.raises(SettingsError, match=rf"^RABBITMQ_URL: .*{says}"):
        parameters_of(url, "test")


@pytest.mark.filterwarnings("ignore:ssl.PROTOCOL_TLS")
def test_a_protocol_with_which_tls_checks_no_certificate_is_a_wrong_setting() -> None:
    """pika makes the TLS context for it, and only a client's context checks certificates."""
    options = {"ca_certs": str(Path(__file__).with_name("fakes") / "tls/certificate.pem")}
    url = "amqps://h/?ssl_options="
    assert parameters_of(f"{url}{options}", "test").ssl_options.context.check_hostname
    with pytest.raises(SettingsError, match="TLS checks no certificate"):
        parameters_of(f"{url}{options | {'protocol': int(ssl.PROTOCOL_TLS)}}", "test")


# Writing.


class WrittenTo(Connection):
    """A connection to a transport that records each write."""

    def __init__(self) -> None:
        self._unwritten = bytearray()
        self.writes: list[bytes] = []
        self._transport: Any = self

    @property
    def ioloop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def end(self) -> None:
        """Lose the transport."""
        self._transport = None

    emit = Connection._adapter_emit_data


def run_without_defects(work: Coroutine[Any, Any, Any]) -> Any:
    """Run it; the event loop's exception handler must not be called."""
    with asyncio.Runner() as runner:
        defects: list[Any] = []
        runner.get_loop().set_exception_handler(lambda _, context: defects.append(context))
        result = runner.run(work)
    assert defects == []
    return result


TURN = b"the loop's next turn"
LARGE = b"x" * 100_000


@pytest.mark.parametrize(
    ("turns", "writes"),
    [
        ([[b"1", b"2", b"3"], [b"4"], [b"5", b"6"]], [TURN, b"123", TURN, b"4", TURN, b"56"]),
        ([[b"1", LARGE, b"2", LARGE, b"3"]], [b"1" + LARGE, b"2" + LARGE, TURN, b"3"]),
    ],
    ids=["small", "large"],
)
def test_one_turn_is_one_write_unless_it_is_large(
    turns: list[list[bytes]], writes: list[bytes]
) -> None:
    """Large data is written at once instead of being joined with more and more."""

    async def send() -> list[bytes]:
        wire = WrittenTo()
        for turn in turns:
            for data in turn:
                wire.emit(data)
            wire.writes.append(TURN)
            await asyncio.sleep(0)
        return wire.writes

    assert asyncio.run(send()) == writes


def test_what_is_sent_after_the_end_is_dropped() -> None:
    async def send() -> list[bytes]:
        wire = WrittenTo()
        wire.emit(b"1")
        wire.end()
        wire.resume_reading()
        await asyncio.sleep(0)
        return wire.writes

    assert run_without_defects(send()) == []


# Connecting.


def test_a_connection_that_is_closed_during_its_handshake_ends_without_a_defect() -> None:
    """A service that is stopped while it reconnects exits with 0."""

    async def close_while_opening() -> BaseException:
        loop = asyncio.get_running_loop()
        greeted, ended = loop.create_future(), loop.create_future()

        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            greeted.set_result(await reader.readexactly(8))
            await reader.read()
            writer.close()

        async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            connection = Connection(
                pika.URLParameters(f"amqp://127.0.0.1:{port}/"),
                on_open_error_callback=lambda _, error: ended.set_result(error),
            )
            assert await greeted == b"AMQP\0\0\x09\x01"
            connection.close()
            error: BaseException = await ended
            return error

    assert isinstance(run_without_defects(close_while_opening()), amqp.ConnectionOpenAborted)


async def failure_of(connection_type: type[Connection], url: str) -> tuple[str, BaseException]:
    """Return who gets the error, the loop or the connection, and the error."""
    loop = asyncio.get_running_loop()
    told = loop.create_future()
    loop.set_exception_handler(lambda _, context: told.set_result(("loop", context["exception"])))
    connection_type(
        pika.URLParameters(url),
        on_open_error_callback=lambda _, error: told.set_result(("connection", error)),
    )
    found: tuple[str, BaseException] = await told
    return found


class ResetAtOnce(Connection):
    """A connection whose socket is no longer connected when pika looks at it."""

    def _adapter_connect_stream(self) -> None:
        super()._adapter_connect_stream()

        def connect_socket(_socket: Any, _address: Any, on_done: Any) -> Any:
            return self.ioloop.call_soon(on_done, None)

        self._nbio.connect_socket = connect_socket


@pytest.mark.parametrize(
    ("connection_type", "query", "says"),
    [
        # As if no file descriptor were left.
        (Connection, "?tcp_options={'TCP_KEEPIDLE':0}", "Invalid argument"),
        (ResetAtOnce, "", "reset"),
    ],
)
def test_what_a_socket_raises_while_it_connects_is_a_failure_to_connect(
    connection_type: type[Connection], query: str, says: str
) -> None:
    """pika leaves it to the loop, and a service would end, or wait for ever."""
    told, error = asyncio.run(failure_of(connection_type, f"amqp://127.0.0.1:1/{query}"))
    assert told == "connection"
    assert says in explain(error)


# Reading: deliveries read from the socket's bytes are those that pika would read.

CHANNEL, CONSUMER = 1, "ctag1.1"
FRAME_BYTES = 50


class ReadFrom(Connection):
    """A connection without a socket; ``seen`` is what was read, in order."""

    def __init__(self, *, reads: bool = True) -> None:
        self._frame_buffer, self.bytes_received = b"", 0
        self._assembler = ContentFrameAssembler()
        self.seen: list[Any] = []
        self.left_to_pika = 0
        if reads:
            self.reader = Reader(CHANNEL, CONSUMER, self._deliver)

    def feed(self, data: bytes, cuts: list[int]) -> None:
        """Let the data arrive in pieces, cut at these places."""
        places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
        for start, end in pairwise(places):
            self._on_data_available(data[start:end])

    def _deliver(self, deliveries: list[tuple[int, bytes, bytes]]) -> None:
        for tag, properties, body in deliveries:
            self.seen.append((CHANNEL, CONSUMER, tag, str(Properties().decode(properties)), body))

    def _process_frame(self, frame_value: Any) -> None:
        """Assemble what pika has decoded, as its channel does."""
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
            where = method.channel_number, deliver.consumer_tag, deliver.delivery_tag
            self.seen.append((*where, str(header.properties), body))


def delivery(
    tag: int,
    body: bytes,
    properties: pika.BasicProperties | None = None,
    channel: int = CHANNEL,
    consumer: str = CONSUMER,
) -> bytes:
    """Return a delivery as a broker sends it in small frames."""
    deliver = spec.Basic.Deliver(consumer, tag, False, "events", "new_order")
    frames = [
        frame.Method(channel, deliver),
        frame.Header(channel, len(body), properties or pika.BasicProperties()),
    ]
    pieces = [body[at : at + FRAME_BYTES] for at in range(0, len(body), FRAME_BYTES)]
    frames += [frame.Body(channel, piece) for piece in pieces]
    return b"".join(each.marshal() for each in frames)


TAGS = st.integers(1, 2**64 - 1)
PROPERTIES = st.builds(
    pika.BasicProperties,
    content_type=st.none() | st.just("application/json"),
    headers=st.none() | st.dictionaries(st.text(max_size=5), st.integers(0, 9), max_size=3),
    delivery_mode=st.none() | st.just(2),
)
DELIVERIES = st.builds(delivery, TAGS, st.binary(max_size=2 * FRAME_BYTES + 5), PROPERTIES)
SHORT = st.binary(max_size=9)
OTHERS = (
    st.builds(delivery, TAGS, SHORT, channel=st.just(2))
    | st.builds(delivery, TAGS, SHORT, consumer=st.sampled_from(["ctag1.2", "ctag1.10", ""]))
    | st.just(frame.Heartbeat().marshal())
    | st.just(frame.Method(CHANNEL, spec.Basic.Ack(7, True)).marshal())
    | st.just(frame.Method(CHANNEL, spec.Basic.Cancel(CONSUMER)).marshal())
)


@given(st.lists(DELIVERIES | OTHERS, max_size=8), st.lists(st.integers(0, 4000), max_size=12))
def test_data_in_pieces_is_read_as_pika_reads_it(parts: list[bytes], cuts: list[int]) -> None:
    data = b"".join(parts)
    ours, pikas = ReadFrom(), ReadFrom(reads=False)
    ours.feed(data, cuts)
    pikas.feed(data, [])
    assert ours.seen == pikas.seen
    assert ours.bytes_received == pikas.bytes_received == len(data)


@given(st.lists(st.integers(0, 4000), max_size=12))
def test_ordinary_deliveries_are_not_left_to_pika(cuts: list[int]) -> None:
    """Wherever the data is cut, except in the few bytes that tell what begins there."""
    data = b"".join(delivery(tag, b'{"id":"1"}') for tag in range(1, 6))
    step = len(data) // 5
    wire = ReadFrom()
    wire.feed(data, [cut for cut in cuts if (cut % (len(data) + 1)) % step > 20])
    assert [seen[2] for seen in wire.seen] == [1, 2, 3, 4, 5]
    assert wire.left_to_pika == 0


@pytest.mark.parametrize("number", range(3), ids=["method", "header", "body"])
def test_a_frame_without_its_end_is_an_error_as_for_pika(number: int) -> None:
    data = bytearray(delivery(1, b"body"))
    ends = [place for place, byte in enumerate(data) if byte == spec.FRAME_END]
    assert len(ends) == 3
    data[ends[number]] = 0
    with pytest.raises(pika.exceptions.InvalidFrameError):
        ReadFrom().feed(bytes(data), [])


def test_a_large_body_is_left_to_pika_from_its_first_bytes() -> None:
    wire, body = ReadFrom(), b"x" * (LARGEST_READ_BYTES + 1)
    data = delivery(1, body)
    wire.feed(data, list(range(0, len(data), 4096)))
    assert wire.seen[0][4] == body
    assert wire.left_to_pika == 2 + len(range(0, len(body), FRAME_BYTES))


# Properties with any headers: they are decoded, and forwarded as the bytes that arrived.

OURS: dict[str, object] = {"x-attempts": 1, "x-error": "none"}


@pytest.mark.parametrize("theirs", HOSTILE.values(), ids=HOSTILE)
def test_headers_are_forwarded_as_the_bytes_that_arrived_followed_by_ours(theirs: bytes) -> None:
    """Each time, and ours can be decoded: otherwise an event would be retried for ever."""
    arrived = Properties().decode(encoded(table(theirs)))
    assert (arrived.type, arrived.delivery_mode) == ("t", 1)
    once = forwarded_properties(arrived, OURS)
    ours = header_entries(pika.BasicProperties(headers=OURS))
    assert header_entries(once) == theirs + ours
    arrived_again = Properties().decode(b"".join(once.encode()))
    assert arrived_again.headers["x-attempts"] == 1
    twice = forwarded_properties(arrived_again, {**OURS, "x-attempts": 2})
    assert twice.headers["x-attempts"] == 2
    back = forwarded_properties(twice, {}, without=OURS)
    assert header_entries(twice)[: len(theirs)] == header_entries(back) == theirs


def test_our_headers_and_the_brokers_are_replaced_wherever_they_are_in_the_table() -> None:
    kept = [
        entry(b"first", b"f", FLOAT),
        # These only begin like one that is replaced.
        *(entry(name, b"V", b"") for name in (b"CCTV", b"BCC-list", b"CC-")),
        entry(b"last", b"F", table(entry(b"CC", b"V", b""))),
    ]
    brokers = "CC BCC x-death x-first-death-queue x-first-death-reason x-last-death-exchange"
    gone = [
        entry(b"x-attempts", b"f", NAN),
        entry(b"x-reason", b"V", b""),
        entry(b"x-attempts", b"I", b"\0\0\0\7"),
        *(entry(name.encode(), b"A", array()) for name in brokers.split()),
        entry(b"x-delivery-count", b"l", b"\0" * 8),
        entry(b"x-acquired-count", b"l", b"\0" * 8),
    ]
    ours: dict[str, object] = {**OURS, "x-reason": "failed"}
    arrived = Properties().decode(encoded(table(*gone[:4], kept[0], *gone[4:], *kept[1:])))
    sent = forwarded_properties(arrived, ours)
    expected = b"".join(kept) + header_entries(pika.BasicProperties(headers=ours))
    assert header_entries(sent) == expected


def test_all_properties_that_can_be_forwarded_are_the_same_bytes() -> None:
    names = "content_type content_encoding correlation_id reply_to message_id type app_id"
    kept: dict[str, Any] = {name: name[:3] for name in names.split()}
    kept |= {"headers": {"h": 1}, "priority": 2, "timestamp": 2**63}
    dropped = {"expiration": "60000", "user_id": "guest", "cluster_id": "h"}
    sent = forwarded_properties(pika.BasicProperties(delivery_mode=1, **kept, **dropped), {})
    assert sent.headers == {"h": 1}
    expected = pika.BasicProperties(delivery_mode=2, **kept)
    assert sent.encode() == [b"".join(expected.encode())]


@pytest.mark.parametrize(
    "properties",
    [
        pika.BasicProperties(headers={"x": object()}),
        pika.BasicProperties(headers={"x": {"y": [object()]}}),
        pika.BasicProperties(headers={"x" * 256: "name too long"}),
        pika.BasicProperties(headers={"x": 2**70}),
        pika.BasicProperties(headers={"x": "a" * 131_000}),
        pika.BasicProperties(headers={f"x{n}": "a" * 100 for n in range(1500)}),
        pika.BasicProperties(content_type="a" * 300),
    ],
)
def test_properties_that_do_not_fit_in_a_frame_are_replaced_by_our_headers(
    properties: pika.BasicProperties,
) -> None:
    """The body and the reason arrive. The broker would close the connection for the rest."""
    sent = forwarded_properties(properties, OURS)
    assert sent.headers == OURS
    assert sum(map(len, sent.encode())) < 64 * 1024


def test_headers_that_just_fit_in_a_frame_are_forwarded() -> None:
    headers = {"x": "a" * 130_000}
    sent = forwarded_properties(pika.BasicProperties(headers=headers), OURS)
    assert sent.headers == headers | OURS


def test_text_that_is_not_utf8_is_decoded_as_text_and_forwarded_as_it_is() -> None:
    """Decoders are promised text. pika gives them bytes."""
    encoded_text = b"".join(pika.BasicProperties(content_type=b"json; \xff", type="ok").encode())
    read = Properties().decode(encoded_text)
    assert (read.content_type, read.type) == ("json; \ufffd", "ok")
    assert b"json; \xff" in forwarded_properties(read, {}).encode()[0]


@pytest.mark.parametrize(
    ("kind", "value", "read"),
    [
        (b"f", FLOAT, 0.5),
        (b"d", DOUBLE, 1.25),
        (b"D", struct.pack(">Bi", 2, 314), Decimal("3.14")),
        (b"T", struct.pack(">Q", 0), datetime(1970, 1, 1, tzinfo=UTC)),
        (b"T", struct.pack(">Q", 2**62), 2**62),
        (b"S", b"\0\0\0\1a", "a"),
        (b"S", b"\0\0\0\1\xff", b"\xff"),
        (b"x", b"\0\0\0\1a", b"a"),
        (b"A", array(b"V", b"t\0", b"A" + array()), [None, False, []]),
        (b"F", table(entry(b"a", b"b", b"\xff")), {"a": -1}),
        (b"F", table(b"\x05ab"), b"\x05ab"),
        (b"A", array(b"?"), b"?"),
        *((bytes([kind]), (2).to_bytes(), 2) for kind in b"bB"),
        *((bytes([kind]), (2).to_bytes(2), 2) for kind in b"sUu"),
        *((bytes([kind]), (2).to_bytes(4), 2) for kind in b"Ii"),
        (b"l", (2).to_bytes(8), 2),
    ],
)
def test_a_header_is_decoded_as_a_value_or_bytes(kind: bytes, value: bytes, read: object) -> None:
    """Every integer is an int. pika has a class of its own for long ones."""
    (found,) = Properties().decode(encoded(table(entry(b"h", kind, value)))).headers.values()
    assert (type(found), found) == (type(read), read)


@pytest.mark.parametrize(
    "malformed",
    [
        table(entry(b"k", b"?", b"")),
        table(entry(b"a", b"A", struct.pack(">I", 10_000))),
        table(b"\x09name"),
        table(entry(b"a", b"d", b"\0")),
        table(b"\x01a"),
    ],
    ids=["unknown kind", "array without end", "name without end", "short double", "no value"],
)
def test_a_malformed_table_is_decoded_as_an_empty_one(malformed: bytes) -> None:
    read = Properties().decode(encoded(malformed))
    assert (read.headers, read.type) == ({}, "t")
    assert forwarded_properties(read, OURS).headers == OURS


@given(st.binary(max_size=60))
@example(b"\xff")
def test_any_bytes_are_decoded_and_forwarded(data: bytes) -> None:
    read = Properties().decode(data)
    assert read.encode() == [data] or (read.encode(), read) == ([b"\0\0"], pika.BasicProperties())
    assert forwarded_properties(read, OURS).headers["x-attempts"] == 1


def test_pika_itself_reads_messages_with_the_bytes_of_their_headers() -> None:
    """Bodies of more than 64 KiB are left to pika, and so is everything that the command reads."""
    keep_header_bytes()
    data = encoded(table(entry(b"h", b"f", NAN)))
    header = struct.pack(">HxxQ", spec.Basic.INDEX, 5) + data
    start = struct.pack(">BHI", spec.FRAME_HEADER, 1, len(header))
    _, arrived = frame.decode_frame(start + header + bytes([spec.FRAME_END]))
    assert arrived.body_size == 5
    assert arrived.properties.encode() == [data]
    assert arrived.marshal() == start + header + bytes([spec.FRAME_END])


# Private names of pika that no other test here would miss. A new release may drop them.

IO = "pika.adapters.utils.io_services_utils"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pika.connection:Connection._adapter_disconnect_stream", ["self"]),
        (f"{IO}:_AsyncPlaintextTransport._on_socket_readable", ["self"]),
        (f"{IO}:_AsyncSSLTransport._on_socket_readable", ["self"]),
        (f"{IO}:_AsyncTransportBase", {"_nbio", "_sock", "_state", "_STATE_ACTIVE"}),
        ("pika:BlockingConnection", {"_impl"}),
    ],
)
def test_pika_still_has_its_private_name(name: str, expected: list[str] | set[str]) -> None:
    """A method has these parameters; a class sets these attributes when it is made."""
    sentence = (
        f"pika {pika.__version__} has no {name} as the library uses it: keep pika's upper bound in "
        "pyproject.toml below this version, or change amqp.py or cli/broker.py"
    )
    try:
        found: Any = resolve_name(name)
    except AttributeError:
        pytest.fail(sentence)
    if isinstance(expected, set):
        assert expected <= {*found.__init__.__code__.co_names}, sentence
    else:
        assert list(inspect.signature(found).parameters) == expected, sentence
