"""A service that starts with an event waiting for it, and what its log tells of the import."""

from __future__ import annotations

import json
import queue
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import etcd3

from harness.process import Child
from harness.servers import Servers
from harness.wait import eventually

from .loading import Loader
from .memory import resident_bytes
from .progress import NotMeasuredError
from .subjects import Subject

NEW = "new-"
"""What the ids of events begin with that are no part of the history."""

_LOST_AFTER_S = 60.0
_SETTLES_IN_S = 1.0
_STOP_WITHIN_S = 15.0


class Import(NamedTuple):
    """What the service's log says of its import."""

    records: int
    seconds: float


class Start(NamedTuple):
    """One start: process start to first record, the import, resident bytes afterwards."""

    first_ms: float
    imported: Import
    memory_bytes: int


def new_body() -> bytes:
    """Return an event that nobody has seen."""
    return b'{"id":"%s%s","type":"new_order","args":{"item":"tea","quantity":1}}' % (
        NEW.encode(), str(uuid.uuid4()).encode()
    )


@contextmanager
def running(subject: Subject) -> Iterator[Child]:
    """Give the service's process, started; it is ended afterwards."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as logs:
        child = subject.child(Path(logs))
        child.start()
        try:
            yield child
        finally:
            if child.running:
                child.terminate(_STOP_WITHIN_S)


def measure_start(servers: Servers, subject: Subject) -> Start:
    """Publish an event, start the service, and wait for the record and for the import's end.

    The record is seen by a watch that was opened before, so its way back counts too.
    """
    body = new_body()
    Loader(servers.rabbitmq.url, subject.queue, [body]).run()
    host, port = servers.etcd.endpoint.rsplit(":", 1)
    etcd = etcd3.client(host=host, port=int(port))
    arrived = _watch(etcd, subject.records[0] + json.loads(body)["id"])
    started_s = time.perf_counter()
    with running(subject) as child:
        try:
            recorded_s = arrived.get(timeout=_LOST_AFTER_S)
        except queue.Empty:
            raise NotMeasuredError(f"the first event is not recorded:\n{child.output()}") from None
        finally:
            etcd.close()
        imported = wait_imported(child)
        time.sleep(_SETTLES_IN_S)
        return Start((recorded_s - started_s) * 1000, imported, resident_bytes(child.pid))


def wait_imported(child: Child) -> Import:
    """Wait until the service has said that its import is done."""
    return eventually(lambda: _import_of(child.output()), _LOST_AFTER_S)


def _import_of(log: str) -> Import:
    # The last line may be half written.
    for line in map(json.loads, log.rpartition("\n")[0].splitlines()):
        if line["event"].startswith("records imported"):
            return Import(line["records"], line["seconds"])
    raise AssertionError(f"no import has ended:\n{log[-2000:]}")


def _watch(etcd: Any, key: str) -> queue.Queue[float]:
    """Return a queue that gets the time at which a key is written, once etcd watches it."""
    arrived: queue.Queue[float] = queue.Queue()
    etcd.add_watch_callback(key, lambda _reply: arrived.put(time.perf_counter()))
    return arrived
