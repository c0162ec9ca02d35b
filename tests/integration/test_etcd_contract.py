"""The etcd in memory is held to what a real etcd does: each test runs against both.

The unit tests and the simulation believe the one in memory; here is why they may. What transactions
do to revisions, versions and leases is held to it by random histories.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import pytest
from etcd3 import etcdrpc as pb
from grpc import StatusCode
from grpc.aio import AioRpcError

from idempotent_consumer.etcd import Client, EtcdError, Failure
from idempotent_consumer.service import real_system
from idempotent_consumer.settings import Settings
from idempotent_consumer.system import System
from idempotent_consumer.testing.etcd import MAX_LEASE_TTL_S, FakeEtcd, Store
from idempotent_consumer.testing.loop import Loop
from servers.servers import Servers
from servers.wait import eventually
from servers.web import fetch_json

MAX_TXN_OPS = 1024
_numbers = count(1)


def put(key: bytes, value: bytes, lease: int = 0) -> Any:
    """Return the operation that writes a key."""
    return pb.RequestOp(request_put=pb.PutRequest(key=key, value=value, lease=lease))


def get(key: bytes) -> Any:
    """Return the operation that reads a key."""
    return pb.RequestOp(request_range=pb.RangeRequest(key=key))


def unchanged(key: bytes, mod_revision: int) -> Any:
    """Return the comparison that holds while a key is at this revision."""
    return pb.Compare(
        result=pb.Compare.EQUAL, target=pb.Compare.MOD, key=key, mod_revision=mod_revision
    )


@dataclass
class Subject:
    """An etcd under test, and a prefix of the test's own in it."""

    settings: Settings
    system: System
    client: Client
    run: Callable[[Coroutine[Any, Any, Any]], Any]
    prefix: str
    eventually: Callable[[Callable[[], None]], None]
    revoke: Callable[[int], None]
    raise_alarm: Callable[[], None]
    end_alarm: Callable[[], None]
    compact: Callable[[], None]

    def call(self, method: str, request: Any) -> Any:
        """Return the reply to a request, or raise EtcdError."""
        return self.run(self.client.call(method, request))

    def key(self, name: str) -> bytes:
        """Return a key of the test's own."""
        return (self.prefix + name).encode()

    def txn(self, compare: Any = (), then: Any = (), otherwise: Any = ()) -> Any:
        """Do a transaction."""
        request = pb.TxnRequest(compare=compare, success=then, failure=otherwise)
        return self.call("Txn", request)

    def put(self, name: str, value: bytes = b"v", lease: int = 0) -> int:
        """Write a key, and return its revision."""
        return int(self.txn(then=[put(self.key(name), value, lease)]).header.revision)

    def delete(self, name: str, end: str = "") -> Any:
        """Delete a key or a range of them."""
        return self.txn(then=[self.deletion(name, end)])

    def deletion(self, name: str, end: str = "") -> Any:
        """Return the operation that deletes."""
        range_end = self.key(end) if end else b""
        return pb.RequestOp(
            request_delete_range=pb.DeleteRangeRequest(key=self.key(name), range_end=range_end)
        )

    def range(self, name: str = "", *, end: bytes | None = None, **options: Any) -> Any:
        """Read the keys from a name to the end of the prefix."""
        stop = self.prefix[:-1].encode() + b"0" if end is None else end
        return self.call("Range", pb.RangeRequest(key=self.key(name), range_end=stop, **options))

    def get(self, name: str) -> Any:
        """Return what a key holds, or None."""
        kvs = self.range(name, end=b"").kvs
        return kvs[0] if kvs else None

    def grant(self, ttl_s: int = 60) -> Any:
        """Grant a lease."""
        return self.call("LeaseGrant", pb.LeaseGrantRequest(TTL=ttl_s))

    def refuses(self, method: str, request: Any) -> EtcdError:
        """Return the error with which a request is refused."""
        with pytest.raises(EtcdError) as raised:
            self.call(method, request)
        return raised.value


