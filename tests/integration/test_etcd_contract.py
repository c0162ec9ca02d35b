"""Sends the same requests to the etcd in memory and to a real one, and compares the replies.

So the unit tests and the simulation may rely on the one in memory. A scenario is a list of
requests, whose whole replies are compared. Facts on which the library relies are asserted as well.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import pytest
from etcd3 import etcdrpc as pb
from google.protobuf.json_format import MessageToDict

from idempotent_consumer.etcd import Client, EtcdError, Failure
from idempotent_consumer.service import real_system
from idempotent_consumer.settings import Settings
from idempotent_consumer.testing.etcd import MAX_LEASE_TTL_S, FakeEtcd, Store
from idempotent_consumer.testing.loop import Loop
from servers.etcd import EtcdClient
from servers.servers import Servers
from servers.wait import lasts

MAX_TXN_OPS = 1024
UNKNOWN_LEASE = 12345

Replies = list[Any]


@dataclass
class Subject:
    """An etcd under test. Both have the same keys, under one prefix, and the same leases."""

    client: Client
    run: Callable[[Coroutine[Any, Any, Any]], Any]
    revoke: Callable[[int], None]
    alarm: Callable[[str], None]
    compact: Callable[[], None]
    wait: Callable[[float], None]

    def __post_init__(self) -> None:
        self.base = self.run(self.client.call("Txn", pb.TxnRequest())).header.revision

    def key(self, name: str = "") -> bytes:
        return f"/contract/{name}".encode()

    @property
    def whole(self) -> dict[str, bytes]:
        """Return the range of all keys of the test."""
        return {"key": self.key(), "range_end": self.key()[:-1] + b"0"}

    def ask(self, method: str, **fields: Any) -> Any:
        """Return what the reply says; of a refusal, its meaning and its text."""
        request = getattr(pb, f"{method}Request")(**fields)
        try:
            return self.told(self.run(self.client.call(method, request)))
        except EtcdError as error:
            return error.failure, str(error).partition(": ")[2]  # After the endpoint.

    def txn(self, compare: Any = (), success: Any = (), failure: Any = ()) -> Any:
        return self.ask("Txn", compare=compare, success=success, failure=failure)

    def put(self, name: str, value: bytes = b"v", lease: int = 0) -> Any:
        """Return the operation that puts a key, under a lease if one is given."""
        request = pb.PutRequest(key=self.key(name), value=value, lease=lease)
        return pb.RequestOp(request_put=request)

    def get(self, name: str) -> Any:
        """Return the operation that reads a key."""
        return pb.RequestOp(request_range=pb.RangeRequest(key=self.key(name)))

    def delete(self, name: str, end: str = "") -> Any:
        """Return the operation that deletes a key, or a range of keys."""
        stop = self.key(end) if end else b""
        request = pb.DeleteRangeRequest(key=self.key(name), range_end=stop)
        return pb.RequestOp(request_delete_range=request)

    def unchanged(self, name: str, revision: int) -> Any:
        """Return the comparison that holds if a key is at this revision; 0 means absent."""
        at = revision and self.base + revision
        kind = {"result": pb.Compare.EQUAL, "target": pb.Compare.MOD}
        return pb.Compare(key=self.key(name), mod_revision=at, **kind)

    def watch(self, number: int, during: Callable[[], object] = int, **options: Any) -> Any:
        """Watch the test's keys, call `during`, and return so many events."""

        async def events() -> Replies:
            create = pb.WatchCreateRequest(**self.whole, **options)
            replies = self.client.watch(pb.WatchRequest(create_request=create))
            created = await anext(replies)
            assert (created.created, list(created.events)) == (True, [])
            await asyncio.to_thread(during)
            found: Replies = []
            while len(found) < number:
                found += (await asyncio.wait_for(anext(replies), 10)).events
            return [self.told(event) for event in found]

        try:
            return self.run(events())
        except EtcdError as error:
            return error.failure

    def told(self, message: Any) -> Any:
        """Return a message without what differs between two etcds, such as their first revision."""
        found = MessageToDict(message, preserving_proto_field_name=True)
        revision = found.pop("header", {}).get("revision", self.base)
        return {"header": int(revision) - self.base, **self._without_base(found)}

    def _without_base(self, found: Any, name: str = "") -> Any:
        if name.endswith("revision"):
            return int(found) - self.base
        if isinstance(found, list):
            return [self._without_base(each) for each in found]
        if isinstance(found, dict):
            # Replies within a transaction's reply may have a header, which nobody reads.
            parts = {name: part for name, part in found.items() if name != "header"}
            return {name: self._without_base(part, name) for name, part in parts.items()}
        return found


