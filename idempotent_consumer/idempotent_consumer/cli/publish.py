"""``publish``: events from the command line, a file or standard input, each confirmed."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from ..event import InvalidEvent, decode
from ..producer import PublishError
from .arguments import seconds
from .context import Context, Publisher
from .errors import CommandError, UsageError
from .lines import Line, chunks
from .output import counted
from .report import Report

SAFE = (
    "publishing all of them again is safe with ENABLE_ETCD=true: consumers skip the ids that "
    "they have recorded"
)


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = verbs.add_parser("publish", parents=[common], help="publish events, confirmed")
    parser.add_argument(
        "event",
        nargs="*",
        metavar="EVENT",
        help="an event as JSON, or - for standard input with one a line",
    )
    parser.add_argument("--file", type=Path, metavar="PATH", help="a file with one event a line")
    parser.add_argument("--id", help="the event's id, with --type and perhaps --args, for JSON")
    parser.add_argument("--type", help="the event's type")
    parser.add_argument("--args", type=_object, metavar="JSON", help="the event's args, an object")
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=30,
        metavar="TIME",
        help="give up when nothing is confirmed for so long (default 30s)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, context: Context) -> Report:
    """Publish, and say how many events are confirmed. What is no event ends it."""
    with _source(arguments, context) as source:
        # A broker that cannot be used is told at once; one that goes down later is waited for.
        with context.rabbitmq():
            pass
        with context.producer() as producer:
            sending = _Sending(producer, arguments.timeout, context)
            try:
                for lines in source:
                    sending.send(lines)
            finally:
                sending.end()
    number = sending.confirmed
    return Report({"confirmed": number}, f"{counted(number, 'event')} confirmed; {SAFE}.")


class _NoEvent(Exception):
    """A line is no event; the message says which, and why."""


class _Sending:
    """What is confirmed so far, over several calls of the producer."""

    def __init__(self, producer: Publisher, timeout_s: int, context: Context) -> None:
        self._producer, self._timeout_s = producer, timeout_s
        self._terminal = context.err if context.err.isatty() else None
        self._before = self.confirmed = 0

    def send(self, lines: list[Line]) -> None:
        """Publish lines, and wait until each is confirmed. Raises CommandError."""
        self._before = self.confirmed
        try:
            self._producer.publish(_bodies(lines), self._timeout_s, self._progress)
        except (PublishError, _NoEvent) as error:
            raise CommandError(
                f"{error}; confirmed before: {counted(self.confirmed, 'event')}, and {SAFE}",
                {"confirmed": self.confirmed},
            ) from None

    def end(self) -> None:
        """Leave the line on which the progress stands."""
        if self._terminal is not None and self.confirmed:
            self._terminal.write("\n")

    def _progress(self, confirmed: int) -> None:
        self.confirmed = self._before + confirmed
        if self._terminal is not None:
            self._terminal.write(f"\r{self.confirmed:,} confirmed")
            self._terminal.flush()


def _bodies(lines: list[Line]) -> Iterator[bytes]:
    for line in lines:
        try:
            decode(line.body)
        except InvalidEvent as error:
            raise _NoEvent(f"{line.place} is no event: {error}") from None
        yield line.body


@contextmanager
def _source(arguments: argparse.Namespace, context: Context) -> Iterator[Iterator[list[Line]]]:
    """Open the one place that the events come from. Raises UsageError and CommandError."""
    parts = arguments.id is not None or arguments.type is not None or arguments.args is not None
    if bool(arguments.event) + (arguments.file is not None) + parts != 1:
        raise UsageError(
            "write events as JSON, or --file, or --id and --type, or - for standard "
            "input: one of these"
        )
    if arguments.file is not None:
        try:
            with arguments.file.open("rb") as file:
                yield chunks(file)
        except OSError as error:
            raise CommandError(f"{arguments.file} cannot be read: {error.strerror}") from None
    elif arguments.event == ["-"]:
        yield chunks(context.stdin)
    else:
        bodies = [_event(arguments)] if parts else [text.encode() for text in arguments.event]
        yield iter([[Line(f"event {n}", body) for n, body in enumerate(bodies, 1)]])


def _event(arguments: argparse.Namespace) -> bytes:
    if arguments.id is None or arguments.type is None:
        raise UsageError("give both --id and --type")
    members = {"id": arguments.id, "type": arguments.type}
    return orjson.dumps(members if arguments.args is None else {**members, "args": arguments.args})


def _object(text: str) -> dict[str, Any]:
    try:
        members = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(members, dict):
        raise argparse.ArgumentTypeError("write an object, as in '{\"amount\": 1}'")
    return members
