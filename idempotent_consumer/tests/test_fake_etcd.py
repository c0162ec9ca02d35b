"""The etcd in memory behind gRPC's interface: the fate of requests, and watches.

``tests/integration/test_etcd_contract.py`` compares its data with a real etcd.
"""

from __future__ import annotations

from typing import Any

import pytest
from etcd3 import etcdrpc as pb
from grpc import StatusCode

from fakes.ledger import system_of
from idempotent_consumer.etcd import CALL_TIMEOUT_S, Client, EtcdError, put
from idempotent_consumer.testing.etcd import (
    ANSWER_LOST,
    REQUEST_LOST,
    FakeEtcd,
    Fate,
    refused,
)
from idempotent_consumer.testing.loop import Loop
from idempotent_consumer.testing.process import SETTINGS


class Process:
    """A process with an etcd of its own, and the library's client."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.etcd = FakeEtcd(self.loop.agenda)
        self.store, self.client = self.etcd.store, Client(SETTINGS, system_of(self.etcd))

    async def put(self) -> tuple[str, float]:
        """Put a key, and return the outcome and its time."""
        request = pb.TxnRequest()
        put(request.success, b"key", b"v")
        try:
            await self.client.call("Txn", request)
        except EtcdError as error:
            return str(error), self.loop.time()
        return "succeeded", self.loop.time()

    def watch(self, **options: Any) -> list[Any]:
        """Watch all keys; the list that is returned gets the replies and the final error."""
        seen: list[Any] = []

        async def watch() -> None:
            create = pb.WatchCreateRequest(key=b"\0", range_end=b"\0", **options)
            replies = self.client.watch(pb.WatchRequest(create_request=create))
            try:
                while True:
                    seen.append(await anext(replies))
            except EtcdError as error:
                seen.append(str(error))

        self.loop.create_task(watch())
        self.loop.run_until_idle()
        return seen


@pytest.fixture
def process() -> Process:
    return Process()


TIMED_OUT = "etcd at localhost:2379: Deadline Exceeded"
TOO_MANY = refused("too many requests", StatusCode.RESOURCE_EXHAUSTED)


@pytest.mark.parametrize(
    ("fate", "seen", "at_s", "applied"),
    [
        (Fate(), "succeeded", 0.0, True),
        (Fate(applies_s=1.0), "succeeded", 1.0, True),
        (Fate(answers_s=4.0), "succeeded", 4.0, True),
        (Fate(answers_s=6.0), TIMED_OUT, CALL_TIMEOUT_S, True),
        (Fate(None), TIMED_OUT, CALL_TIMEOUT_S, False),
        (REQUEST_LOST, TIMED_OUT, 0.0, False),
        (ANSWER_LOST, TIMED_OUT, 0.0, True),
        (TOO_MANY, "etcd at localhost:2379: etcdserver: too many requests", 0.0, False),
    ],
)
def test_a_request_meets_its_fate(
    process: Process, fate: Fate, seen: str, at_s: float, applied: bool
) -> None:
    process.etcd.script("Txn", fate)
    assert process.loop.run_until_complete(process.put()) == (seen, at_s)
    assert (process.store.get("key") is not None) == applied
    assert process.loop.run_until_complete(process.put())[0] == "succeeded"


def test_a_call_that_is_cancelled_applies_nevertheless(process: Process) -> None:
    process.etcd.fate = lambda _: Fate(2.0)
    task = process.loop.create_task(process.put())
    process.loop.advance(1)
    task.cancel()
    process.loop.advance(1)
    assert task.cancelled()
    assert process.store.get("key") is not None


def test_a_closed_channel_cancels_its_calls_and_refuses_new_ones(process: Process) -> None:
    process.etcd.fate = lambda _: Fate(None)
    task, seen = process.loop.create_task(process.put()), process.watch()
    process.loop.run_until_complete(process.client.close())
    after, _ = process.loop.run_until_complete(process.put())
    process.loop.run_until_idle()
    assert task.result()[0] == "the channel was closed"
    assert seen[-1].endswith("Socket closed")
    assert after.endswith("Channel is closed.")


def test_a_watch_hears_of_the_end_of_a_lease_in_time(process: Process) -> None:
    granting = process.client.call("LeaseGrant", pb.LeaseGrantRequest(TTL=10))
    process.store.put("a", b"v", process.loop.run_until_complete(granting).ID)
    seen = process.watch()
    process.loop.advance(9)
    assert [list(reply.events) for reply in seen] == [[]]
    process.loop.advance(1)
    (event,) = seen[1].events
    assert (event.kv.key, event.kv.mod_revision) == (b"a", 3)


def test_progress_is_sent_to_watches_that_want_it(process: Process) -> None:
    wanting, other = process.watch(progress_notify=True), process.watch()
    process.store.put("a", b"v")
    process.store.progress()
    process.loop.run_until_idle()
    assert [len(seen) for seen in (wanting, other)] == [3, 2]
    assert (wanting[-1].header.revision, list(wanting[-1].events)) == (2, [])