@contextmanager
def in_memory() -> Iterator[Subject]:
    loop, settings = Loop(), Settings()
    store = Store(loop.time, MAX_TXN_OPS)
    system = replace(real_system(), open_channel=FakeEtcd(loop.agenda, store).open_channel)

    def alarm(action: str) -> None:
        store.out_of_space = action == "ACTIVATE"

    client, run = Client(settings, system), loop.run_until_complete
    yield Subject(client, run, store.revoke, alarm, store.compact, loop.advance)
    loop.kill()


@contextmanager
def real(servers: Servers) -> Iterator[Subject]:
    operator = EtcdClient(servers.etcd.endpoint)

    def revoke(lease: int) -> None:
        operator.post("/lease/revoke", {"ID": str(lease)})

    def alarm(action: str) -> None:
        what = {"action": action, "memberID": "1", "alarm": "NOSPACE"}
        operator.post("/maintenance/alarm", what)

    def compact() -> None:
        operator.post("/kv/compaction", {"revision": str(operator.revision())})

    # From earlier tests; a lease that ends later would change the revisions.
    operator.delete("/contract/")
    for lease in operator.post("/lease/leases", {}).get("leases", ()):
        with suppress(OSError):  # It has just ended.
            revoke(int(lease["ID"]))
    with asyncio.Runner() as runner:
        settings = Settings.from_environ({"ETCD_ENDPOINTS": servers.etcd.endpoint})
        client = Client(settings, real_system())
        yield Subject(client, runner.run, revoke, alarm, compact, lasts)
        runner.run(client.close())


Scenario = Callable[[Subject], Replies]
Agree = Callable[[Scenario], Replies]


@pytest.fixture
def agree(servers: Servers) -> Iterator[Agree]:
    """Give a function that runs a scenario on both, and returns the replies of either."""
    servers.heal()
    with in_memory() as fake, real(servers) as other:

        def ask_both(scenario: Scenario) -> Replies:
            found, expected = scenario(fake), scenario(other)
            assert found == expected
            return found

        yield ask_both


COMPARISONS = [
    *product(
        ("MOD", "CREATE", "VERSION", "VALUE"),
        ("EQUAL", "NOT_EQUAL", "GREATER", "LESS"),
        ("present", "absent"),
        (-1, 0, 1),
    )
]


def test_every_comparison(agree: Agree) -> None:
    """With a lower, the same and a higher number. An absent key compares as 0, but has no value."""

    def compared(etcd: Subject, target: str, result: str, name: str, offset: int) -> Any:
        present = {"MOD": etcd.base + 1, "CREATE": etcd.base + 1, "VERSION": 1}.get(target, 0)
        field = target.lower() + ("_revision" if target in ("MOD", "CREATE") else "")
        number = (present if name == "present" else 0) + offset
        compare = pb.Compare(
            key=etcd.key(name),
            result=pb.Compare.CompareResult.Value(result),
            target=pb.Compare.CompareTarget.Value(target),
            **{field: bytes([ord("m") + offset]) if target == "VALUE" else number},
        )
        return etcd.txn([compare]).get("succeeded", False)

    def scenario(etcd: Subject) -> Replies:
        etcd.txn(success=[etcd.put("present", b"m")])
        return [compared(etcd, *comparison) for comparison in COMPARISONS]

    holds = dict(zip(COMPARISONS, agree(scenario), strict=True))
    assert holds["MOD", "EQUAL", "present", 0]
    assert holds["MOD", "EQUAL", "absent", 0]
    assert not any(held for of, held in holds.items() if (of[0], of[2]) == ("VALUE", "absent"))


