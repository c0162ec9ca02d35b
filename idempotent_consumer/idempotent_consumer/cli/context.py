"""What a verb works with: arguments, the settings, the terminal, and the ways to the servers."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from io import BufferedIOBase, BytesIO, StringIO
from typing import Any, NamedTuple, TextIO, TypeVar, cast

import structlog

from ..log import printable
from ..metrics import Metrics
from ..names import check_exchange, check_service_name
from ..producer import Producer
from ..settings import Settings, duration_s
from . import web
from .broker import Broker, Management
from .etcd import Etcd
from .output import CommandError, Report

T = TypeVar("T")


class Context:
    """Everything from outside that a verb touches, so that a test can hand over its own.

    Raises SettingsError.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ, self.settings = environ, Settings.from_environ(environ)
        # Python has none of them that was closed.
        self.stdin = cast("BufferedIOBase", sys.stdin.buffer if sys.stdin else BytesIO())
        self.err: TextIO = sys.stderr or StringIO()

    def rabbitmq(self, url: str = "") -> AbstractContextManager[Broker]:
        """Connect to RabbitMQ, or to one of its nodes."""
        return Broker((url,) if url else self.settings.rabbitmq_urls)

    def etcd(self, address: tuple[str, int] | None = None) -> AbstractContextManager[Etcd]:
        """Open a client of etcd, or of one of its members."""
        settings = replace(self.settings, etcd_endpoints=(address,)) if address else self.settings
        return closing(Etcd(settings))

    def producer(self, exchange: str) -> AbstractContextManager[Producer]:
        """Open a producer that logs nothing: what counts is in the error that it ends with."""
        log = structlog.wrap_logger(None, processors=[_drop])
        return Producer(self.settings, log, exchange=exchange)

    def metrics(self) -> Metrics:
        """Return what sends to statsd, to be closed."""
        given = self.settings
        return Metrics(given.statsd_host, given.statsd_port, given.statsd_prefix)

    def fetch(self, url: str, tls: web.Tls) -> web.Page:
        """Get a page by HTTP. Raises WebError."""
        return web.fetch(url, tls)

    def management(self) -> Management:
        """Return RabbitMQ's management API. Raises SettingsError."""
        return Management(self.environ, self.settings, self.fetch)

    def now_s(self) -> float:
        """Return the time of day."""
        return time.time()

    def confirm(self, question: str, yes: bool) -> None:
        """Ask on the terminal, unless it was said beforehand. Raises CommandError for a no."""
        if yes:
            return
        if not self.stdin.isatty():
            raise CommandError("this asks first, and there is no terminal to ask on: say --yes")
        self.err.write(f"{printable(question)} [y/N] ")
        self.err.flush()
        if self.stdin.readline().strip().lower() not in (b"y", b"yes"):
            raise CommandError("nothing was done")


def _drop(*_: object) -> dict[str, object]:
    raise structlog.DropEvent


def _argument(read: Callable[[str], T]) -> Callable[[str], T]:
    """Return the function for argparse, which shows the message of no other error than its own."""

    def read_argument(text: str) -> T:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read_argument


seconds = _argument(duration_s)
"""Reads a time as the settings write it, as in ``30s`` or ``10m``."""

service = _argument(check_service_name)
"""Reads the name of a service."""

exchange = _argument(check_exchange)
"""Reads the name of an exchange."""


def utf8(text: str) -> str:
    """Return a text that events and etcd's keys can hold: an argument can be any bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("it is not UTF-8") from None
    return text


Argument = tuple[tuple[str, ...], dict[str, Any]]
"""What argparse's ``add_argument`` takes."""


def argument(*names: str, **options: Any) -> Argument:
    """Return an argument of a verb."""
    return names, options


def flag(name: str, text: str) -> Argument:
    """Return an option without a value."""
    return argument(name, action="store_true", help=text)


SERVICE = argument("service", type=service, metavar="SERVICE")
SERVICES = argument(
    "service",
    nargs="*",
    type=service,
    metavar="SERVICE",
    help="a service; without any, all that have a dead-letter queue",
)
EVENT_ID = argument("id", type=utf8, metavar="ID", help="the event's id")
YES = flag("--yes", "do not ask")


class Verb(NamedTuple):
    """A verb: what runs it, or the verbs that it has of its own."""

    name: str
    text: str
    run: Callable[[argparse.Namespace, Context], Report] | Sequence[Verb]
    arguments: Sequence[Argument] = ()
