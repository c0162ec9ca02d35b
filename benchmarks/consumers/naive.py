"""The naive way: for each event one etcd transaction and one ack, one after the other.

    python -m benchmarks.consumers.naive URL QUEUE PREFETCH HOST:PORT

What the tutorials of pika and etcd3 lead to: a blocking connection, a callback for each message,
and the client's own transaction with the comparison "this key was never created".
"""

import sys
from typing import Any

import etcd3
import orjson
import pika


def consume(url: str, queue: str, prefetch: int, endpoint: str) -> None:
    """Record and ack until a signal ends the process."""
    host, port = endpoint.rsplit(":", 1)
    etcd = etcd3.client(host=host, port=int(port))

    def on_message(channel: Any, method: Any, _properties: Any, body: bytes) -> None:
        key = f"/service/{queue}/{orjson.loads(body)['id']}"
        etcd.transaction(
            compare=[etcd.transactions.create(key) == 0],
            success=[etcd.transactions.put(key, "done")],
            failure=[],
        )
        channel.basic_ack(method.delivery_tag)

    channel = pika.BlockingConnection(pika.URLParameters(url)).channel()
    channel.basic_qos(prefetch_count=prefetch)
    channel.basic_consume(queue, on_message)
    channel.start_consuming()


if __name__ == "__main__":
    consume(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
