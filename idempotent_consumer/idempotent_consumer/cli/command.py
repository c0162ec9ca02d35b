"""The command: its verbs, and how each ends."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence

import orjson

from ..etcd import EtcdError
from ..settings import SettingsError
from . import dead_letters, doctor, forget, inspecting, publish, status
from .broker import BrokerError
from .context import Context, real
from .errors import CommandError
from .report import Report
from .web import WebError

NAME = "idempotent-consumer"

_VERBS = (publish, status, inspecting, dead_letters, forget, doctor)
_FORESEEN = (CommandError, SettingsError, BrokerError, EtcdError, WebError)
_INTERRUPTED = 130


def main(
    arguments: Sequence[str] | None = None,
    environ: Mapping[str, str] = os.environ,
    context: Callable[[Mapping[str, str]], Context] = real,
) -> int:
    """Run one verb, print what it has to say, and return the exit code.

    0: done; 1: not done, or not all is well, with one line on standard error; 2: called wrongly,
    or a wrong setting. With --json, standard output gets one document in each case but the last.
    """
    given = _parser().parse_args(arguments)
    try:
        report: Report = given.run(given, context(environ))
    except _FORESEEN as error:
        return _failed(error, given.json)
    except KeyboardInterrupt:
        print(f"{NAME}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    _say(_json(report.document) if given.json else report.text)
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
    for verb in _VERBS:
        verb.add(verbs, common)
    return parser


def _failed(error: Exception, as_json: bool) -> int:
    code: int = 2 if isinstance(error, SettingsError) else getattr(error, "exit_code", 1)
    document: dict[str, object] = getattr(error, "document", {})
    if as_json and code == 1:
        _say(_json({"error": str(error), **document}))
    print(f"{NAME}: {error}", file=sys.stderr)
    return code


def _json(document: Mapping[str, object]) -> str:
    return orjson.dumps(document, option=orjson.OPT_INDENT_2).decode()


def _say(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # Whoever reads it has seen enough; nor is Python to say so at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
