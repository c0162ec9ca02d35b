"""The operator's command: its verbs, its output and its exit codes."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from io import TextIOWrapper

import orjson

from ..etcd import EtcdError
from ..log import printable
from ..settings import SettingsError
from . import dead_letters, doctor, publish, records, status
from .context import Context, Verb, flag
from .output import CommandError, Report, UsageError, plain

NAME = "idempotent-consumer"

VERBS = (
    publish.PUBLISH,
    status.STATUS,
    status.REMOVE,
    records.FIND,
    records.INSPECT,
    dead_letters.DEAD_LETTERS,
    records.FORGET,
    doctor.DOCTOR,
    status.GAUGES,
)


def main(
    arguments: Sequence[str] | None = None,
    environ: Mapping[str, str] = os.environ,
    context: Callable[[Mapping[str, str]], Context] = Context,
) -> int:
    """Run one verb, print its report, and return the exit code.

    0: done; 1: not done, or something is wrong, with one line on standard error; 2: wrong arguments
    or settings. With --json, standard output gets one document, except with 2 and 130, which is an
    interrupt. LOG_LEVEL=debug adds the traceback of an error that no verb foresees.
    """
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="Look after services built on idempotent_consumer.",
        epilog="The services' environment variables say where RabbitMQ and etcd are.",
    )
    _add(parser, VERBS)
    given = parser.parse_args(arguments)
    if isinstance(sys.stdout, TextIOWrapper):
        # Escape what the terminal cannot show, rather than fail. JSON is always UTF-8.
        sys.stdout.reconfigure(encoding="utf-8" if given.json else None, errors="backslashreplace")
    try:
        report: Report = given.run(given, context(environ))
        _say(report.document if given.json else report.text)
        return 0 if report.ok else 1
    except (UsageError, SettingsError) as error:
        return _failed(error, 2)
    except KeyboardInterrupt as interrupt:
        return _failed(str(interrupt) or "interrupted", 130)
    except Exception as error:  # noqa: BLE001 - an operator gets one line whatever went wrong
        why = str(error)
        if not isinstance(error, (CommandError, EtcdError)):
            why = plain(f"{type(error).__name__}: {error}", 500)
            if environ.get("LOG_LEVEL", "").lower() == "debug":
                traceback.print_exc()
        if given.json:
            with suppress(CommandError):  # Standard output may be what failed.
                _say({"error": printable(why), **getattr(error, "document", {})})
        return _failed(why, 1)


def _add(parser: argparse.ArgumentParser, verbs: Sequence[Verb]) -> None:
    own = parser.add_subparsers(required=True, metavar="VERB")
    for verb in verbs:
        child = own.add_parser(verb.name, help=verb.text)
        if not callable(verb.run):
            _add(child, verb.run)
            continue
        child.set_defaults(run=verb.run)
        for names, options in (flag("--json", "print one JSON document"), *verb.arguments):
            child.add_argument(*names, **options)


def _failed(why: object, code: int) -> int:
    if sys.stderr:  # If it is closed, print would use standard output.
        print(f"{NAME}: {printable(str(why))}", file=sys.stderr)
    return code


def _say(what: str | Mapping[str, object]) -> None:
    if isinstance(what, str):
        # Strangers choose the names of queues and a server's words.
        what = printable(what, "\n")
    else:
        what = orjson.dumps(what, option=orjson.OPT_INDENT_2).decode()
    try:
        print(what, flush=True)
    except OSError as error:
        # At its exit Python flushes standard output once more, and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # A pipe's reader may stop early.
            raise CommandError(f"standard output takes nothing: {error.strerror}") from None
