"""Where published events come from, and what is said of them."""

import io
from pathlib import Path

import pytest

from fakes.operator import Operator
from idempotent_consumer.cli.publish import chunks
from idempotent_consumer.producer import PublishError

ONE, TWO = b'{"id":"1","type":"a"}', b'{"id":"2","type":"a"}'
LINES = ONE + b"\r\n\n  \n" + TWO + b"\n"
SAID = "2 events confirmed\n"


@pytest.fixture
def operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Operator:
    """Somebody with the same two events in a file and at standard input."""
    monkeypatch.chdir(tmp_path)
    Path("events").write_bytes(LINES)
    operator = Operator()
    operator.stdin = io.BytesIO(LINES)
    return operator


@pytest.mark.parametrize(
    ("arguments", "bodies"),
    [
        ((ONE.decode(), TWO.decode()), [ONE, TWO]),
        (("-",), [ONE, TWO]),
        (("--file", "events"), [ONE, TWO]),
        (("--id", "1", "--type", "a"), [ONE]),
        (
            ("--id", "ü", "--type", "a", "--args", '{"n":1}'),
            ['{"id":"ü","type":"a","args":{"n":1}}'.encode()],
        ),
        (("--id", "1", "--type", "a", "--args", "{}"), [b'{"id":"1","type":"a","args":{}}']),
    ],
)
def test_events_come_from_the_arguments_a_file_or_standard_input_without_blank_lines(
    operator: Operator, arguments: tuple[str, ...], bodies: list[bytes]
) -> None:
    ran = operator.run("publish", *arguments, "--json")
    assert (ran.code, ran.json) == (0, {"confirmed": len(bodies)})
    assert operator.producer.published == bodies


@pytest.mark.parametrize(
    "arguments",
    [
        *("", "--id 1", "--type a", "--args {}"),
        *("{} --id 1 --type a", "--file f {}", "--file f --id 1"),
    ],
)
def test_one_source_and_a_whole_event_are_asked_for(operator: Operator, arguments: str) -> None:
    assert operator.run("publish", *arguments.split()).code == 2
    assert operator.producer.published == []


def test_a_file_that_is_not_there(operator: Operator) -> None:
    ran = operator.run("publish", "--file", "none")
    assert (ran.code, "none cannot be read: No such file" in ran.err) == (1, True)


@pytest.mark.parametrize(
    ("line", "reason"),
    [(b"{", "not JSON"), (b'{"id":"1","type":"a","args":null}', "args is not")],
)
def test_a_line_that_is_no_event_is_named_and_what_stands_before_it_is_confirmed(
    operator: Operator, line: bytes, reason: str
) -> None:
    operator.stdin = io.BytesIO(b"\n".join([ONE, b"", line, TWO]))
    ran = operator.run("publish", "-", "--json")
    assert ran.code == 1
    assert f"line 3 is no event: {reason}" in ran.err
    assert "confirmed before: 1 event" in ran.err
    assert ran.json["confirmed"] == 1
    assert operator.producer.published == [ONE]


def test_what_was_confirmed_is_told_when_the_broker_ceases_to_confirm(operator: Operator) -> None:
    operator.producer.error = PublishError("nothing was confirmed for 30 s", 0)
    ran = operator.run("publish", ONE.decode(), "--json")
    assert ran.code == 1
    assert "nothing was confirmed for 30 s; confirmed before: 1 event" in ran.err


def test_progress_is_shown_on_a_terminal_alone(operator: Operator) -> None:
    assert operator.run("publish", ONE.decode(), TWO.decode()) == (0, SAID, "")
    operator.types("")
    progress = "\r1 confirmed\r2 confirmed\n"
    assert operator.run("publish", ONE.decode(), TWO.decode()) == (0, SAID, progress)


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