def test_leases(agree: Agree) -> None:
    """Their time has a minimum and a maximum, an id is used once, and keys end with their lease."""

    def grant(etcd: Subject, number: int, ttl_s: int) -> Any:
        return etcd.ask("LeaseGrant", ID=number, TTL=ttl_s)

    def keep(etcd: Subject, lease: int) -> Any:
        return etcd.ask("LeaseKeepAlive", ID=lease)

    def scenario(etcd: Subject) -> Replies:
        answers = [
            grant(etcd, number, ttl_s)
            for number, ttl_s in ((1, 1), (2, 30), (3, MAX_LEASE_TTL_S), (3, 60))
        ]
        answers += [keep(etcd, 2), keep(etcd, UNKNOWN_LEASE)]
        answers.append(etcd.txn(success=[etcd.put("a", lease=1), etcd.put("kept", lease=2)]))
        # So a duplicate is recognised although its lease has ended.
        unknown = [etcd.put("a", lease=UNKNOWN_LEASE)]
        answers.append(etcd.txn([etcd.unchanged("a", 0)], unknown, [etcd.get("a")]))
        etcd.wait(4.0)  # The first has 2 s, and etcd checks leases twice a second.
        answers.append(etcd.ask("Range", **etcd.whole))
        return answers

    answers = agree(scenario)
    assert [answer["TTL"] for answer in answers[:3]] == ["2", "30", str(MAX_LEASE_TTL_S)]
    assert "already exists" in str(answers[3])
    assert "TTL" not in answers[5], "an unknown lease is no error, and has no time"
    assert answers[-1]["count"] == "1"


def test_an_etcd_without_space_writes_nothing_and_reads_everything(agree: Agree) -> None:
    def scenario(etcd: Subject) -> Replies:
        etcd.txn(success=[etcd.put("a")])
        etcd.ask("LeaseGrant", ID=1, TTL=60)
        etcd.alarm("ACTIVATE")
        try:
            answers = [
                etcd.txn([etcd.unchanged("a", 0)], [etcd.put("a", b"w")], [etcd.get("a")]),
                etcd.ask("LeaseGrant", ID=2, TTL=60),
                etcd.ask("Range", **etcd.whole),
                etcd.txn(success=[etcd.get("a")]),
                etcd.ask("LeaseKeepAlive", ID=1),
            ]
        finally:
            etcd.alarm("DEACTIVATE")
        return [*answers, etcd.txn(success=[etcd.put("a", b"w")])]

    refused = agree(scenario)[:2]
    assert {failure for failure, _ in refused} == {Failure.UNKNOWN}
    assert all("database space exceeded" in text for _, text in refused)


TWICE = [pb.RequestOp(request_put=pb.PutRequest(key=b"/a", value=value)) for value in (b"1", b"2")]
NAMELESS = [pb.RequestOp(request_put=pb.PutRequest(key=b"", value=b"v"))]
LEASELESS = pb.RequestOp(request_put=pb.PutRequest(key=b"/b", value=b"1", lease=UNKNOWN_LEASE))
READ = pb.RequestOp(request_range=pb.RangeRequest(key=b"/a"))
FULL = {part: [READ] * MAX_TXN_OPS for part in ("success", "failure")}
FULL["compare"] = [pb.Compare(key=b"/a", target=pb.Compare.MOD, mod_revision=0)] * MAX_TXN_OPS
REFUSED: list[tuple[str, dict[str, Any], Failure, str]] = [
    *(
        ("Txn", {part: [*full, full[0]]}, Failure.UNKNOWN, "too many operations")
        for part, full in FULL.items()
    ),
    ("Range", {}, Failure.UNKNOWN, "key is not provided"),
    ("Range", {"key": b"a", "revision": 1 << 40}, Failure.UNKNOWN, "is a future revision"),
    ("Txn", {"success": NAMELESS}, Failure.UNKNOWN, "key is not provided"),
    ("Txn", {"success": TWICE}, Failure.UNKNOWN, "duplicate key given in txn request"),
    ("Txn", {"failure": TWICE}, Failure.UNKNOWN, "duplicate key given in txn request"),
    ("Txn", {"success": [TWICE[0], LEASELESS]}, Failure.LEASE_NOT_FOUND, "lease not found"),
    ("LeaseGrant", {"TTL": MAX_LEASE_TTL_S + 1}, Failure.UNKNOWN, "too large lease TTL"),
    ("Authenticate", {"name": "a", "password": "x"}, Failure.AUTHENTICATION, "is not enabled"),
]


