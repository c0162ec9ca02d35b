"""A producer and a consumer of events in one file, with RabbitMQ's client and nothing else.

A producer sends its messages to an *exchange*. A consumer has a *queue* and *binds* it to the
exchange; from then on the exchange puts a copy of each message that matches the binding into that
queue. The two never know of each other.

A service needs more: here an event that arrives twice is shown twice, the queue is deleted with
its consumer, and nobody asks the broker whether it has stored an event.
"""

import json
import logging
import os
import signal
import sys
import time
import uuid

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import AMQPError

EXCHANGE = "events"
PUBLISH_EVERY_S = 2
RECONNECT_AFTER_S = 2
END_WITHIN_S = 5

log = logging.getLogger("example1")


def publish(channel: BlockingChannel) -> None:
    """Send one event. Its new id tells it from a repeated event."""
    event = {"id": str(uuid.uuid4()), "type": "new_order", "args": {"item": "tea"}}
    persistent = pika.BasicProperties(content_type="application/json", delivery_mode=2)
    channel.basic_publish(EXCHANGE, "new_order", json.dumps(event).encode(), persistent)
    log.info("published %s", event["id"])


def consume(
    channel: BlockingChannel,
    delivery: pika.spec.Basic.Deliver,
    _properties: pika.BasicProperties,
    body: bytes,
) -> None:
    """Process one message: show its bytes, whatever they are."""
    log.info("consumed  %s", body[:200])
    # Only when the work is done: an unacked message is delivered to another consumer.
    channel.basic_ack(delivery.delivery_tag)


def subscribe(channel: BlockingChannel) -> None:
    """Create a queue that gets every event, and call `consume` for each message in it."""
    # Declaring creates what does not exist yet. Durable: it survives a restart of the broker.
    channel.exchange_declare(EXCHANGE, exchange_type="topic", durable=True)
    # RabbitMQ chooses a name. Exclusive and auto-delete: for us alone, and deleted with us.
    queue = channel.queue_declare("", exclusive=True, auto_delete=True).method.queue
    # "#" matches every routing key.
    channel.queue_bind(queue, EXCHANGE, routing_key="#")
    # At most ten messages are delivered and unacked; the others wait in RabbitMQ.
    channel.basic_qos(prefetch_count=10)
    channel.basic_consume(queue, consume)


class Stop:
    """Remembers that the process was asked to stop, by Ctrl-C or `docker compose stop`."""

    asked = False

    def ask(self, *_: object) -> None:
        """Serve as the signal handler."""
        self.asked = True
        # `main` then ends the process even if the broker does not answer.
        signal.alarm(END_WITHIN_S)


def run(servers: list[pika.URLParameters], stop: Stop) -> None:
    """Publish and consume until asked to stop, or until the connection or the queue is lost."""
    with pika.BlockingConnection(servers) as connection:
        channel = connection.channel()
        subscribe(channel)
        log.info("connected")
        # RabbitMQ cancels a consumer when its queue is deleted; the caller then starts again.
        while channel.consumer_tags and not stop.asked:
            publish(channel)
            # pika's own sleep, during which messages arrive and `consume` is called.
            connection.sleep(PUBLISH_EVERY_S)


def servers_from_environment() -> list[pika.URLParameters]:
    """Read RABBITMQ_URL: one or several, comma-separated."""
    urls = os.environ.get("RABBITMQ_URL") or "amqp://guest:guest@localhost:5672/"
    try:
        return [pika.URLParameters(url.strip()) for url in urls.split(",")]
    except Exception:  # noqa: BLE001 - pika raises many kinds for a wrong URL.
        log.critical("RABBITMQ_URL is not of the form amqp://user:password@host:5672/")
        sys.exit(2)


def main() -> None:
    """Run until asked to stop; connect again when the connection fails."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # pika logs several tracebacks for each failed connection; our one line is enough.
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    servers = servers_from_environment()
    stop = Stop()
    signal.signal(signal.SIGINT, stop.ask)
    signal.signal(signal.SIGTERM, stop.ask)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    while not stop.asked:
        try:
            run(servers, stop)
        except (AMQPError, AMQPConnectorException, OSError, ValueError, TypeError) as error:
            log.warning("no connection to RabbitMQ, trying again: %r", error)
            time.sleep(RECONNECT_AFTER_S)
    log.info("stopped")


if __name__ == "__main__":
    main()
