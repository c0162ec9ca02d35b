"""One AMQP connection with one channel, opened again whenever it is lost."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Sequence
from typing import Any

import pika
import pika.exceptions
from structlog.typing import FilteringBoundLogger

from ..health import Health
from ..policies import RECONNECT, Backoff
from ..settings import SettingsError
from . import frames
from .loop import PikaLoop

HEARTBEAT_S = 10
"""A frozen broker is noticed after two; a URL may set another with ``?heartbeat=``."""

NOT_FOUND = 404
"""AMQP's reply code for a queue or an exchange that is not there."""

_MAX_SHORT_STRING_BYTES = 255
"""AMQP's, for what it calls a short string."""


def _known(**options: int) -> dict[str, int]:
    """Return the options that this system has; Linux has them all."""
    return {name: value for name, value in options.items() if hasattr(socket, name)}


KEEPALIVE = _known(TCP_KEEPIDLE=3, TCP_KEEPINTVL=1, TCP_KEEPCNT=3)  # seconds, seconds, times
TCP_OPTIONS = {**KEEPALIVE, **_known(TCP_USER_TIMEOUT=6_000)}  # milliseconds
"""A broker that has vanished from the network is noticed after 6 s, by the system's TCP, idle or
not (Linux's page tcp(7)); heartbeats alone would take up to 30 s. A URL may set others with
``?tcp_options=``. TCP_USER_TIMEOUT is not for a connection that publishes: it also ends one whose
peer does not read, which is what a broker with an alarm does."""

LAST_ACKS_S = 0.25
"""RabbitMQ hands acks on to a quorum queue 32 at a time, and forgets those that still wait for
their turn when their channel closes: so long is waited before that."""

HELD_S = 10.0
"""A connection that was ready for so long is followed by another at once. One that ends sooner
counts as a failure: each turn costs every delivery in hand one of its returns."""


class Connection:
    """Keeps a channel open. pika's exceptions end here.

    ``opened`` is called with each new channel and calls ``ready`` when it has set it up; ``lost``
    is called once for each channel that had been opened. The addresses are tried in random order,
    each once before any is tried again, so the node that has failed is not the next.
    """

    def __init__(
        self,
        name: str,
        urls: Sequence[str],
        loop: PikaLoop,
        health: Health,
        log: FilteringBoundLogger,
        opened: Callable[[Any], None],
        lost: Callable[[], None],
        tcp_options: dict[str, int] = TCP_OPTIONS,
    ) -> None:
        self._name, self._loop, self._health = name, loop, health
        self._log = log.bind(connection=name)
        self._opened, self._lost = opened, lost
        self._parameters = [parameters_of(url, name, tcp_options) for url in urls]
        self._untried: list[Any] = []
        self._current: Any = None
        self._backoff = Backoff(RECONNECT)
        self._ready_s = 0.0
        self._connection: Any = None
        self._channel: Any = None
        self._why = ""
        self._closing = False
        health.lacks(name, "not connected yet")

    def open(self) -> None:
        """Connect to the next of the addresses."""
        if self._closing:
            return
        self._why = ""
        self._current = self._next()
        self._connection = frames.Connection(
            self._current,
            on_open_callback=self._on_open,
            on_open_error_callback=lambda _, error: self._on_closed(error),
            on_close_callback=lambda _, error: self._on_closed(error),
            custom_ioloop=self._loop.ioloop,
        )

    def ready(self) -> None:
        """Say that the channel does its work."""
        self._ready_s = self._loop.now_s()
        self._health.has(self._name)
        self._log.info("connected to RabbitMQ", node=_node(self._current))

    def drop(self, why: str) -> None:
        """Give this connection up, and open another."""
        if not self._why:
            self._why = why
        if self._connection is not None and self._connection.is_open:
            self._connection.close()

    def close(self) -> None:
        """Close for good: the broker takes back what is not settled."""
        self._closing = True
        self.drop("closed")

    @property
    def closed(self) -> bool:
        """Whether there is no connection, nor one being opened."""
        return self._connection is None or bool(self._connection.is_closed)

    def _on_open(self, connection: Any) -> None:
        connection.channel(on_open_callback=self._on_channel)

    def _on_channel(self, channel: Any) -> None:
        self._channel = channel
        channel.add_on_close_callback(self._on_channel_closed)
        self._opened(channel)

    def _on_channel_closed(self, _channel: Any, error: Exception) -> None:
        self._leave_channel()
        self.drop(explain(error))

    def _on_closed(self, error: Exception) -> None:
        self._leave_channel()
        if self._closing:
            return
        why = self._why or explain(error)
        if self._ready_s and self._loop.now_s() - self._ready_s > HELD_S:
            self._backoff.reset()
        self._ready_s = 0.0
        wait_s = self._backoff.next_s()
        self._health.lacks(self._name, why)
        self._log.warning(
            "no connection to RabbitMQ, trying again",
            error=why,
            node=_node(self._current),
            again_in_s=round(wait_s, 2),
        )
        self._loop.call_later(wait_s, self.open)

    def _next(self) -> Any:
        if not self._untried:
            self._untried = random.sample(self._parameters, len(self._parameters))
            if self._untried[-1] is self._current:
                self._untried.reverse()
        return self._untried.pop()

    def _leave_channel(self) -> None:
        if self._channel is not None:
            self._channel = None
            self._lost()


