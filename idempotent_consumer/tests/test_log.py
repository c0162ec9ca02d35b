"""Log lines, and that nobody waits for whoever reads them."""

import gc
import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

import pytest
import structlog

from fakes.probe import CALLS, DEADLINE_S, ends_in_time
from idempotent_consumer import Event, Service
from idempotent_consumer.log import Logs
from idempotent_consumer.testing import InMemory, Receiver


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    structlog.reset_defaults()


@contextmanager
def piped() -> Iterator[int]:
    """Let standard output go into a pipe, which holds 64 KiB, and give the end to read from."""
    reading, writing = os.pipe()
    stream = os.fdopen(writing, "w", buffering=1)
    with redirect_stdout(stream):
        yield reading
    os.close(reading)
    with suppress(BrokenPipeError):
        stream.close()


def logged(
    capsys: pytest.CaptureFixture[str], level: str = "info", style: str | None = None
) -> str:
    logs = Logs("order", level, style)
    logs.logger.info("processed", event_id="ä\n1")
    logs.logger.debug("detail")
    logs.close()
    return capsys.readouterr().out


def test_a_line_is_json_where_no_terminal_reads(capsys: pytest.CaptureFixture[str]) -> None:
    line = json.loads(logged(capsys))
    assert line.pop("timestamp").endswith("Z")
    assert line == {"service": "order", "event": "processed", "event_id": "ä\n1", "level": "info"}


def test_people_get_words(capsys: pytest.CaptureFixture[str]) -> None:
    out = logged(capsys, style="console")
    assert "processed" in out
    assert "{" not in out
    assert out.count("\n") == 1, "an id with a line break is one line all the same"


def test_a_strangers_text_does_nothing_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Not even where it is the whole line, or has what no terminal could be sent."""
    hostile = "\x1b[2J\x9b31m\u202e\ud800"
    logs = Logs("order", "info", "console")
    logs.logger.warning(hostile, event_id=hostile, exc_info=ValueError(hostile))
    logs.close()
    out = capsys.readouterr().out
    assert out.count(r"\x1b[2J\x9b31m\u202e\ud800") == 3
    assert out.replace("\n", "").isprintable()


@pytest.mark.parametrize("style", ["json", "console"])
def test_a_long_traceback_loses_its_middle(capsys: pytest.CaptureFixture[str], style: str) -> None:
    """A line of a megabyte for each event that fails is more than a log can hold."""
    logs = Logs("order", "info", style)
    logs.logger.warning("failed", exc_info=ValueError(f"{'x' * 1_000_000} is no price"))
    logs.close()
    out = capsys.readouterr().out
    assert len(out) < 25_000
    assert "ValueError: xxx" in out
    assert "xxx is no price" in out


@pytest.mark.parametrize(("level", "lines"), [("debug", 2), ("warning", 0)])
def test_the_level_is_kept(capsys: pytest.CaptureFixture[str], level: str, lines: int) -> None:
    assert logged(capsys, level).count("\n") == lines


def test_the_services_own_loggers_write_there_too(capsys: pytest.CaptureFixture[str]) -> None:
    """One that was made at import time, before there were any settings."""
    mine = structlog.get_logger(service="notify")
    logs = Logs("notify", "info", "json")
    mine.info("notification", event_id="1")
    logs.close()
    assert json.loads(capsys.readouterr().out)["event"] == "notification"


def say(logs: Logs, lines: int) -> None:
    for number in range(lines):
        logs.logger.info("processed", number=number)


def test_a_reader_that_does_not_read_holds_up_nobody_and_what_is_dropped_is_counted() -> None:
    """When the pipe is full the writing thread stands still, and the caller must not."""
    with piped() as reading:
        logs, said = Logs("order", "info", "json"), 30_000
        ends_in_time(lambda: say(logs, said))
        written, dropped, rest = 0, 0, b""
        while written + dropped < said:
            *lines, rest = (rest + os.read(reading, 1 << 16)).split(b"\n")
            told = [int(line.split()[1]) for line in lines if line.startswith(b"(log: ")]
            written, dropped = written + len(lines) - len(told), dropped + sum(told)
        assert dropped > 0
        assert written >= 10_000
        logs.close()


def test_a_reader_that_went_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.StringIO):
        def write(self, _text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Broken())
    logs = Logs("order", "info", "json")
    ends_in_time(lambda: say(logs, CALLS))
    logs.close()


@pytest.mark.parametrize("lines", [5_000, 20_000], ids=["pipe full", "backlog full"])
def test_a_reader_that_does_not_read_does_not_hold_up_the_end(lines: int) -> None:
    with piped():
        logs = Logs("order", "info", "json")
        ends_in_time(lambda: say(logs, lines))
        ends_in_time(logs.close)


def test_lines_that_cannot_be_written_are_counted_until_one_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where the disk is full for a while."""

    class Full(io.StringIO):
        left = 3

        def write(self, text: str) -> int:
            if self.left:
                self.left -= 1
                raise OSError("no space")
            return super().write(text)

    stream = Full()
    monkeypatch.setattr(sys, "stdout", stream)
    logs = Logs("order", "info", "json")
    for number in range(4):
        logs.msg(f"{number}")
    logs.close()
    logs._thread.join(DEADLINE_S)
    assert stream.getvalue().startswith("3\n(log: 3 lines dropped")


