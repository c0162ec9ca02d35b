"""Keep a queue filled but bounded, as a process of its own beside the service.

    python -m benchmarks.filling URL QUEUE

On SIGTERM it finishes what it is at and prints how many events it has published, all confirmed.
"""

import signal
import sys

import pika

from .firehose import Firehose
from .loading import new_events

LEAST_READY = 20_000
CHUNK = 10_000

_LOOK_AGAIN_S = 0.05


def fill(url: str, queue: str) -> int:
    """Publish whenever fewer than `LEAST_READY` events wait; return their number at the end."""
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopping.append(number))
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    firehose = Firehose(url, queue, len(new_events(1)[0]))
    published = 0
    while not stopping:
        if channel.queue_declare(queue, passive=True).method.message_count < LEAST_READY:
            firehose.publish(new_events(CHUNK))
            published += CHUNK
        else:
            connection.sleep(_LOOK_AGAIN_S)
    firehose.close()
    connection.close()
    return published


if __name__ == "__main__":
    print(fill(sys.argv[1], sys.argv[2]))
