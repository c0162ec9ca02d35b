"""A watch on etcd that tells when each event has been recorded."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import etcd3

from harness.servers import Servers


@contextmanager
def etcd_client(servers: Servers) -> Iterator[Any]:
    """Give a client of etcd3's own."""
    host, port = servers.etcd.endpoint.rsplit(":", 1)
    client = etcd3.client(host=host, port=int(port))
    try:
        yield client
    finally:
        client.close()


@contextmanager
def watch(
    etcd: Any, prefix: str, changed: Callable[[float, Sequence[bytes]], None]
) -> Iterator[None]:
    """Watch the keys below a prefix while the block runs.

    `changed` is called on the client's thread with the time, on the monotonic clock, and the keys
    that one answer brought. Watching has begun when the block begins.
    """

    def took(answer: Any) -> None:
        changed(time.monotonic(), [event.key for event in answer.events])

    watch_id = etcd.add_watch_prefix_callback(prefix, took)
    try:
        yield
    finally:
        etcd.cancel_watch(watch_id)
