"""RabbitMQ as a newcomer meets it: events published over HTTP, and the depth of a queue."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pika
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import AMQPError

from demo.steps import PlayFailedError, Step
from servers.web import fetch_json

_USER = _PASSWORD = "guest"
_PUBLISH = "/api/exchanges/%2f/events/publish"


class Broker:
    """RabbitMQ at `host`. Every method, and every step, raises OSError if it does not answer."""

    def __init__(self, host: str, amqp_port: int, management_port: int) -> None:
        options = "heartbeat=4&socket_timeout=5&stack_timeout=5"
        self._amqp_url = f"amqp://{_USER}:{_PASSWORD}@{host}:{amqp_port}/?{options}"
        self._management_url = f"http://{host}:{management_port}"
        # pika would log, between the checks, the errors that are raised anyway.
        logging.getLogger("pika").setLevel(logging.CRITICAL)

    def publish(self, *event_ids: str) -> Step:
        """Return the step that publishes new_order events; its curl command publishes the first."""
        bodies = [
            {
                "properties": {},
                "routing_key": "foo",
                "payload": _compact({"id": event_id, "type": "new_order"}),
                "payload_encoding": "string",
            }
            for event_id in event_ids
        ]
        # As in the README. We use the address: "localhost" could be tried over IPv6 first.
        url = (self._management_url + _PUBLISH).replace("//127.0.0.1:", "//localhost:")
        curl = (
            f'curl -i -u {_USER}:{_PASSWORD} -H "content-type:application/json" \\\n'
            f"  -X POST {url} \\\n"
            f"  -d'{_compact(bodies[0])}'"
        )
        return Step(curl, partial(self._post, bodies))

    def waiting(self, queue: str) -> int:
        """Return how many ready messages a queue has."""
        return self._declared(queue)[0]

    def consumers(self, queue: str) -> int:
        """Return how many consumers a queue has."""
        return self._declared(queue)[1]

    def _declared(self, queue: str) -> tuple[int, int]:
        """Declare passively: the counts of the management API are up to 5 s old."""
        with self.connected() as connection:
            answer = connection.channel().queue_declare(queue, passive=True).method
            return answer.message_count, answer.consumer_count

    @contextmanager
    def connected(self) -> Iterator[Any]:
        """Yield a connection while the block runs. What pika raises becomes an OSError."""
        try:
            with pika.BlockingConnection(pika.URLParameters(self._amqp_url)) as connection:
                yield connection
        except (AMQPError, AMQPConnectorException) as error:
            raise OSError(f"RabbitMQ does not answer: {error!r}") from error

    def purge(self, queues: Mapping[str, dict[str, object]]) -> None:
        """Empty queues, given their arguments. A queue that does not exist yet is declared."""
        with self.connected() as connection:
            channel = connection.channel()
            for queue, arguments in queues.items():
                channel.queue_declare(queue, durable=True, arguments=arguments)
                channel.queue_purge(queue)

    def unacked(self) -> dict[str, int]:
        """Return by queue how many messages are unacked; the counts are up to 5 s old."""
        path = "/api/queues?columns=name,messages_unacknowledged"
        listed = self._ask("GET", path, timeout_s=2)
        return {queue["name"]: queue.get("messages_unacknowledged", 0) for queue in listed}

    def version(self) -> str:
        return f"RabbitMQ {self._ask('GET', '/api/overview')['rabbitmq_version']}"

    def _post(self, bodies: Iterable[object]) -> None:
        for body in bodies:
            if self._ask("POST", _PUBLISH, body) != {"routed": True}:
                said = "no queue is bound to the exchange: the event is lost"
                raise PlayFailedError(said, "order")

    def _ask(self, method: str, path: str, body: object = None, timeout_s: float = 10.0) -> Any:
        url, login = self._management_url + path, (_USER, _PASSWORD)
        return fetch_json(method, url, body, login=login, timeout_s=timeout_s)


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def ready(connection: Any, queues: Iterable[str]) -> dict[str, int]:
    """Return by queue how many messages are ready."""
    with connection.channel() as channel:
        declared = {queue: channel.queue_declare(queue, passive=True) for queue in queues}
    return {queue: answer.method.message_count for queue, answer in declared.items()}


def headers(connection: Any, queue: str, most: int) -> Iterator[Mapping[str, Any]]:
    """Yield the headers of the first messages. They are requeued when the channel closes."""
    with connection.channel() as channel:
        for _ in range(most):
            method, properties, _body = channel.basic_get(queue)
            if method is None:
                return
            yield properties.headers or {}