@contextmanager
def in_memory() -> Iterator[Subject]:
    """Give the etcd in memory."""
    loop = Loop()
    store = Store(loop.time, MAX_TXN_OPS)
    settings = Settings()
    system = replace(real_system(), open_channel=FakeEtcd(loop.agenda, store).open_channel)

    def wait(assertion: Callable[[], None]) -> None:
        for _ in range(100):
            try:
                return assertion()
            except AssertionError:
                loop.advance(0.5)
        return assertion()

    def alarm(on: bool) -> Callable[[], None]:
        def switch() -> None:
            store.out_of_space = on

        return switch

    yield Subject(
        settings,
        system,
        Client(settings, system),
        loop.run_until_complete,
        "/contract/1/",
        wait,
        store.revoke,
        alarm(True),
        alarm(False),
        store.compact,
    )
    loop.kill()


@contextmanager
def real(servers: Servers) -> Iterator[Subject]:
    """Give the real one."""
    settings = Settings.from_environ({"ETCD_ENDPOINTS": servers.etcd.endpoint})
    system = real_system()

    def post(path: str, **body: str) -> Any:
        return fetch_json("POST", f"http://{servers.etcd.endpoint}/v3/{path}", body, timeout_s=10)

    def alarm(action: str) -> None:
        post("maintenance/alarm", action=action, memberID="1", alarm="NOSPACE")

    def compact() -> None:
        revision = post("kv/range", key="AA==")["header"]["revision"]
        post("kv/compaction", revision=revision)

    with asyncio.Runner() as runner:
        client = Client(settings, system)
        yield Subject(
            settings,
            system,
            client,
            runner.run,
            f"/contract/{next(_numbers)}/",
            eventually,
            lambda lease: post("lease/revoke", ID=str(lease)),
            lambda: alarm("ACTIVATE"),
            lambda: alarm("DEACTIVATE"),
            compact,
        )
        runner.run(client.close())


@pytest.fixture(params=["in memory", "real"])
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    """Give each of the two."""
    if request.param == "in memory":
        with in_memory() as found:
            yield found
        return
    servers: Servers = request.getfixturevalue("servers")
    servers.heal()
    with real(servers) as found:
        yield found


# Transactions.


COMPARISONS = [
    (target, result, name)
    for target in ("MOD", "CREATE", "VERSION", "VALUE")
    for result in ("EQUAL", "NOT_EQUAL", "GREATER", "LESS")
    for name in ("present", "absent")
]


@pytest.mark.parametrize("against", ["less", "equal", "greater"])
def test_every_comparison_means_the_same(subject: Subject, against: str) -> None:
    """Absent keys too: they compare as zeros, but have no value to compare."""
    revision = subject.put("present", b"m")
    offset = ["less", "equal", "greater"].index(against) - 1
    holds = {}
    for target, result, name in COMPARISONS:
        present = {"MOD": revision, "CREATE": revision, "VERSION": 1}.get(target, 0)
        base = present if name == "present" else 0
        field = target.lower() + ("_revision" if target in ("MOD", "CREATE") else "")
        wanted = bytes([ord("m") + offset]) if target == "VALUE" else base + offset
        compare = pb.Compare(
            key=subject.key(name),
            result=pb.Compare.CompareResult.Value(result),
            target=pb.Compare.CompareTarget.Value(target),
            **{field: wanted},
        )
        holds[target, result, name] = subject.txn([compare]).succeeded
    others = ("NOT_EQUAL", {"less": "GREATER", "greater": "LESS"}.get(against))
    expected = ("EQUAL",) if against == "equal" else others
    assert holds == {
        (target, result, name): result in expected and (target, name) != ("VALUE", "absent")
        for target, result, name in COMPARISONS
    }


@pytest.mark.parametrize("part", ["compare", "success", "failure"])
def test_each_part_of_a_transaction_has_the_bound_of_its_own(subject: Subject, part: str) -> None:
    def request(number: int) -> Any:
        keys = [subject.key(str(n)) for n in range(number)]
        operations = [unchanged(k, 0) if part == "compare" else put(k, b"v") for k in keys]
        return pb.TxnRequest(**{part: operations})

    full = request(MAX_TXN_OPS)
    full.failure.extend(get(subject.key("x")) for _ in range(MAX_TXN_OPS - len(full.failure)))
    subject.call("Txn", full)
    error = subject.refuses("Txn", request(MAX_TXN_OPS + 1))
    assert "too many operations" in str(error)


# Ranges.


