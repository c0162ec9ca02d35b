"""RabbitMQ as an operator sees it: through AMQP and through its management API."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit

import pika
import pika.exceptions
from pika.adapters.utils.connection_workflow import AMQPConnectorException

from .. import names
from ..amqp import explain, keep_header_bytes, parameters_of
from ..settings import Settings, SettingsError
from .output import CommandError
from .web import Page, Tls, WebError, is_address

_BLOCKED_TIMEOUT_S = 10.0
"""How long to wait for a broker that takes no messages because of an alarm."""

_NOT_FOUND, _PRECONDITION_FAILED = 404, 406  # AMQP's reply codes.

_REFUSALS = {
    pika.exceptions.UnroutableError: "no queue takes what is sent: start the service, "
    "which makes it",
    pika.exceptions.NackError: "RabbitMQ did not take a message; try again",
    pika.exceptions.ConnectionBlockedTimeout: "RabbitMQ has an alarm (memory or disk) and takes "
    "no messages",
}


class BrokerError(CommandError):
    """A request to RabbitMQ failed. ``code`` is AMQP's reply code if it closed the channel."""

    def __init__(self, why: str, code: int = 0) -> None:
        super().__init__(why)
        self.code = code


class Depth(NamedTuple):
    """The numbers of a queue's ready messages, without the unacked ones, and of its consumers."""

    ready: int
    consumers: int


class Broker:
    """A connection to the first node that answers. Every method can raise BrokerError."""

    def __init__(self, urls: Sequence[str]) -> None:
        keep_header_bytes()
        parameters = [parameters_of(url, "idempotent-consumer") for url in urls]
        for each in parameters:
            each.blocked_connection_timeout = _BLOCKED_TIMEOUT_S
        where = ", ".join(f"{each.host}:{each.port}" for each in parameters)
        try:
            self._connection = pika.BlockingConnection(parameters)
        except (pika.exceptions.AMQPError, AMQPConnectorException, OSError) as error:
            raise BrokerError(
                f"RabbitMQ at {where} cannot be used: {explain(error)} "
                "(RABBITMQ_URL says where it is)"
            ) from None
        # A BlockingConnection has no public name for the server's properties.
        properties: dict[str, Any] = self._connection._impl.server_properties  # noqa: SLF001
        self.version = str(properties.get("version", "?"))

    def close(self) -> None:
        """Close the connection."""
        if self._connection.is_open:
            with suppress(pika.exceptions.AMQPError):  # It may be lost meanwhile.
                self._connection.close()

    def depth(self, queue: str) -> Depth | None:
        """Return what a queue holds at this instant, or None if there is no such queue."""
        found = self._declare(queue, _NOT_FOUND, passive=True)
        return found and Depth(found.message_count, found.consumer_count)

    def delete(self, queue: str) -> int:
        """Delete a queue; return how many messages were ready in it."""
        with self.channel() as channel:
            return int(channel.queue_delete(queue).method.message_count)

    def differs(self, queue: str, arguments: dict[str, object]) -> bool:
        """Return whether an existing queue has other arguments than these."""
        return not self._declare(queue, _PRECONDITION_FAILED, durable=True, arguments=arguments)

    def _declare(self, queue: str, refusal: int, **options: Any) -> Any:
        """Return the broker's reply, or None if it refuses with this code."""
        try:
            with self.channel() as channel:
                return channel.queue_declare(queue, **options).method
        except BrokerError as error:
            if error.code != refusal:
                raise
            return None

    @contextmanager
    def channel(self) -> Iterator[Any]:
        """Open a channel for the block. At its end unacked messages return to their queue."""
        try:
            channel = self._connection.channel()
            yield channel
            if channel.is_open:
                channel.close()
        except pika.exceptions.ChannelClosedByBroker as error:
            hint = " (a service makes its queues when it starts)"
            why = f"RabbitMQ: {error.reply_text}" + hint * (error.reply_code == _NOT_FOUND)
            raise BrokerError(why, error.reply_code) from None
        except pika.exceptions.AMQPError as error:
            lost = f"the connection to RabbitMQ was lost: {explain(error)}"
            raise BrokerError(_REFUSALS.get(type(error), lost)) from None

    def wait(self, seconds: float) -> None:
        """Read what RabbitMQ has sent, and answer its heartbeats, for this long."""
        try:
            self._connection.sleep(seconds)
        except pika.exceptions.AMQPError as error:
            raise BrokerError(f"the connection to RabbitMQ was lost: {explain(error)}") from None