def parameters_of(
    url: str, name: str, tcp_options: dict[str, int] = TCP_OPTIONS
) -> pika.URLParameters:
    """Return a URL as pika takes it, with this library's time-outs. Raises SettingsError."""
    try:
        parameters = pika.URLParameters(url)
        if "heartbeat=" not in url:
            parameters.heartbeat = HEARTBEAT_S
        parameters.connection_attempts = 1
        parameters.socket_timeout = 5
        parameters.stack_timeout = 10
        if "tcp_options=" not in url:
            parameters.tcp_options = tcp_options
        parameters.client_properties = {"connection_name": name}
        _check(parameters)
    except (AttributeError, TypeError, ValueError, SyntaxError, OSError) as error:
        raise SettingsError(f"RABBITMQ_URL: {error}") from None
    if not parameters.heartbeat:
        raise SettingsError("RABBITMQ_URL: without heartbeats a frozen broker is never noticed")
    return parameters


def _check(parameters: Any) -> None:
    """Raise ValueError for what pika takes and then stumbles over at each connection."""
    if not all(type(value) is int for value in (parameters.tcp_options or {}).values()):
        raise ValueError("tcp_options takes whole numbers")
    if len(parameters.virtual_host.encode()) > _MAX_SHORT_STRING_BYTES:
        raise ValueError("its virtual host is longer than AMQP allows, 255 bytes")


def _node(parameters: Any) -> str:
    return f"{parameters.host}:{parameters.port}"


def explain(error: BaseException) -> str:
    """Write a failure in one line that says what to do where that is known."""
    for cause in _causes(error):
        if isinstance(cause, pika.exceptions.ChannelClosedByBroker) and (
            "inequivalent arg" in cause.reply_text
        ):
            return (
                f"{cause.reply_text}. A queue's or exchange's arguments never change: delete "
                "it (rabbitmqctl delete_queue NAME) when it is empty, and it is made anew"
            )
        if isinstance(cause, pika.exceptions.ChannelClosedByBroker) and (
            cause.reply_code == NOT_FOUND and "no queue" in cause.reply_text
        ):
            return f"{cause.reply_text}: it was deleted, and is declared anew"
        if isinstance(cause, pika.exceptions.ProbableAuthenticationError) or (
            isinstance(cause, pika.exceptions.ConnectionClosedByBroker) and cause.reply_code == 403
        ):
            return "RabbitMQ refuses the user or the password of RABBITMQ_URL"
    return " ".join(str(cause) or type(cause).__name__ for cause in _causes(error))[:500]


def _causes(error: BaseException) -> list[BaseException]:
    """Unfold what pika wraps: a workflow's failure holds those of its attempts."""
    inner = getattr(error, "exceptions", None) or [getattr(error, "exception", None), *error.args]
    found = [cause for each in inner if isinstance(each, BaseException) for cause in _causes(each)]
    return found or [error]