def test_a_range_has_its_keys_in_order_and_says_what_it_leaves_out(subject: Subject) -> None:
    names = ["a", "a\0", "a/b", "aa", "b", "\x7f", "ä"]
    for name in reversed(names):
        subject.put(name)
    whole = subject.range()
    assert [kv.key for kv in whole.kvs] == [subject.key(name) for name in sorted(names)]
    assert (whole.count, whole.more) == (7, False)
    page = subject.range(limit=3)
    assert ([kv.key for kv in page.kvs], page.count, page.more) == (
        [subject.key(name) for name in sorted(names)[:3]],
        7,
        True,
    )
    assert not subject.range(limit=7).more
    rest = subject.range("a/b", limit=100)
    assert rest.count == 5


def test_a_range_can_leave_out_all_but_the_count(subject: Subject) -> None:
    subject.put("a")
    reply = subject.range(count_only=True)
    assert (reply.count, list(reply.kvs)) == (1, [])


def test_a_range_at_a_revision_shows_that_instant(subject: Subject) -> None:
    subject.put("a", b"old")
    then = subject.put("b")
    subject.put("a", b"new")
    subject.delete("b")
    subject.put("c")
    reply = subject.range(revision=then)
    assert [(kv.key, kv.value) for kv in reply.kvs] == [
        (subject.key("a"), b"old"),
        (subject.key("b"), b"v"),
    ]
    assert reply.header.revision == then + 3


def test_a_range_of_keys_can_be_deleted(subject: Subject) -> None:
    for name in "abcd":
        subject.put(name)
    reply = subject.delete("b", "d")
    assert reply.responses[0].response_delete_range.deleted == 2
    assert [kv.key for kv in subject.range().kvs] == [subject.key("a"), subject.key("d")]


# Leases.


def test_a_key_ends_with_its_lease(subject: Subject) -> None:
    lease = subject.grant(2)
    assert lease.TTL == 2
    subject.put("a", lease=lease.ID)
    subject.put("kept")
    assert subject.get("a").lease == lease.ID

    def gone() -> None:
        assert subject.get("a") is None

    subject.eventually(gone)
    assert subject.get("kept") is not None


@pytest.mark.parametrize(("ttl_s", "granted_s"), [(1, 2), (MAX_LEASE_TTL_S,) * 2])
def test_a_lease_has_a_least_and_a_longest_time_and_an_id_of_its_own(
    subject: Subject, ttl_s: int, granted_s: int
) -> None:
    lease = subject.grant(ttl_s)
    assert granted_s == lease.TTL
    error = subject.refuses("LeaseGrant", pb.LeaseGrantRequest(TTL=60, ID=lease.ID))
    assert "already exists" in str(error)


def test_an_unknown_lease_in_the_branch_not_taken_does_not_matter(subject: Subject) -> None:
    """So a duplicate is told as such although the lease has gone."""
    key = subject.key("a")
    subject.put("a")
    reply = subject.txn([unchanged(key, 0)], [put(key, b"v", 12345)], [get(key)])
    assert not reply.succeeded
    assert len(reply.responses[0].response_range.kvs) == 1


def test_keeping_a_lease_alive_renews_it_and_an_unknown_one_has_no_time(subject: Subject) -> None:
    """That is a reply, and no error."""
    lease = subject.grant(30).ID
    kept = subject.call("LeaseKeepAlive", pb.LeaseKeepAliveRequest(ID=lease))
    assert lease == kept.ID
    assert kept.TTL == 30
    unknown = subject.call("LeaseKeepAlive", pb.LeaseKeepAliveRequest(ID=12345))
    assert (unknown.ID, unknown.TTL) == (12345, 0)


# Refusals.


def test_an_etcd_without_space_writes_nothing_and_reads_everything(subject: Subject) -> None:
    subject.put("a")
    lease = subject.grant().ID
    key = subject.key("a")
    subject.raise_alarm()
    try:
        write = pb.TxnRequest(
            compare=[unchanged(key, 0)], success=[put(key, b"w")], failure=[get(key)]
        )
        errors = [
            subject.refuses("Txn", write),
            subject.refuses("LeaseGrant", pb.LeaseGrantRequest(TTL=60)),
        ]
        assert all("database space exceeded" in str(error) for error in errors)
        assert {error.failure for error in errors} == {Failure.UNKNOWN}
        assert subject.get("a").value == b"v"
        assert subject.txn(then=[get(key)]).succeeded
        alive = subject.call("LeaseKeepAlive", pb.LeaseKeepAliveRequest(ID=lease))
        assert alive.TTL == 60
    finally:
        subject.end_alarm()
    assert subject.put("a") > 0


