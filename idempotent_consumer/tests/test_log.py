"""Log lines, and that a service never waits for their reader."""

import gc
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

import pytest
import structlog

from fakes.probe import CALLS, DEADLINE_S, ends_in_time
from idempotent_consumer import Event, Service
from idempotent_consumer.log import Logs
from idempotent_consumer.testing import InMemory, Receiver

Output = Callable[..., str]


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    structlog.reset_defaults()


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]) -> Output:
    """Return a function that logs a line of severity ``of``, and returns what was written."""

    def output(
        event: str,
        style: str | None = None,
        level: str = "info",
        of: str = "warning",
        **values: Any,
    ) -> str:
        logs = Logs("order", level, style)
        getattr(logs.logger, of)(event, **values)
        logs.close()
        return capsys.readouterr().out

    return output


def test_a_line_is_json_if_no_terminal_reads_it(output: Output) -> None:
    line = json.loads(output("parked", event_id="ä\n1"))
    assert line.pop("timestamp").endswith("Z")
    assert line == {"service": "order", "event": "parked", "event_id": "ä\n1", "level": "warning"}


def test_a_console_line_is_plain_text(output: Output) -> None:
    out = output("parked", "console", event_id="ä\n1")
    assert "parked" in out
    assert "{" not in out
    assert out.count("\n") == 1, "an id with a line break is still one line"


def test_no_text_from_outside_controls_a_terminal(output: Output) -> None:
    """Not even if it is the whole line, or has characters that cannot be encoded."""
    hostile = "\x1b[2J\x9b31m\u202e\ud800"
    out = output(hostile, "console", event_id=hostile, exc_info=ValueError(hostile))
    assert out.count(r"\x1b[2J\x9b31m\u202e\ud800") == 3
    assert out.replace("\n", "").isprintable()


@pytest.mark.parametrize("style", ["json", "console"])
def test_a_long_traceback_loses_its_middle(output: Output, style: str) -> None:
    """A megabyte for each event that fails would be too much for a log."""
    out = output("failed", style, exc_info=ValueError(f"{'x' * 1_000_000} is no price"))
    assert len(out) < 25_000
    assert "ValueError: xxx" in out
    assert "xxx is no price" in out


@pytest.mark.parametrize(
    ("level", "of", "lines"), [("debug", "debug", 1), ("info", "debug", 0), ("error", "warning", 0)]
)
def test_only_lines_below_the_level_are_left_out(
    output: Output, level: str, of: str, lines: int
) -> None:
    assert output("parked", level=level, of=of).count("\n") == lines


def test_a_logger_made_at_import_time_writes_there_too(capsys: pytest.CaptureFixture[str]) -> None:
    """It was made before there were any settings."""
    mine = structlog.get_logger(service="notify")
    logs = Logs("notify", "info", "json")
    mine.info("notification", event_id="1")
    logs.close()
    assert json.loads(capsys.readouterr().out)["event"] == "notification"


@contextmanager
def piped() -> Iterator[int]:
    """Redirect standard output into a pipe, which holds 64 KiB, and give the end to read from."""
    reading, writing = os.pipe()
    stream = os.fdopen(writing, "w", buffering=1)
    with redirect_stdout(stream):
        yield reading
    os.close(reading)
    with suppress(BrokenPipeError):
        stream.close()


def say(logs: Logs, lines: int) -> None:
    for number in range(lines):
        logs.logger.info("processed", number=number)


def test_a_reader_that_does_not_read_delays_nobody_and_dropped_lines_are_counted() -> None:
    """If the pipe is full, the writing thread is blocked, and the caller must not be."""
    with piped() as reading:
        logs, said = Logs("order", "info", "json"), 30_000
        ends_in_time(lambda: say(logs, said))
        written, dropped, rest = 0, 0, b""
        while written + dropped < said:
            *lines, rest = (rest + os.read(reading, 1 << 16)).split(b"\n")
            reports = [int(line.split()[1]) for line in lines if line.startswith(b"(log: ")]
            written, dropped = written + len(lines) - len(reports), dropped + sum(reports)
        assert dropped > 0
        assert written >= 10_000
        logs.close()


@pytest.mark.parametrize("lines", [5_000, 20_000], ids=["pipe full", "backlog full"])
def test_a_reader_that_does_not_read_does_not_delay_the_end(lines: int) -> None:
    with piped():
        logs = Logs("order", "info", "json")
        ends_in_time(lambda: say(logs, lines))
        ends_in_time(logs.close)


