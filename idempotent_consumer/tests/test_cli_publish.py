"""Where published events come from, and what is said of them."""

import io
from pathlib import Path

import pytest

from fakes.operator import Operator
from idempotent_consumer.cli.publish import chunks
from idempotent_consumer.producer import PublishError

ONE, TWO = b'{"id":"1","type":"a"}', b'{"id":"2","type":"a"}'
LINES = ONE + b"\r\n\n  \n" + TWO + b"\n"


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
        (f"{ONE.decode()} {TWO.decode()}", [ONE, TWO]),
        ("-", [ONE, TWO]),
        ("--file events", [ONE, TWO]),
        ("--id 1 --type a", [ONE]),
        ('--id ü --type a --args {"n":1}', ['{"id":"ü","type":"a","args":{"n":1}}'.encode()]),
        ("--id 1 --type a --args {}", [b'{"id":"1","type":"a","args":{}}']),
    ],
)
def test_events_come_from_the_arguments_a_file_or_standard_input_without_blank_lines(
    operator: Operator, arguments: str, bodies: list[bytes]
) -> None:
    ran = operator.run("publish", *arguments.split(), "--json")
    assert (ran.code, ran.json) == (0, {"confirmed": len(bodies)})
    assert operator.published == bodies


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        *((each, 2, "one of these") for each in ("", "{} --id 1 --type a", "--file f {}")),
        *((each, 2, "give both") for each in ("--id 1", "--type a", "--args {}")),
        ("--file f --id 1", 2, "one of these"),
        ("--file none", 1, "none cannot be read: No such file"),
    ],
)
def test_one_source_and_a_whole_event_are_asked_for(
    operator: Operator, arguments: str, code: int, why: str
) -> None:
    operator.ends(code, why, "publish", *arguments.split())
    assert operator.published == []


@pytest.mark.parametrize(
    ("rest", "error", "says"),
    [
        (b"{\n" + TWO, None, "line 3 is no event: not JSON"),
        (b'{"id":"1","type":"a","args":null}', None, "line 3 is no event: args is not"),
        (b"", PublishError("nothing was confirmed for 30 s", 0), "nothing was confirmed for 30 s"),
    ],
)
def test_what_ends_a_publication_is_named_and_what_was_confirmed_before_it(
    operator: Operator, rest: bytes, error: Exception | None, says: str
) -> None:
    operator.publish_error = error
    operator.stdin = io.BytesIO(b"\n".join([ONE, b"", rest]))
    ran = operator.run("publish", "-", "--json")
    assert (ran.code, ran.json["confirmed"], operator.published) == (1, 1, [ONE])
    assert says in ran.err
    assert "; confirmed before: 1 event" in ran.err


def test_an_interrupt_says_what_was_confirmed_before_it(operator: Operator) -> None:
    operator.publish_error = KeyboardInterrupt()
    operator.ends(130, "interrupted; confirmed before: 1 event, and", "publish", ONE.decode())


def test_progress_is_shown_on_a_terminal_alone(operator: Operator) -> None:
    said = "2 events confirmed\n"
    assert operator.run("publish", ONE.decode(), TWO.decode()) == (0, said, "")
    operator.types("")
    progress = "\r1 confirmed\r2 confirmed\n"
    assert operator.run("publish", ONE.decode(), TWO.decode()) == (0, said, progress)


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