INVALID, OUT_OF_RANGE = StatusCode.INVALID_ARGUMENT, StatusCode.OUT_OF_RANGE
TWICE = [put(b"/a", b"1"), put(b"/a", b"2")]
LEASELESS = [put(b"/a", b"1"), put(b"/b", b"1", 12345)]
FUTURE = pb.RangeRequest(key=b"a", revision=1 << 40)
TOO_LONG = pb.LeaseGrantRequest(TTL=MAX_LEASE_TTL_S + 1)
LOGIN = pb.AuthenticateRequest(name="root", password="x")
REFUSED = [
    ("Range", pb.RangeRequest(), INVALID, "key is not provided"),
    ("Range", FUTURE, OUT_OF_RANGE, "mvcc: required revision is a future revision"),
    ("Txn", pb.TxnRequest(success=[put(b"", b"v")]), INVALID, "key is not provided"),
    ("Txn", pb.TxnRequest(success=TWICE), INVALID, "duplicate key given in txn request"),
    ("Txn", pb.TxnRequest(failure=TWICE), INVALID, "duplicate key given in txn request"),
    ("Txn", pb.TxnRequest(success=LEASELESS), StatusCode.NOT_FOUND, "requested lease not found"),
    ("LeaseGrant", TOO_LONG, OUT_OF_RANGE, "too large lease TTL"),
    ("Authenticate", LOGIN, StatusCode.FAILED_PRECONDITION, "authentication is not enabled"),
]
GROUPS = {"LeaseGrant": "Lease", "Authenticate": "Auth"}
FAILURES = {
    "requested lease not found": Failure.LEASE_NOT_FOUND,
    "authentication is not enabled": Failure.AUTHENTICATION,
}
"""What the library takes such a refusal for, where it does not take it for a failure unknown."""


@pytest.mark.parametrize(("method", "request_", "code", "text"), REFUSED)
def test_a_refusal_has_its_code_and_its_text_and_writes_nothing(
    subject: Subject, method: str, request_: Any, code: StatusCode, text: str
) -> None:
    async def refuse() -> AioRpcError:
        channel = subject.system.open_channel(subject.settings, *subject.settings.etcd_endpoints[0])
        send = channel.unary_unary(
            f"/etcdserverpb.{GROUPS.get(method, 'KV')}/{method}",
            request_serializer=type(request_).SerializeToString,
            response_deserializer=bytes,
        )
        with pytest.raises(AioRpcError) as raised:
            await send(request_, timeout=5.0, metadata=())
        await channel.close()
        return raised.value

    before = subject.txn().header.revision
    error = subject.run(refuse())
    assert (error.code(), error.details()) == (code, f"etcdserver: {text}")
    assert subject.refuses(method, request_).failure is FAILURES.get(text, Failure.UNKNOWN)
    assert subject.txn().header.revision == before


# Watches.


def watched(subject: Subject, number: int, during: Callable[[], None], **options: Any) -> list[Any]:
    """Watch the test's keys, do something, and return what so many replies have told.

    Of each event: its kind, key, value and revision, and the value before.
    """

    async def watch() -> list[Any]:
        stop = subject.prefix[:-1].encode() + b"0"
        create = pb.WatchCreateRequest(key=subject.key(""), range_end=stop, **options)
        replies = subject.client.watch(pb.WatchRequest(create_request=create))
        created = await anext(replies)
        assert (created.created, list(created.events)) == (True, [])
        await asyncio.to_thread(during)
        return [event async for reply in aiter_of(replies, number) for event in reply.events]

    async def aiter_of(replies: Any, number: int) -> Any:
        for _ in range(number):
            yield await asyncio.wait_for(anext(replies), 10)

    return [
        (
            event.type,
            event.kv.key[len(subject.prefix) :],
            event.kv.value,
            event.kv.mod_revision,
            event.prev_kv.value,
        )
        for event in subject.run(watch())
    ]