def test_lines_that_cannot_be_written_are_counted_until_one_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As while the disk is full, or after the reader has gone."""

    class Full(io.StringIO):
        left = CALLS

        def write(self, text: str) -> int:
            if self.left:
                self.left -= 1
                raise OSError("no space")
            return super().write(text)

    stream = Full()
    monkeypatch.setattr(sys, "stdout", stream)
    logs = Logs("order", "info", "json")
    ends_in_time(lambda: say(logs, CALLS))
    logs.msg("written")
    logs.close()
    logs._thread.join(DEADLINE_S)
    assert stream.getvalue().startswith(f"written\n(log: {CALLS} lines dropped")


class Dying:
    """An object in a cycle, which the garbage collector ends, and which logs that."""

    def __init__(self, logs: Logs) -> None:
        self.itself, self.logs = self, logs

    def __del__(self) -> None:
        self.logs.msg("gone")


def test_a_line_logged_during_another_blocks_nobody() -> None:
    """As by a finalizer of a client that was not closed: the collector may run at any point."""
    before = gc.get_threshold()
    with piped():
        logs = Logs("order", "info", "json")
        say(logs, 20_000)  # From here on lines are dropped, which takes more steps.

        def leave() -> None:
            for _ in range(1_000):
                Dying(logs)
                logs.msg("processed")

        for threshold in range(2, 6):
            gc.set_threshold(threshold)
            try:
                ends_in_time(leave)
            finally:
                gc.set_threshold(*before)
        ends_in_time(logs.close)


class Closing(io.StringIO):
    """A stream whose writer ends right after each line, without another look at the queue."""

    logs: Logs
    flushed = ""

    def write(self, text: str) -> int:
        self.logs._lines.put_nowait(None)
        return super().write(text)

    def flush(self) -> None:
        self.flushed = self.getvalue()


def test_the_last_line_is_flushed_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends by os._exit would lose it."""
    stream = Closing()
    monkeypatch.setattr(sys, "stdout", stream)
    stream.logs = Logs("order", "info", "json")
    stream.logs.msg("last")
    stream.logs._thread.join(DEADLINE_S)
    assert stream.flushed == "last\n"


@contextmanager
def logs_of_a_program() -> Iterator[logging.Logger]:
    """Give a logger of a program that has set up the standard library's logging as most do."""
    root = logging.getLogger()
    kept, level, root.handlers = list(root.handlers), root.level, []  # pytest has its own.
    logging.basicConfig(level=logging.CRITICAL)
    root.addHandler(logging.NullHandler())  # It stands for one that sends lines elsewhere.
    logs = Logs("order", "info", "json")
    yield logging.getLogger("billing.prices")
    logs.close()
    assert [type(other) for other in root.handlers] == [logging.NullHandler]
    root.handlers, root.level = kept, level


def test_the_standard_librarys_lines_come_in_our_format(capsys: pytest.CaptureFixture[str]) -> None:
    with logs_of_a_program() as own:
        own.debug("detail")
        with structlog.contextvars.bound_contextvars(event_id="1"):
            own.info("price of %s", "EUR", extra={"n": 1})
        own.error("no price", exc_info=KeyError("EUR"))
    out, err = capsys.readouterr()
    first, second = map(json.loads, out.splitlines())
    assert first.pop("timestamp").endswith("Z")
    named = {"service": "order", "logger": "billing.prices"}
    assert first == {**named, "event_id": "1", "event": "price of EUR", "level": "info", "n": 1}
    assert (second["event"], second["level"]) == ("no price", "error")
    assert second["exception"].endswith("KeyError: 'EUR'")
    assert err == "", "basicConfig's handler would write each line a second time"


class Unreadable(list[str]):
    """A list that nobody can read."""

    def __iter__(self) -> Iterator[str]:
        raise KeyError("notes")


class Unformatted(Exception):
    """An exception whose notes cannot be read."""

    __notes__ = Unreadable()


def test_an_exception_that_cannot_be_formatted_ends_nothing(output: Output) -> None:
    line = json.loads(output("failed", event_id="1", exc_info=Unformatted()))
    assert (line["event"], line["event_id"]) == ("failed", "1")
    assert line["exception"] == "its traceback cannot be written: KeyError"


def test_a_line_that_cannot_be_formatted_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with logs_of_a_program() as own:
        own.info("%d", "EUR")
        own.info("after")
    out, err = capsys.readouterr()
    assert json.loads(out)["event"] == "after"
    assert "--- Logging error ---" in err


class Unprintable:
    """An object that nobody can print."""

    def __repr__(self) -> str:
        raise KeyError("name")


CIRCULAR: list[Any] = []
CIRCULAR.append(CIRCULAR)


@pytest.mark.parametrize("style", ["json", "console"])
@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({("eu", 1): 2}, "{('eu', 1): 2}"),
        ({b"eu": 2}, "{b'eu': 2}"),
        (CIRCULAR, "[[...]]"),
        (Unprintable(), "Unprintable, whose repr raises KeyError"),
        pytest.param(10**5000, "int, whose repr raises ValueError", id="digits"),
        ([Unprintable()], "list, whose repr raises KeyError"),
    ],
)
def test_a_value_that_cannot_be_rendered_causes_no_second_call(
    value: Any, shown: str, style: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the line raised into the handler that logs it, the event would be retried."""
    service, receiver = Service("mail", noun="mails"), Receiver()

    @service.claimed_handler("new_order", timeout_s=5)
    async def mail(event: Event, _timeout_s: float) -> None:
        await receiver.take_async(None, event.id)
        structlog.get_logger().info("sent", by_region=value)

    logs = Logs("mail", "info", style)
    world = InMemory(service)
    world.publish({"id": "1", "type": "new_order"})
    logs.close()
    assert (len(receiver.calls), world.raised) == (1, [])
    [line] = [each for each in capsys.readouterr().out.splitlines() if "sent" in each]
    assert shown in line
    assert "event_id" in line
