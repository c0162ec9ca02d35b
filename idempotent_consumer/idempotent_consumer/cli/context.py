"""What a verb works with: its arguments, the settings, the terminal and the servers."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from io import BufferedIOBase, BytesIO, StringIO
from typing import Any, NamedTuple, TextIO, cast

import structlog

from ..log import printable
from ..metrics import Metrics
from ..names import check_service_name
from ..producer import Producer
from ..settings import Settings
from . import web
from .broker import Broker, Management
from .etcd import Etcd
from .output import CommandError, Report


class Context:
    """Everything outside that a verb uses, so that a test can hand over its own.

    Raises SettingsError.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ, self.settings = environ, Settings.from_environ(environ)
        # A standard stream that was closed is None.
        self.stdin = cast("BufferedIOBase", sys.stdin.buffer if sys.stdin else BytesIO())
        self.err: TextIO = sys.stderr or StringIO()

    def rabbitmq(self, url: str = "") -> AbstractContextManager[Broker]:
        """Connect to RabbitMQ, or to the node at this URL."""
        return closing(Broker((url,) if url else self.settings.rabbitmq_urls))

    def etcd(self, address: tuple[str, int] | None = None) -> AbstractContextManager[Etcd]:
        """Open a client of etcd, or of the member at this address."""
        settings = replace(self.settings, etcd_endpoints=(address,)) if address else self.settings
        return closing(Etcd(settings))

    def producer(self, exchange: str) -> AbstractContextManager[Producer]:
        """Open a producer that logs nothing: the error it raises says what went wrong."""
        silent = structlog.make_filtering_bound_logger(logging.CRITICAL)
        log = structlog.wrap_logger(None, wrapper_class=silent)
        return Producer(self.settings, log, exchange=exchange)

    def metrics(self) -> Metrics:
        """Open a client of statsd; the caller closes it."""
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
        """Ask on the terminal, unless ``yes``. Raises CommandError if the answer is not yes."""
        if yes:
            return
        if not self.stdin.isatty():
            raise CommandError("this asks first, and there is no terminal to ask on: say --yes")
        self.err.write(f"{printable(question)} [y/N] ")
        self.err.flush()
        if self.stdin.readline().strip().lower() not in (b"y", b"yes"):
            raise CommandError("nothing was done")


def utf8(text: str) -> str:
    """Return a text if events and etcd's keys can hold it: an argument can be any bytes."""
    text.encode()
    return text


Argument = tuple[tuple[str, ...], dict[str, Any]]
"""What argparse's ``add_argument`` takes."""


def argument(*names: str, read: Callable[[str], object] = str, **options: Any) -> Argument:
    """Return an argument of a verb. ``read`` turns its text into a value, or raises ValueError."""

    def checked(text: str) -> object:
        try:
            return read(text)
        except ValueError as error:  # argparse shows only the messages of its own errors.
            why = "it is not UTF-8" if isinstance(error, UnicodeError) else str(error)
            raise argparse.ArgumentTypeError(why) from None

    return names, {"type": checked, **options}


def flag(name: str, text: str) -> Argument:
    """Return an option without a value."""
    return (name,), {"action": "store_true", "help": text}


SERVICE = argument("service", read=check_service_name, metavar="SERVICE")
SERVICES = argument(
    "service",
    nargs="*",
    read=check_service_name,
    metavar="SERVICE",
    help="a service; without any, all that have a dead-letter queue",
)
EVENT_ID = argument("id", read=utf8, metavar="ID", help="the event's id")
YES = flag("--yes", "do not ask")


class Verb(NamedTuple):
    """A verb, and the function that runs it, or the verbs below it."""

    name: str
    text: str
    run: Callable[[argparse.Namespace, Context], Report] | Sequence[Verb]
    arguments: Sequence[Argument] = ()