def test_a_watch_from_a_revision_tells_everything_since(subject: Subject) -> None:
    subject.put("a", b"1")
    second = subject.put("a", b"2")
    subject.delete("a")
    told = watched(subject, 1, lambda: None, start_revision=second, prev_kv=True)
    assert told == [(0, b"a", b"2", second, b"1"), (1, b"a", b"", second + 1, b"2")]


def test_a_watch_of_deletions_tells_what_a_lease_takes_with_it(subject: Subject) -> None:
    lease = subject.grant().ID
    for name in "ab":
        last = subject.put(name, name.encode(), lease)
    revoke = partial(subject.revoke, lease)
    told = watched(
        subject, 1, revoke, prev_kv=True, filters=[pb.WatchCreateRequest.NOPUT], start_revision=last
    )
    assert sorted(told) == [(1, b"a", b"", last + 1, b"a"), (1, b"b", b"", last + 1, b"b")]


def test_what_is_compacted_can_be_neither_read_nor_watched(subject: Subject) -> None:
    first = subject.put("a", b"1")
    for value in (b"2", b"3"):
        last = subject.put("a", value)
    subject.compact()
    assert subject.refuses("Range", pb.RangeRequest(key=b"a", revision=first)).failure is (
        Failure.COMPACTED
    )
    with pytest.raises(EtcdError) as raised:
        watched(subject, 1, lambda: None, start_revision=first)
    assert raised.value.failure is Failure.COMPACTED
    assert subject.range(revision=last).count == 1


# Whatever is asked.


def random_txn(chance: random.Random, subject: Subject, seen: list[int], leases: list[int]) -> Any:
    """Return a transaction over five keys, with comparisons that often hold."""

    def key() -> bytes:
        return subject.key(chance.choice("abcde"))

    def operations() -> list[Any]:
        puts = {key(): chance.choice([0, *leases]) for _ in range(chance.randrange(3))}
        chosen = [put(k, b"%d" % chance.randrange(9), lease) for k, lease in puts.items()]
        chosen += [get(key()) for _ in range(chance.randrange(3))]
        if not puts and chance.random() < 0.5:
            chosen.append(subject.deletion(chance.choice("abcde")))
        chance.shuffle(chosen)
        return chosen

    compare = [
        unchanged(key(), chance.choice([0, 0, *seen[-3:]])) for _ in range(chance.randrange(3))
    ]
    return pb.TxnRequest(compare=compare, success=operations(), failure=operations())


def told(subject: Subject, reply: Any, base: int, leases: list[int]) -> Any:
    """Return a reply without what differs between two etcds: the first revision, and ids."""

    def kv_of(kv: Any) -> Any:
        lease = leases.index(kv.lease) if kv.lease else None
        return (
            kv.key[len(subject.prefix) :],
            kv.value,
            kv.version,
            kv.mod_revision - base,
            kv.create_revision - base,
            lease,
        )

    responses = [
        (
            r.WhichOneof("response"),
            r.response_delete_range.deleted,
            [kv_of(kv) for kv in r.response_range.kvs],
            r.response_range.count,
        )
        for r in reply.responses
    ]
    return reply.header.revision - base, reply.succeeded, responses


@pytest.mark.parametrize("seed", range(20))
def test_a_random_history_reads_the_same(seed: int, servers: Servers) -> None:
    """The same requests to both, and the same replies from both, to the last revision."""
    servers.heal()
    with in_memory() as fake, real(servers) as other:
        histories = [history(subject, seed) for subject in (fake, other)]
    assert histories[0] == histories[1]
    assert any(step[1] for step in histories[0])
    assert not all(step[1] for step in histories[0])


def history(subject: Subject, seed: int) -> list[Any]:
    """Do fifty requests, and return what each was answered."""
    chance, seen, steps = random.Random(seed), list[int](), list[Any]()
    leases = [subject.grant().ID for _ in range(3)]
    alive = list(leases)
    base = subject.txn().header.revision
    for _ in range(50):
        if len(alive) > 1 and chance.random() < 0.05:
            subject.revoke(alive.pop(chance.randrange(len(alive))))
        request = random_txn(chance, subject, seen, alive)
        reply = subject.call("Txn", request)
        seen.append(reply.header.revision)
        steps.append(told(subject, reply, base, leases))
    return steps
