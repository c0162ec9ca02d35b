"""``publish``: where events come from, and what is reported about them."""

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
    """An operator with the same two events in a file and on standard input."""
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
def test_events_come_from_arguments_a_file_or_standard_input_without_blank_lines(
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
def test_publish_needs_one_source_and_a_whole_event(
    operator: Operator, arguments: str, code: int, why: str
) -> None:
    operator.ends(code, why, "publish", *arguments.split())
    assert operator.published == []


@pytest.mark.parametrize(
    ("rest", "error", "code", "says"),
    [
        (b"{\n" + TWO, None, 1, "line 3 is no event: not JSON"),
        (b'{"id":"1","type":"a","args":null}', None, 1, "line 3 is no event: args is not"),
        (
            b"",
            PublishError("nothing was confirmed for 30 s", 0),
            1,
            "nothing was confirmed for 30 s",
        ),
        (b"", KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_says_what_was_confirmed_before_it(
    operator: Operator, rest: bytes, error: BaseException | None, code: int, says: str
) -> None:
    operator.publish_error = error
    operator.stdin = io.BytesIO(b"\n".join([ONE, b"", rest]))
    ran = operator.run("publish", "-", "--json")
    assert (ran.code, operator.published) == (code, [ONE])
    assert says in ran.err
    assert "; confirmed before: 1 event, and" in ran.err
    assert code == 130 or ran.json["confirmed"] == 1


def test_progress_is_shown_only_on_a_terminal(operator: Operator) -> None:
    said = "2 events confirmed\n"
    assert operator.run("publish", ONE.decode(), TWO.decode()) == (0, said, "")
    operator.types("")
    progress = "\r1 confirmed\r2 confirmed\n"
    assert operator.run("publish", ONE.decode(), TWO.decode()) == (0, said, progress)


class Trickle(io.BufferedIOBase):
    """An input that returns these bytes, one element per read."""

    def __init__(self, *reads: bytes) -> None:
        self._reads = list(reads)

    def read1(self, _size: int = -1, /) -> bytes:
        return self._reads.pop(0) if self._reads else b""


def test_lines_are_passed_on_as_they_arrive() -> None:
    """If events are typed, the first is published before the second is typed."""
    found = list(chunks(Trickle(b"a\nb\nc", b"d", b"\n\n", b"e")))
    assert found == [[("line 1", b"a"), ("line 2", b"b")], [("line 3", b"cd")], [("line 5", b"e")]]


def test_an_endless_line_is_passed_on_before_it_fills_the_memory() -> None:
    endless = Trickle(*[b"x" * 700_000] * 5)
    sizes = [len(body) for lines in chunks(endless) for _, body in lines]
    assert max(sizes) < 2_000_000
    assert sum(sizes) == 3_500_000
