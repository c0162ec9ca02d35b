"""The consumers that are measured beside the repository's services, each a process of its own.

    python -m benchmarks.consumers bare|order|plain|ceiling|naive

They find the servers as a service does, by RABBITMQ_URL and ETCD_ENDPOINTS. `bare` and `order` wait
for HANDLER_MS in each handler, `ceiling` and `naive` take PREFETCH events at once.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import etcd3
import orjson
import pika

from idempotent_consumer import Event, Service, Settings


def bare(name: str = "bare", noun: str = "events") -> int:
    """Run a service whose handler computes nothing and wants nothing recorded but the event."""
    service = Service(name, noun=noun)
    wait_s = float(os.environ.get("HANDLER_MS", "0")) / 1000

    @service.handler("new_order")
    def wait(_event: Event) -> None:
        """Wait, as for an answer of something outside, and return no effect."""
        if wait_s:
            time.sleep(wait_s)

    return service.run()


def order() -> int:
    """Run the same under the name of the order service, for a cluster's queues and counters."""
    return bare("order", "orders")


def plain() -> int:
    """Run a service whose handler is a plain function, which makes notify's request by urllib3."""
    # Imported here: what starts beside it shall not take longer for it.
    from .calls import poster

    service = Service("plain", noun="calls")
    post = poster(os.environ["NOTIFY_URL"], Settings.from_environ(os.environ).calls_at_once)

    @service.claimed_handler("new_order", timeout_s=5.0)
    def notify(event: Event, _timeout_s: float) -> None:
        """Make one call."""
        post({"id": event.id, "type": event.type, "args": event.args})

    return service.run()


def ceiling() -> None:
    """Take and ack what a quorum queue delivers, and do nothing with it.

    The same pika connection as the library's, the same prefetch, and like there one multiple ack
    for what one read from the socket brought. Nothing is decoded and nothing is recorded.
    """
    unacked = 0  # The last tag that waits for the ack, 0 for none.

    def opened(channel: Any) -> None:
        def on_message(_channel: Any, method: Any, _properties: Any, _body: bytes) -> None:
            nonlocal unacked
            if not unacked:
                # Comes round when everything of this read has been handed over.
                connection.ioloop.add_callback_threadsafe(ack)
            unacked = method.delivery_tag

        def ack() -> None:
            nonlocal unacked
            channel.basic_ack(unacked, multiple=True)
            unacked = 0

        channel.basic_qos(
            prefetch_count=int(os.environ["PREFETCH"]),
            callback=lambda _: channel.basic_consume("ceiling", on_message),
        )

    connection = pika.SelectConnection(
        pika.URLParameters(os.environ["RABBITMQ_URL"]),
        on_open_callback=lambda connection: connection.channel(on_open_callback=opened),
    )
    connection.ioloop.start()


def naive() -> None:
    """For each event make one etcd transaction and one ack, one after the other.

    What the tutorials of pika and etcd3 lead to: a blocking connection, a callback for each
    message, and the client's own transaction that asks whether the key was never created.
    """
    host, port = os.environ["ETCD_ENDPOINTS"].rsplit(":", 1)
    etcd = etcd3.client(host=host, port=int(port))

    def on_message(channel: Any, method: Any, _properties: Any, body: bytes) -> None:
        key = f"/service/naive/{orjson.loads(body)['id']}"
        etcd.transaction(
            compare=[etcd.transactions.create(key) == 0],
            success=[etcd.transactions.put(key, "done")],
            failure=[],
        )
        channel.basic_ack(method.delivery_tag)

    parameters = pika.URLParameters(os.environ["RABBITMQ_URL"])
    channel = pika.BlockingConnection(parameters).channel()
    channel.basic_qos(prefetch_count=int(os.environ["PREFETCH"]))
    channel.basic_consume("naive", on_message)
    channel.start_consuming()


if __name__ == "__main__":
    commands: dict[str, Callable[[], int | None]]
    commands = {"bare": bare, "order": order, "plain": plain, "ceiling": ceiling, "naive": naive}
    sys.exit(commands[sys.argv[1]]())