def test_refusals(agree: Agree) -> None:
    """Nothing is written. The limit is for each part of a transaction, not for their sum."""

    def scenario(etcd: Subject) -> Replies:
        asked = (etcd.ask(method, **fields) for method, fields, *_ in REFUSED)
        return [*asked, etcd.txn(**FULL)]

    *refusals, last = agree(scenario)
    for (failure, text), (*_, expected, part) in zip(refusals, REFUSED, strict=True):
        assert (failure, part in text) == (expected, True)
    assert last["header"] == 0


def test_watches(agree: Agree) -> None:
    """All changes since a revision, also the keys that end with a lease.

    A compacted revision can be neither read nor watched.
    """

    def scenario(etcd: Subject) -> Replies:
        etcd.ask("LeaseGrant", ID=1, TTL=60)
        for value in (b"1", b"2"):
            etcd.txn(success=[etcd.put("a", value)])
        etcd.txn(success=[etcd.delete("a")])
        etcd.txn(success=[etcd.put(name, lease=1) for name in "bc"])
        past = {"start_revision": etcd.base + 2, "prev_kv": True}
        ends = partial(etcd.revoke, 1)
        told = etcd.watch(3, ends, **past, filters=[pb.WatchCreateRequest.NOPUT])
        deleted = sorted(told, key=lambda event: event["kv"]["key"])
        since = etcd.watch(6, **past)
        etcd.compact()
        read = [etcd.ask("Range", **etcd.whole, revision=etcd.base + past) for past in (4, 5)]
        return [since, deleted, *read, etcd.watch(1, **past)]

    since, deleted, (failure, _), present, watched = agree(scenario)
    kinds = ["PUT", "DELETE", "PUT", "PUT", "DELETE", "DELETE"]
    assert [event.get("type", "PUT") for event in since] == kinds
    assert len(deleted) == 3
    assert (failure, watched) == (Failure.COMPACTED, Failure.COMPACTED)
    assert "count" not in present


KEYS = ["a", "a\0", "a/b", "aa", "\x7f", "ä"]
LIMITED: list[dict[str, Any]] = [{}, {"limit": 3}, {"limit": 100}, {"count_only": True}]


@pytest.mark.parametrize("seed", range(20))
def test_a_random_history(seed: int, agree: Agree) -> None:
    """Then past revisions are read: all keys in order, a limited number, and the count alone."""

    def scenario(etcd: Subject) -> Replies:
        steps = history(etcd, seed)
        ranges = [etcd.whole, {**etcd.whole, "key": etcd.key("a/b")}, {"key": etcd.key("a")}]
        revisions = [0, *(etcd.base + past for past in range(1, steps[-1]["header"] + 1, 7))]
        return steps + [
            etcd.ask("Range", **keys, revision=revision, **more)
            for keys, revision, more in product(ranges, revisions, LIMITED)
        ]

    answers = agree(scenario)
    assert {True, False} == {answer.get("succeeded", False) for answer in answers[:50]}
    assert len({answer.get("count") for answer in answers[50:]}) > 3
    assert any(answer.get("more") for answer in answers)


def history(etcd: Subject, seed: int) -> Replies:
    """Do fifty transactions on the keys, and return their replies."""
    chance, steps, alive = random.Random(seed), Replies(), [1, 2, 3]
    for lease in alive:
        etcd.ask("LeaseGrant", ID=lease, TTL=60)

    def operations() -> Replies:
        puts = {chance.choice(KEYS): chance.choice([0, *alive]) for _ in range(chance.randrange(3))}
        chosen = [etcd.put(k, b"%d" % chance.randrange(9), lease) for k, lease in puts.items()]
        chosen += [etcd.get(chance.choice(KEYS)) for _ in range(chance.randrange(3))]
        if not puts and chance.random() < 0.5:
            chosen.append(etcd.delete(chance.choice(KEYS), chance.choice(["", "b"])))
        chance.shuffle(chosen)
        return chosen

    for _ in range(50):
        if len(alive) > 1 and chance.random() < 0.05:
            etcd.revoke(alive.pop(chance.randrange(len(alive))))
        seen = [0, 0, *(step["header"] for step in steps[-3:])]
        compare = [
            etcd.unchanged(chance.choice(KEYS), chance.choice(seen))
            for _ in range(chance.randrange(3))
        ]
        steps.append(etcd.txn(compare, operations(), operations()))
    return steps
