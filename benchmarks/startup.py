"""A service that starts with an event waiting for it, and what its log tells of the import."""

from __future__ import annotations

import json
import queue
import time
import uuid
from collections.abc import Sequence
from typing import NamedTuple

from harness.process import Child, resident_bytes
from harness.servers import Servers
from harness.wait import eventually

from .loading import Loader, body
from .progress import NotMeasuredError
from .subjects import Subject
from .watching import etcd_client, watch

NEW = "new-"
"""What the ids of events begin with that are no part of the history."""

_LOST_AFTER_S = 60.0
_SETTLES_IN_S = 1.0


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
    return body(f"{NEW}{uuid.uuid4()}")


def measure_start(servers: Servers, subject: Subject) -> Start:
    """Publish an event, start the service, and wait for the record and for the import's end.

    The record is seen by a watch that was opened before, so its way back counts too.
    """
    arrived_s: queue.Queue[float] = queue.Queue()

    def arrived(at_s: float, _keys: Sequence[bytes]) -> None:
        arrived_s.put(at_s)

    event = new_body()
    Loader(servers.rabbitmq.url, subject.queue, [event]).run()
    key = subject.records[0] + json.loads(event)["id"]
    with subject.process() as child:
        with etcd_client(servers) as etcd, watch(etcd, key, arrived):
            started_s = time.monotonic()
            child.start()
            try:
                recorded_s = arrived_s.get(timeout=_LOST_AFTER_S)
            except queue.Empty:
                raise NotMeasuredError(
                    f"the first event is not recorded:\n{child.output()}"
                ) from None
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
