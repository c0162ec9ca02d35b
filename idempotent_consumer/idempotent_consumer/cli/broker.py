"""RabbitMQ for an operator's command: calls that wait for their answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple, Self

import pika
import pika.exceptions

from ..amqp import NOT_FOUND, explain, keep_header_bytes, parameters_of

BLOCKED_TIMEOUT_S = 10.0
"""For so long a broker with an alarm is waited for, which takes no messages."""

_PRECONDITION_FAILED = 406


class BrokerError(Exception):
    """RabbitMQ did not do what it was asked; the message says why, in one line."""


class Depth(NamedTuple):
    """What a queue holds for delivery, and how many consume it. What is unacked is not in it."""

    ready: int
    consumers: int


class Broker:
    """One connection, to the first of the addresses that answers. Raises BrokerError throughout."""

    def __init__(self, urls: Sequence[str]) -> None:
        keep_header_bytes()
        parameters = [parameters_of(url, "idempotent-consumer") for url in urls]
        for each in parameters:
            each.blocked_connection_timeout = BLOCKED_TIMEOUT_S
        where = ", ".join(f"{each.host}:{each.port}" for each in parameters)
        try:
            self._connection = pika.BlockingConnection(parameters)
        except (pika.exceptions.AMQPError, OSError) as error:
            raise BrokerError(
                f"RabbitMQ at {where} cannot be used: {explain(error)} "
                "(RABBITMQ_URL says where it is)"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if self._connection.is_open:
            self._connection.close()

    @property
    def version(self) -> str:
        """Return the broker's version, as it greets with it."""
        # A BlockingConnection shows no other way to what the broker said of itself.
        properties: dict[str, Any] = self._connection._impl.server_properties  # noqa: SLF001
        version = properties.get("version", b"?")
        return version.decode() if isinstance(version, bytes) else str(version)

    def depth(self, queue: str) -> Depth | None:
        """Return what a queue holds at this instant, or None where there is no such queue."""
        try:
            with self.channel() as channel:
                found = channel.queue_declare(queue, passive=True).method
        except _ChannelEnded as error:
            if error.code == NOT_FOUND:
                return None
            raise
        return Depth(found.message_count, found.consumer_count)

    def differs(self, queue: str, arguments: dict[str, object]) -> bool:
        """Return whether a queue that is there has other arguments than these."""
        try:
            with self.channel() as channel:
                channel.queue_declare(queue, durable=True, arguments=arguments)
        except _ChannelEnded as error:
            if error.code == _PRECONDITION_FAILED:
                return True
            raise
        return False

    @contextmanager
    def channel(self) -> Iterator[Any]:
        """Open a channel for the block. What is unacked at its end goes back to its queue."""
        try:
            channel = self._connection.channel()
            yield channel
            if channel.is_open:
                channel.close()
        except pika.exceptions.ChannelClosedByBroker as error:
            hint = " (a service makes its queues when it starts)"
            raise _ChannelEnded(
                error.reply_code,
                f"RabbitMQ: {error.reply_text}" + hint * (error.reply_code == NOT_FOUND),
            ) from None
        except pika.exceptions.UnroutableError:
            raise BrokerError(
                "no queue takes what is sent: start the service, which makes it"
            ) from None
        except pika.exceptions.NackError:
            raise BrokerError("RabbitMQ did not take a message; try again") from None
        except pika.exceptions.ConnectionBlockedTimeout:
            raise BrokerError(
                "RabbitMQ has an alarm (memory or disk) and takes no messages"
            ) from None
        except pika.exceptions.AMQPError as error:
            raise BrokerError(f"the connection to RabbitMQ was lost: {explain(error)}") from None

    def wait(self, seconds: float) -> None:
        """Let what has been sent be read."""
        self._connection.sleep(seconds)


class _ChannelEnded(BrokerError):
    """The broker ended a channel; ``code`` is AMQP's."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code
