"""The command: its verbs, and how each ends."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence

import orjson

from ..etcd import EtcdError
from ..settings import SettingsError
from . import dead_letters, doctor, find, gauges, publish, records, status
from .context import Context
from .output import CommandError, Report, UsageError

NAME = "idempotent-consumer"


def main(
    arguments: Sequence[str] | None = None,
    environ: Mapping[str, str] = os.environ,
    context: Callable[[Mapping[str, str]], Context] = Context,
) -> int:
    """Run one verb, print what it has to say, and return the exit code.

    0: done; 1: not done, or not all is well, with one line on standard error; 2: called wrongly,
    or a wrong setting. With --json, standard output gets one document in each case but the last.
    """
    given = _parser().parse_args(arguments)
    try:
        report: Report = given.run(given, context(environ))
    except (UsageError, SettingsError) as error:
        return _failed(error, 2)
    except (CommandError, EtcdError) as error:
        if given.json:
            _say({"error": str(error), **getattr(error, "document", {})})
        return _failed(error, 1)
    except KeyboardInterrupt:
        return _failed("interrupted", 130)
    _say(report.document if given.json else report.text)
    return 0 if report.ok else 1


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON document")
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="Look after services built on idempotent_consumer.",
        epilog="The services' environment variables say where RabbitMQ and etcd are.",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    publish.add(verbs, common)
    status.add(verbs, common)
    find.add(verbs, common)
    records.add_inspect(verbs, common)
    dead_letters.add(verbs, common)
    records.add_forget(verbs, common)
    doctor.add(verbs, common)
    gauges.add(verbs, common)
    return parser


def _failed(why: object, code: int) -> int:
    print(f"{NAME}: {why}", file=sys.stderr)
    return code


def _say(what: str | Mapping[str, object]) -> None:
    if not isinstance(what, str):
        what = orjson.dumps(what, option=orjson.OPT_INDENT_2).decode()
    try:
        print(what, flush=True)
    except BrokenPipeError:  # Whoever reads it has seen enough; nor is Python to say so at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
