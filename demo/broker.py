"""The broker as the newcomer meets it: an event published over HTTP, the depth of a queue."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pika
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import AMQPError

from demo.steps import Step, StepFailedError
from servers.web import fetch_json

_USER = _PASSWORD = "guest"
_PUBLISH = "/api/exchanges/%2f/events/publish"


class Broker:
    """RabbitMQ at `host`, with the ports of AMQP and of the management API."""

    def __init__(self, host: str, amqp_port: int, management_port: int) -> None:
        self._host, self._amqp_port = host, amqp_port
        self._management_url = f"http://{host}:{management_port}"
        self._url = self._management_url + _PUBLISH
        # Its lines would repeat, between the checks, what is raised.
        logging.getLogger("pika").setLevel(logging.CRITICAL)
        # As the README has it; asked by us, a "localhost" could be tried over IPv6 first.
        self._shown_url = self._url.replace("//127.0.0.1:", "//localhost:")

    def publish(self, event_id: str) -> Step:
        """Return the step that publishes a new_order event, and the curl command that does."""
        body = {
            "properties": {},
            "routing_key": "foo",
            "payload": _compact({"id": event_id, "type": "new_order"}),
            "payload_encoding": "string",
        }
        curl = (
            f'curl -i -u {_USER}:{_PASSWORD} -H "content-type:application/json" \\\n'
            f"  -X POST {self._shown_url} \\\n"
            f"  -d'{_compact(body)}'"
        )
        return Step(curl, lambda: self._post(body))

    def waiting(self, queue: str) -> int:
        """Return how many messages a queue holds that no consumer has; raises OSError."""
        count: int = self._declared(queue).message_count
        return count

    def consumers(self, queue: str) -> int:
        """Return how many consumers a queue has; raises OSError."""
        count: int = self._declared(queue).consumer_count
        return count

    def _declared(self, queue: str) -> Any:
        """Declare passively: the management API shows the counts of up to 5 s ago."""
        with self.connected() as connection:
            return connection.channel().queue_declare(queue, passive=True).method

    @contextmanager
    def connected(self) -> Iterator[Any]:
        """Yield a connection while the block runs; raises OSError for all that pika raises."""
        parameters = pika.ConnectionParameters(
            self._host,
            self._amqp_port,
            credentials=pika.PlainCredentials(_USER, _PASSWORD),
            heartbeat=4,
            socket_timeout=5,
            stack_timeout=5,
        )
        try:
            with pika.BlockingConnection(parameters) as connection:
                yield connection
        except (AMQPError, AMQPConnectorException) as error:
            raise OSError(f"RabbitMQ does not answer: {error!r}") from error

    def purge(self, queues: Mapping[str, dict[str, object]]) -> None:
        """Empty queues, given their arguments: also where none is there yet. Raises OSError."""
        with self.connected() as connection:
            channel = connection.channel()
            for queue, arguments in queues.items():
                channel.queue_declare(queue, durable=True, arguments=arguments)
                channel.queue_purge(queue)

    def unacked(self) -> dict[str, int]:
        """Return by queue how many messages were unacked up to 5 s ago; raises OSError."""
        url = f"{self._management_url}/api/queues?columns=name,messages_unacknowledged"
        listed: Any = fetch_json("GET", url, login=(_USER, _PASSWORD), timeout_s=2)
        return {queue["name"]: queue.get("messages_unacknowledged", 0) for queue in listed}

    def version(self) -> str:
        """Return its name and version; raises OSError."""
        login = (_USER, _PASSWORD)
        answer: Any = fetch_json("GET", f"{self._management_url}/api/overview", login=login)
        return f"RabbitMQ {answer['rabbitmq_version']}"

    def _post(self, body: object) -> None:
        answer: Any = fetch_json("POST", self._url, body, login=(_USER, _PASSWORD))
        if answer != {"routed": True}:
            raise StepFailedError("no queue is bound to the exchange: the event is lost", "order")


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def ready(connection: Any, queues: Iterable[str]) -> dict[str, int]:
    with connection.channel() as channel:
        declared = {queue: channel.queue_declare(queue, passive=True) for queue in queues}
    return {queue: answer.method.message_count for queue, answer in declared.items()}


def headers(connection: Any, queue: str, most: int) -> Iterator[Mapping[str, Any]]:
    """Yield the headers of the first messages: unacked, they go back with the channel."""
    with connection.channel() as channel:
        for _ in range(most):
            method, properties, _body = channel.basic_get(queue)
            if method is None:
                return
            yield properties.headers or {}
