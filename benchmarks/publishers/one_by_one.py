"""pika's blocking connection with confirms: it waits for each before it sends the next.

    python -m benchmarks.publishers.one_by_one URL EVENTS

The clock runs from the first publish to the last confirm.
"""

import sys

import pika

from benchmarks.loading import PERSISTENT, new_events
from benchmarks.timing import timed
from idempotent_consumer.names import EXCHANGE


def publish(url: str, events: int) -> None:
    """Publish so many events, and tell what that took."""
    bodies = new_events(events)
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.confirm_delivery()
    with timed(events):
        for body in bodies:
            # Raises unless the broker has confirmed it.
            channel.basic_publish(EXCHANGE, "new_order", body, PERSISTENT, mandatory=True)
    connection.close()


if __name__ == "__main__":
    publish(sys.argv[1], int(sys.argv[2]))