_VARIABLE = "RABBITMQ_MANAGEMENT_URL"


class Queues(NamedTuple):
    """All queues by name, with counts that are some seconds old.

    ``why_not`` says why the management API did not list them. There are none then, and a service's
    retry queues are not known: its handlers may have delays of their own.
    """

    facts: Mapping[str, Mapping[str, Any]]
    why_not: str = ""

    def services(self, given: Sequence[str]) -> list[str]:
        """Return the services given, or all with a dead-letter queue. Raises CommandError."""
        if given:
            return list(given)
        if self.why_not:
            raise CommandError(f"{self.why_not}; or name the services")
        # Any other name is a stranger's, and could write any metric in statsd.
        valid = filter(names.is_service_name, self.facts)
        return sorted(name for name in valid if names.dead_letter_queue(name) in self.facts)

    def retries(self, service: str, settings: Settings) -> dict[str, str]:
        """Return a service's retry queues by delay: those of the settings, then all others."""
        prefix = names.retry_queue(service, "")
        others = [name.removeprefix(prefix) for name in self.facts if name.startswith(prefix)]
        delays = dict.fromkeys([*dict(settings.retry_delays), *others])
        return {delay: prefix + delay for delay in delays}

    def of(self, service: str, settings: Settings) -> list[str]:
        """Return the names of a service's queues, whether they exist or not."""
        retries = self.retries(service, settings).values()
        return [service, *retries, names.dead_letter_queue(service)]


class Management:
    """The API at RABBITMQ_MANAGEMENT_URL, or on the first host of RABBITMQ_URL that answers.

    In the second case it has that URL's login, and http on port 15672, or https on 15671 for
    ``amqps://``. Raises SettingsError when it is made, and WebError.
    """

    def __init__(
        self, environ: Mapping[str, str], settings: Settings, fetch: Callable[[str, Tls], Page]
    ) -> None:
        given = environ.get(_VARIABLE, "").strip().rstrip("/")
        if given and not is_address(given):
            raise SettingsError(f"{_VARIABLE}: write http://user:password@host:port (or https://)")
        self._urls = [given] if given else [_beside(url) for url in settings.rabbitmq_urls]
        self._vhost = quote(unquote(urlsplit(settings.rabbitmq_urls[0]).path[1:]) or "/", safe="")
        self._tls = Tls(settings.rabbitmq_ca_cert, settings.rabbitmq_cert, settings.rabbitmq_key)
        self._fetch = fetch

    def get(self, path: str) -> Any:
        """Return the JSON at a path below ``/api``; ``{vhost}`` stands for the one in use."""
        return self.page(path).json()

    def page(self, path: str) -> Page:
        """Return the same page undecoded."""
        path, failed = path.replace("{vhost}", self._vhost), WebError("it has no address")
        for url in self._urls:
            try:
                return self._fetch(f"{url}/api{path}", self._tls)
            except WebError as error:
                failed = error
                if error.status:
                    break
        why = f"RabbitMQ's management API: {failed} ({_VARIABLE} says where it is)"
        raise WebError(why, failed.status, failed.body)

    def queues(self) -> Queues:
        """Return all queues, or why they are not known."""
        try:
            found = self.get("/queues/{vhost}?disable_stats=true&enable_queue_totals=true")
            return Queues({queue["name"]: queue for queue in found})
        except WebError as error:
            return Queues({}, str(error))
        except (KeyError, TypeError):
            why = "RabbitMQ's management API: the answer is no list of queues"
            return Queues({}, f"{why} ({_VARIABLE} says where it is)")


def _beside(amqp_url: str) -> str:
    parts = urlsplit(amqp_url)
    scheme, port = ("https", 15671) if parts.scheme == "amqps" else ("http", 15672)
    login, at, _ = parts.netloc.rpartition("@")
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{scheme}://{login if at else 'guest:guest'}@{host}:{port}"
