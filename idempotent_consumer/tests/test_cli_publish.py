"""Where published events come from, and what is said of them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from fakes.operator import Operator
from idempotent_consumer.cli.broker import BrokerError
from idempotent_consumer.cli.publish import chunks
from idempotent_consumer.producer import PublishError

ONE, TWO = b'{"id":"1","type":"a"}', b'{"id":"2","type":"a"}'


def test_events_from_the_arguments() -> None:
    operator = Operator()
    ran = operator.run("publish", ONE.decode(), TWO.decode())
    assert ran.code == 0
    assert operator.producer.published == [ONE, TWO]
    assert ran.out == (
        "2 events confirmed; publishing all of them again is safe with ENABLE_ETCD="
        "true: consumers skip the ids that they have recorded.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "body"),
    [
        (("--id", "1", "--type", "a"), ONE),
        (
            ("--id", "ü", "--type", "a", "--args", '{"n":1}'),
            '{"id":"ü","type":"a","args":{"n":1}}'.encode(),
        ),
        (("--id", "1", "--type", "a", "--args", "{}"), b'{"id":"1","type":"a","args":{}}'),
    ],
)
def test_an_event_from_its_parts(arguments: tuple[str, ...], body: bytes) -> None:
    operator = Operator()
    assert operator.run("publish", *arguments).code == 0
    assert operator.producer.published == [body]


def test_events_from_standard_input_without_blank_lines() -> None:
    operator = Operator()
    operator.stdin = io.BytesIO(ONE + b"\r\n\n  \n" + TWO)
    ran = operator.run("publish", "-", "--json")
    assert ran.json == {"confirmed": 2}
    assert operator.producer.published == [ONE, TWO]


def test_events_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "events"
    file.write_bytes(b"\n".join([ONE, TWO, b""]))
    operator = Operator()
    assert operator.run("publish", "--file", str(file)).code == 0
    assert operator.producer.published == [ONE, TWO]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    ran = Operator().run("publish", "--file", str(tmp_path / "none"))
    assert ran.code == 1
    assert "none cannot be read: No such file" in ran.err


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--id", "1"),
        ("--type", "a"),
        ("--args", "{}"),
        ("{}", "--id", "1", "--type", "a"),
        ("--file", "f", "{}"),
        ("--file", "f", "--id", "1"),
    ],
)
def test_one_source_and_a_whole_event_are_asked_for(arguments: tuple[str, ...]) -> None:
    operator = Operator()
    assert operator.run("publish", *arguments).code == 2
    assert operator.producer.published == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b'{"id":"","type":"a"}', "id is not"),
        (b"\xff", "not JSON"),
        (b'{"id":"1","type":"a","args":null}', "args is not"),
    ],
)
def test_a_line_that_is_no_event_is_named_and_what_stands_before_it_is_confirmed(
    line: bytes, reason: str
) -> None:
    operator = Operator()
    operator.stdin = io.BytesIO(b"\n".join([ONE, b"", line, TWO]))
    ran = operator.run("publish", "-", "--json")
    assert ran.code == 1
    assert f"line 3 is no event: {reason}" in ran.err
    assert "confirmed before: 1 event" in ran.err
    assert ran.json["confirmed"] == 1
    assert operator.producer.published == [ONE]


def test_what_was_confirmed_is_told_when_the_broker_ceases_to_confirm() -> None:
    operator = Operator()
    operator.producer.error = PublishError("nothing was confirmed for 30 s", 0)
    ran = operator.run("publish", ONE.decode(), "--json")
    assert ran.code == 1
    assert "nothing was confirmed for 30 s; confirmed before: 1 event" in ran.err


def test_a_broker_that_cannot_be_used_is_told_before_anything_is_sent() -> None:
    operator = Operator()
    operator.rabbitmq_error = BrokerError("refused")
    assert operator.run("publish", ONE.decode()).code == 1
    assert operator.producer.published == []


def test_progress_is_shown_on_a_terminal_alone() -> None:
    operator = Operator()
    assert operator.run("publish", ONE.decode(), TWO.decode()).err == ""
    operator.types("")
    assert operator.run("publish", ONE.decode(), TWO.decode()).err == (
        "\r1 confirmed\r2 confirmed\n"
    )


class Trickle(io.BufferedIOBase):
    """An input that brings these bytes, one read after the other."""

    def __init__(self, *reads: bytes) -> None:
        self._reads = list(reads)

    def read1(self, _size: int = -1, /) -> bytes:
        return self._reads.pop(0) if self._reads else b""


def test_lines_are_handed_on_as_they_arrive() -> None:
    """Whoever types events has the first published before the second is typed."""
    found = list(chunks(Trickle(b"a\nb\nc", b"d", b"\n\n", b"e")))
    assert found == [[("line 1", b"a"), ("line 2", b"b")], [("line 3", b"cd")], [("line 5", b"e")]]


def test_a_line_without_an_end_is_given_up_while_memory_lasts() -> None:
    endless = Trickle(*[b"x" * 700_000] * 5)
    sizes = [len(body) for lines in chunks(endless) for _, body in lines]
    assert max(sizes) < 2_000_000
    assert sum(sizes) == 3_500_000
