"""The library's producer: everything sent is confirmed before it returns.

    python -m benchmarks.publishers.library URL EVENTS

The clock runs from the first publish to the last confirm.
"""

import sys

from benchmarks.loading import new_events
from benchmarks.outcome import timed
from idempotent_consumer import Producer, Settings


def publish(url: str, events: int) -> None:
    """Publish so many events, and tell what that took."""
    bodies = new_events(events)
    with Producer(Settings.from_environ({"RABBITMQ_URL": url})) as producer:
        producer.publish(bodies[:1])  # It connects at its first event.
        with timed(events - 1):
            producer.publish(bodies[1:])


if __name__ == "__main__":
    publish(sys.argv[1], int(sys.argv[2]))
