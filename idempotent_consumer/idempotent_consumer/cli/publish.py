"""``publish``: events from the command line, a file or standard input, each confirmed."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import orjson

from ..event import MAX_BODY_BYTES, InvalidEvent, decode
from ..names import EXCHANGE, check_exchange
from ..producer import PublishError
from ..settings import duration_s
from .context import Context, Verb, argument, utf8
from .output import CommandError, Report, UsageError, counted, ended

_SAFE = (
    "publishing all of them again is safe with ENABLE_ETCD=true: consumers skip the ids that "
    "they have recorded"
)

_READ_BYTES = 1024 * 1024

Lines = list[tuple[str, bytes]]
"""Events' bodies, each with the place that an error names."""


def _object(text: str) -> dict[str, Any]:
    try:
        members = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(members, dict):
        raise ValueError("write an object, as in '{\"amount\": 1}'")  # noqa: TRY004 - for argument()
    return members


def _publish(arguments: argparse.Namespace, context: Context) -> Report:
    """Publish events up to the first invalid one, and say how many are confirmed."""
    terminal = context.err if context.err.isatty() else None
    before = confirmed = 0

    def progress(number: int) -> None:
        nonlocal confirmed
        confirmed = before + number
        if terminal is not None:
            terminal.write(f"\r{confirmed:,} confirmed")
            terminal.flush()

    with _source(arguments, context) as source:
        # Fail at once if the broker is away now; the producer waits for one that goes down later.
        with context.rabbitmq():
            pass
        with context.producer(arguments.exchange) as producer:
            try:
                for lines in source:
                    before = confirmed
                    producer.publish(_bodies(lines), arguments.timeout, progress)
            except (PublishError, InvalidEvent, KeyboardInterrupt) as error:
                done = f"confirmed before: {counted(confirmed, 'event')}, and {_SAFE}"
                raise ended(error, done, {"confirmed": confirmed}) from None
            finally:
                if terminal is not None and confirmed:
                    terminal.write("\n")
    return Report({"confirmed": confirmed}, f"{counted(confirmed, 'event')} confirmed")


def _bodies(lines: Lines) -> Iterator[bytes]:
    for place, body in lines:
        try:
            decode(body)
        except InvalidEvent as error:
            raise InvalidEvent(f"{place} is no event: {error}") from None
        yield body


@contextmanager
def _source(arguments: argparse.Namespace, context: Context) -> Iterator[Iterable[Lines]]:
    """Open the one source of the events. Raises UsageError and CommandError."""
    members = {name: getattr(arguments, name) for name in ("id", "type", "args")}
    given = {name: value for name, value in members.items() if value is not None}
    if bool(arguments.event) + (arguments.file is not None) + bool(given) != 1:
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
    elif not given:
        yield [[(f"event {n}", text.encode()) for n, text in enumerate(arguments.event, 1)]]
    elif "id" in given and "type" in given:
        yield [[("event 1", orjson.dumps(given))]]
    else:
        raise UsageError("give both --id and --type")


def chunks(source: BufferedIOBase) -> Iterator[Lines]:
    """Yield the lines of each read without blank ones, so one at a time from a terminal.

    An unfinished line that is too long for an event is yielded as it is, to bound the memory.
    """
    number, rest = 0, b""
    while True:
        data = source.read1(_READ_BYTES)
        *whole, rest = (rest + data).split(b"\n")
        if len(rest) > MAX_BODY_BYTES or not data:
            whole, rest = [*whole, rest], b""
        bodies = enumerate(map(bytes.strip, whole), number + 1)
        if lines := [(f"line {place}", body) for place, body in bodies if body]:
            yield lines
        if not data:
            return
        number += len(whole)


_EVENT = "an event as JSON, or - for standard input with one a line"
_ID = "the event's id, with --type and perhaps --args, for JSON"
_TIMEOUT = "give up when nothing is confirmed for so long (default 30s)"

PUBLISH = Verb(
    "publish",
    "publish events, confirmed",
    _publish,
    [
        argument("event", nargs="*", read=utf8, metavar="EVENT", help=_EVENT),
        argument("--file", read=Path, metavar="PATH", help="a file with one event a line"),
        argument("--id", read=utf8, help=_ID),
        argument("--type", read=utf8, help="the event's type"),
        argument("--args", read=_object, metavar="JSON", help="the event's args, an object"),
        argument(
            "--exchange",
            read=check_exchange,
            default=EXCHANGE,
            metavar="NAME",
            help="default: events",
        ),
        argument("--timeout", read=duration_s, default=30, metavar="TIME", help=_TIMEOUT),
    ],
)
