"""The etcd in memory behind gRPC's interface: what becomes of requests, and watches.

What its data does is held to a real etcd in ``tests/integration/test_etcd_contract.py``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from etcd3 import etcdrpc as pb
from grpc import StatusCode
from grpc.aio import AioRpcError, UsageError

from idempotent_consumer import Settings
from idempotent_consumer.testing.etcd import (
    ANSWER_LOST,
    REQUEST_LOST,
    FakeEtcd,
    Fate,
    answered_late,
    refused,
)
from idempotent_consumer.testing.loop import Loop

TIMEOUT_S = 5.0


class Client:
    """A process with a channel to an etcd of its own."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.etcd = FakeEtcd(self.loop.agenda)
        self.store = self.etcd.store
        self.channel = self.etcd.open_channel(Settings(), "etcd", 2379)

    async def put(self, key: str) -> Any:
        put = pb.RequestOp(request_put=pb.PutRequest(key=key.encode(), value=b"v"))
        call = self.channel.unary_unary(
            "/etcdserverpb.KV/Txn",
            request_serializer=pb.TxnRequest.SerializeToString,
            response_deserializer=pb.TxnResponse.FromString,
        )
        return await call(pb.TxnRequest(success=[put]), timeout=TIMEOUT_S, metadata=(("a", "b"),))

    def outcome(self) -> tuple[Any, float]:
        """Put a key, and return what came of it and when."""

        async def put() -> tuple[Any, float]:
            try:
                return (await self.put("key")).succeeded, self.loop.time()
            except AioRpcError as error:
                return (error.code(), error.details()), self.loop.time()

        outcome: tuple[Any, float] = self.loop.run_until_complete(put())
        return outcome

    def watch(self, **options: Any) -> list[Any]:
        """Watch all keys; what is returned gets the replies, and the error at the end."""
        seen: list[Any] = []

        async def requests() -> AsyncIterator[Any]:
            create = pb.WatchCreateRequest(key=b"\0", range_end=b"\0", **options)
            yield pb.WatchRequest(create_request=create)
            await asyncio.Event().wait()

        async def watch() -> None:
            open_watch = self.channel.stream_stream(
                "/etcdserverpb.Watch/Watch",
                request_serializer=pb.WatchRequest.SerializeToString,
                response_deserializer=pb.WatchResponse.FromString,
            )
            try:
                replies = open_watch(requests(), metadata=())
                while True:
                    seen.append(await anext(replies))
            except AioRpcError as error:
                seen.append(error.code())

        self.loop.create_task(watch())
        self.loop.run_until_idle()
        return seen


@pytest.fixture
def client() -> Client:
    return Client()


TIMED_OUT = (StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")


@pytest.mark.parametrize(
    ("fate", "seen", "at_s", "applied"),
    [
        (Fate(), True, 0.0, True),
        (Fate(applies_s=1.0), True, 1.0, True),
        (answered_late(4.0), True, 4.0, True),
        (answered_late(6.0), TIMED_OUT, TIMEOUT_S, True),
        (Fate(None), TIMED_OUT, TIMEOUT_S, False),
        (REQUEST_LOST, TIMED_OUT, 0.0, False),
        (ANSWER_LOST, TIMED_OUT, 0.0, True),
        (
            refused("too many requests", StatusCode.RESOURCE_EXHAUSTED),
            (StatusCode.RESOURCE_EXHAUSTED, "etcdserver: too many requests"),
            0.0,
            False,
        ),
    ],
)
def test_a_request_meets_its_fate(
    client: Client, fate: Fate, seen: object, at_s: float, applied: bool
) -> None:
    client.etcd.script("Txn", fate)
    assert client.outcome() == (seen, at_s)
    assert (client.store.get("key") is not None) == applied
    assert client.outcome()[0] is True


def test_a_call_that_is_cancelled_applies_all_the_same(client: Client) -> None:
    client.etcd.fate = lambda _: Fate(2.0)
    task = client.loop.create_task(client.put("key"))
    client.loop.advance(1)
    task.cancel()
    client.loop.advance(1)
    assert task.cancelled()
    assert client.store.get("key") is not None


def test_closing_a_channel_cancels_what_is_under_way_and_refuses_what_follows(
    client: Client,
) -> None:
    client.etcd.fate = lambda _: Fate(None)
    task = client.loop.create_task(client.put("key"))
    seen = client.watch()
    client.loop.run_until_complete(client.channel.close())
    client.loop.run_until_idle()
    assert task.cancelled()
    assert seen[-1] is StatusCode.UNAVAILABLE
    with pytest.raises(UsageError):
        client.loop.run_until_complete(client.put("key"))


def events(replies: list[Any]) -> list[tuple[bytes, int, bytes]]:
    """Return what watch replies tell: key, revision, and the value before."""
    return [
        (event.kv.key, event.kv.mod_revision, event.prev_kv.value)
        for reply in replies
        for event in reply.events
    ]


def test_a_watch_hears_of_a_leases_end_when_it_comes(client: Client) -> None:
    lease = client.store.apply("LeaseGrant", pb.LeaseGrantRequest(TTL=10)).ID
    client.store.put("a", b"v", lease)
    seen = client.watch()
    client.loop.advance(9)
    assert events(seen) == []
    client.loop.advance(1)
    assert events(seen) == [(b"a", 3, b"")]


def test_progress_is_told_where_it_is_wanted(client: Client) -> None:
    wanting, other = client.watch(progress_notify=True), client.watch()
    client.store.put("a", b"v")
    client.store.progress()
    client.loop.run_until_idle()
    assert [len(seen) for seen in (wanting, other)] == [3, 2]
    assert (wanting[-1].header.revision, list(wanting[-1].events)) == (2, [])
