"""A producer and a consumer of events in one file, with RabbitMQ's client and nothing else.

A producer sends its messages to an *exchange*. A consumer has a *queue* and *binds* it to the
exchange; from then on the exchange puts a copy of each message that fits the binding into that
queue. The two never hear of each other.

What is left out here is what a service needs on top: an event that arrives twice is shown twice,
the queue goes with its consumer, and nobody asks the broker whether it has stored an event.
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
    """Send one event. Its fresh id is what tells a new event from a repeated one."""
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
    """Process one message, here by showing it: any bytes, for anybody may publish anything."""
    log.info("consumed  %s", body[:200])
    # Only now, when the work is done: what is not acked goes to another consumer of its queue.
    channel.basic_ack(delivery.delivery_tag)


def subscribe(channel: BlockingChannel) -> None:
    """Make a queue that gets every event, and have `consume` called for each message in it."""
    # Declaring makes what is not there yet. Durable: it is still there after a broker restart.
    channel.exchange_declare(EXCHANGE, exchange_type="topic", durable=True)
    # No name: RabbitMQ invents one. Exclusive and auto-delete: ours alone, and gone when we go.
    queue = channel.queue_declare("", exclusive=True, auto_delete=True).method.queue
    # "#" fits every routing key.
    channel.queue_bind(queue, EXCHANGE, routing_key="#")
    # At most ten messages are here without their ack; the others wait in RabbitMQ.
    channel.basic_qos(prefetch_count=10)
    channel.basic_consume(queue, consume)


class Stop:
    """Remembers that the process was asked to end: Ctrl-C, or `docker compose stop`."""

    asked = False

    def ask(self, *_: object) -> None:
        """Serve as the signal handler."""
        self.asked = True
        # What waits for a broker that does not answer is not waited for: see `main`.
        signal.alarm(END_WITHIN_S)


def run(servers: list[pika.URLParameters], stop: Stop) -> None:
    """Publish and consume until asked to stop, or until the connection or the queue is gone."""
    with pika.BlockingConnection(servers) as connection:
        channel = connection.channel()
        subscribe(channel)
        log.info("connected")
        # RabbitMQ cancels a consumer whose queue somebody deletes; the caller then starts afresh.
        while channel.consumer_tags and not stop.asked:
            publish(channel)
            # pika's own sleep: in the meantime messages arrive and `consume` is called.
            connection.sleep(PUBLISH_EVERY_S)


def servers_from_environment() -> list[pika.URLParameters]:
    """Read RABBITMQ_URL: one or several, comma-separated."""
    urls = os.environ.get("RABBITMQ_URL") or "amqp://guest:guest@localhost:5672/"
    try:
        return [pika.URLParameters(url.strip()) for url in urls.split(",")]
    except Exception:  # noqa: BLE001 - pika raises many kinds for what it cannot read.
        log.critical("RABBITMQ_URL is not of the form amqp://user:password@host:5672/")
        sys.exit(2)


def main() -> None:
    """Keep at it until asked to stop: when the connection fails, make a new one."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # pika logs several tracebacks for each failed connection; the one line below says it all.
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
