"""What a verb works with: the settings, the terminal, and the ways to the servers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, TextIO, cast

import structlog

from ..producer import Producer
from ..settings import Settings
from . import web
from .broker import Broker, Depth
from .dead_letter_queue import Letter, open_dead_letter_queue
from .errors import CommandError
from .etcd import Asking, Etcd
from .lines import Input
from .management import Fetch, Management, management


class RabbitMQ(Protocol):
    """A connection to RabbitMQ. Raises BrokerError."""

    @property
    def version(self) -> str:
        """The broker's version."""
        ...

    def depth(self, queue: str) -> Depth | None:
        """Return what a queue holds, or None where there is no such queue."""
        ...

    def differs(self, queue: str, arguments: dict[str, object]) -> bool:
        """Return whether a queue that is there has other arguments than these."""
        ...


class DeadLetters(Protocol):
    """The dead letters of a service, in hand. Raises BrokerError."""

    def __iter__(self) -> Iterator[Letter]:
        """Yield them."""
        ...

    def resend(self, letter: Letter) -> None:
        """Send one to its service's queue, and then remove it."""
        ...

    def remove(self, letter: Letter) -> None:
        """Remove one."""
        ...


class Publisher(Protocol):
    """The library's producer."""

    def publish(
        self,
        bodies: Iterable[bytes],
        timeout_s: float = 30.0,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Publish events, and return their number once each is confirmed."""
        ...


@dataclass
class Context:
    """Everything from outside that a verb touches, so that a test can hand over its own."""

    environ: Mapping[str, str]
    settings: Settings
    stdin: Input
    err: TextIO
    open_rabbitmq: Callable[[Settings], AbstractContextManager[RabbitMQ]]
    open_letters: Callable[[Settings, str], AbstractContextManager[DeadLetters]]
    open_etcd: Callable[[Settings], AbstractContextManager[Asking]]
    open_producer: Callable[[Settings], AbstractContextManager[Publisher]]
    fetch: Fetch
    now_s: Callable[[], float]

    def rabbitmq(self, url: str = "") -> AbstractContextManager[RabbitMQ]:
        """Connect to RabbitMQ, or to one of its nodes."""
        settings = replace(self.settings, rabbitmq_urls=(url,)) if url else self.settings
        return self.open_rabbitmq(settings)

    def letters(self, service: str) -> AbstractContextManager[DeadLetters]:
        """Take a service's dead letters in hand."""
        return self.open_letters(self.settings, service)

    def etcd(self, address: tuple[str, int] | None = None) -> AbstractContextManager[Asking]:
        """Open a client of etcd, or of one of its members."""
        settings = replace(self.settings, etcd_endpoints=(address,)) if address else self.settings
        return self.open_etcd(settings)

    def producer(self) -> AbstractContextManager[Publisher]:
        """Open a producer."""
        return self.open_producer(self.settings)

    def management(self) -> Management:
        """Return RabbitMQ's management API. Raises SettingsError."""
        return management(self.environ, self.settings, self.fetch)

    def confirm(self, question: str, yes: bool) -> None:
        """Ask on the terminal, unless it was said beforehand. Raises CommandError for a no."""
        if yes:
            return
        if not self.stdin.isatty():
            raise CommandError("this asks first, and there is no terminal to ask on: say --yes")
        self.err.write(f"{question} [y/N] ")
        self.err.flush()
        if self.stdin.readline().strip().lower() not in (b"y", b"yes"):
            raise CommandError("nothing was done")


def real(environ: Mapping[str, str]) -> Context:
    """Return the context of this process. Raises SettingsError."""
    return Context(
        environ,
        Settings.from_environ(environ),
        cast("Input", sys.stdin.buffer),
        sys.stderr,
        lambda settings: Broker(settings.rabbitmq_urls),
        _letters,
        lambda settings: closing(Etcd(settings)),
        _producer,
        web.fetch,
        time.time,
    )


@contextmanager
def _letters(settings: Settings, service: str) -> Iterator[DeadLetters]:
    with (
        Broker(settings.rabbitmq_urls) as broker,
        open_dead_letter_queue(broker, service) as letters,
    ):
        yield letters


def _producer(settings: Settings) -> AbstractContextManager[Publisher]:
    """Open a producer that logs nothing: what counts is in the error that it ends with."""
    return Producer(settings, structlog.wrap_logger(None, processors=[_drop]))


def _drop(*_: object) -> dict[str, object]:
    raise structlog.DropEvent