class Dying:
    """What the garbage collector ends, for it is in a cycle, and that logs it."""

    def __init__(self, logs: Logs) -> None:
        self.itself, self.logs = self, logs

    def __del__(self) -> None:
        self.logs.msg("gone")


def test_a_line_that_comes_amid_another_holds_up_nobody() -> None:
    """From a finalizer, as of a client that was not closed: the collector runs at any point."""
    before = gc.get_threshold()
    with piped():
        logs = Logs("order", "info", "json")
        say(logs, 20_000)  # From here on they are dropped, which takes more steps.

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
    """A stream that meets the writer's end with each line: nothing more is looked for after it."""

    logs: Logs
    flushed = ""

    def write(self, text: str) -> int:
        self.logs._lines.put_nowait(None)
        return super().write(text)

    def flush(self) -> None:
        self.flushed = self.getvalue()


def test_the_last_line_is_flushed_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends by os._exit loses what is not."""
    stream = Closing()
    monkeypatch.setattr(sys, "stdout", stream)
    stream.logs = Logs("order", "info", "json")
    stream.logs.msg("last")
    stream.logs._thread.join(DEADLINE_S)
    assert stream.flushed == "last\n"


@contextmanager
def logs_of_a_program() -> Iterator[logging.Logger]:
    """Give the logs of one that has set up the standard library's logging as most do."""
    root = logging.getLogger()
    kept, level, root.handlers = list(root.handlers), root.level, []  # pytest has its own.
    logging.basicConfig(level=logging.CRITICAL)
    root.addHandler(logging.NullHandler())
    logs = Logs("order", "info", "json")
    yield logging.getLogger("billing.prices")
    logs.close()
    assert [type(other) for other in root.handlers] == [logging.NullHandler], (
        "it may send elsewhere"
    )
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
    assert err == "", "what basicConfig has set up would write each line once more"


class Unreadable(list[str]):
    """A list that nobody can read."""

    def __iter__(self) -> Iterator[str]:
        raise KeyError("notes")


class Unformatted(Exception):
    """An exception whose notes cannot be read."""

    __notes__ = Unreadable()


def test_an_exception_that_cannot_be_formatted_ends_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs = Logs("order", "info", "json")
    logs.logger.warning("failed: it comes back later", event_id="1", exc_info=Unformatted())
    logs.close()
    line = json.loads(capsys.readouterr().out)
    assert (line["event"], line["event_id"]) == ("failed: it comes back later", "1")
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
    ("value", "told"),
    [
        ({("eu", 1): 2}, "{('eu', 1): 2}"),
        ({b"eu": 2}, "{b'eu': 2}"),
        (CIRCULAR, "[[...]]"),
        (Unprintable(), "Unprintable, whose repr raises KeyError"),
        pytest.param(10**5000, "int, whose repr raises ValueError", id="digits"),
        ([Unprintable()], "list, whose repr raises KeyError"),
    ],
)
def test_a_value_that_cannot_be_rendered_costs_no_second_call(
    value: Any, told: str, style: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else the line raises into the handler that logs it, and its event is retried."""
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
    assert told in line
    assert "event_id" in line
