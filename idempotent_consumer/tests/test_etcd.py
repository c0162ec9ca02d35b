"""etcd's client: what a failure is taken for, and which member is asked after it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import grpc
import pytest
from etcd3.etcdrpc import (
    AuthenticateResponse,
    RangeRequest,
    RangeResponse,
    WatchCreateRequest,
    WatchRequest,
    WatchResponse,
)
from google.protobuf.internal import api_implementation
from grpc import StatusCode

from idempotent_consumer.etcd import (
    CALL_TIMEOUT_S,
    FAILOVER_TIMEOUT_S,
    Client,
    EtcdError,
    Failure,
    _classify,
    open_channel,
)
from idempotent_consumer.settings import Settings
from idempotent_consumer.system import System
from idempotent_consumer.testing import etcd as fake
from idempotent_consumer.testing.etcd import Call, Fate
from idempotent_consumer.testing.loop import Agenda, Loop, Threads

NO_LEADER = fake.refusal(StatusCode.UNAVAILABLE, "no leader")
SILENCE = Fate(None)
RANGE = RangeRequest(key=b"key")
WATCH = WatchRequest(create_request=WatchCreateRequest(key=b"key"))


class AuthenticatingStore(fake.Store):
    """An etcd's data with users; ``token`` is the one that is valid."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        super().__init__(now_s)
        self.token = ""
        self.logins: list[tuple[str, str]] = []

    def _authenticate(self, request: Any) -> Any:
        self.logins.append((request.name, request.password))
        self.token = f"token {len(self.logins)}"
        return AuthenticateResponse(token=self.token)


class Member(fake.FakeEtcd):
    """A member of a cluster that answers as it is told to. Its revision is its port."""

    def __init__(self, agenda: Agenda, port: int) -> None:
        self.users = AuthenticatingStore(agenda.time)
        super().__init__(agenda, self.users)
        while self.store.revision < port:
            self.store.put("/elsewhere", b"")
        self.leaderless = False
        self.fate = self._fate

    def _fate(self, call: Call) -> Fate:
        if self.leaderless and ("hasleader", "true") in call.metadata:
            return Fate(None, error=NO_LEADER)
        token = self.users.token
        if token and call.method != "Authenticate" and ("token", token) not in call.metadata:
            return fake.refused("invalid auth token", StatusCode.UNAUTHENTICATED)
        return fake.FINE


class Cluster:
    """Members at the ports from 2 on, and a client that asks the first one first."""

    def __init__(self, members: int = 3) -> None:
        self.loop, self.opened = Loop(), list[int]()
        self.members = [Member(self.loop.agenda, port) for port in range(2, 2 + members)]
        self.client = self.client_of(FirstOf())

    def client_of(self, random: Random, **login: str) -> Client:
        endpoints = tuple(("etcd", 2 + number) for number in range(len(self.members)))
        settings = Settings(etcd_endpoints=endpoints, **login)  # type: ignore[arg-type]
        return Client(settings, System(None, self._open, self.loop.time, random, Threads))  # type: ignore[arg-type]

    def ask(self, client: Client | None = None) -> int:
        """Return the port of the member that answers. Raises EtcdError."""
        return self.run(revision(client or self.client))

    def run(self, work: Awaitable[int]) -> int:
        answer: int = self.loop.run_until_complete(work)
        return answer

    def _open(self, settings: Settings, host: str, port: int) -> fake.FakeChannel:
        self.opened.append(port)
        return self.members[port - 2].open_channel(settings, host, port)


class FirstOf(Random):
    """Draws the first of all there are."""

    def randrange(self, *_: Any) -> int:
        return 0


async def revision(client: Client) -> int:
    reply = await client.call("Range", RANGE)
    found: int = reply.header.revision
    return found


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


# What a failure means.


@pytest.mark.parametrize(
    ("text", "failure", "hint"),
    [
        ("etcdserver: requested lease not found", Failure.LEASE_NOT_FOUND, ""),
        ("etcdserver: mvcc: required revision has been compacted", Failure.COMPACTED, ""),
        ("etcdserver: invalid auth token", Failure.AUTHENTICATION, ""),
        ("etcdserver: user name is empty", Failure.AUTHENTICATION, "ETCD_USER is unset"),
        ("etcdserver: permission denied", Failure.AUTHENTICATION, ""),
        ("etcdserver: authentication failed, invalid user ID", Failure.AUTHENTICATION, ""),
        ("etcdserver: authentication is not enabled", Failure.AUTHENTICATION, "ETCD_USER is set"),
        ("etcdserver: mvcc: database space exceeded", Failure.UNKNOWN, ""),
        ("etcdserver: duplicate key given in txn request", Failure.UNKNOWN, ""),
        ("etcdserver: too many operations in txn", Failure.UNKNOWN, "ETCD_MAX_TXN_OPS"),
        ("etcdserver: request is too large", Failure.UNKNOWN, "--max-request-bytes"),
        ("Received message larger than max (2 vs. 1)", Failure.TOO_LARGE, ""),
        ("grpc: received message larger than max (2 vs. 1)", Failure.TOO_LARGE, "--max-request"),
        ("failed to connect to all addresses; last error:\n refused", Failure.UNKNOWN, ""),
        ("Tls: CERTIFICATE_VERIFY_FAILED: unable", Failure.UNKNOWN, "ETCD_CA_CERT"),
        ("SSL_ERROR_SSL: WRONG_VERSION_NUMBER: OK", Failure.UNKNOWN, "ETCD_CA_CERT is set"),
        ("Hostname Verification Check failed.", Failure.UNKNOWN, "ETCD_ENDPOINTS"),
        ("ipv4:127.0.0.1:2379: Unwrap (TSI_DATA_CORRUPTED)", Failure.UNKNOWN, "ETCD_CERT"),
        ("ipv4:127.0.0.1:2379: Socket closed", Failure.UNKNOWN, "ETCD_CA_CERT"),
        ("", Failure.UNKNOWN, ""),
    ],
)
def test_an_error_of_etcds_is_known_by_its_text(text: str, failure: Failure, hint: str) -> None:
    """None of them says that the request did not apply; some come with the setting to look at.

    The texts are those of real servers, in the integration tests.
    """
    found, line = _classify(text)
    assert found is failure
    assert line
    assert line.endswith(" ".join(text.split()))
    assert hint in line.removesuffix(text)


# Which member is asked.


GONE = Fate(None, error=fake.CLOSED)
LEADERLESS = Fate(None, error=NO_LEADER)
WORDLESS = Fate(None, error=grpc.aio.AioRpcError(StatusCode.UNAVAILABLE, (), ()))


@pytest.mark.parametrize(
    ("members", "fate", "why", "after_s"),
    [
        (3, LEADERLESS, "no leader", 0.0),
        (3, GONE, "Socket closed", 0.0),
        (2, WORDLESS, "UNAVAILABLE", 0.0),
        (2, SILENCE, "Deadline Exceeded", FAILOVER_TIMEOUT_S),
        # There is nobody else to ask, so haste gains nothing.
        (1, SILENCE, "Deadline Exceeded", CALL_TIMEOUT_S),
    ],
)
def test_a_member_that_fails_is_left(members: int, fate: Fate, why: str, after_s: float) -> None:
    cluster = Cluster(members)
    cluster.members[0].fate = lambda _: fate
    with pytest.raises(EtcdError, match=f"^etcd at etcd:2: .*{why}") as raised:
        cluster.ask()
    assert raised.value.failure is Failure.UNKNOWN
    assert cluster.loop.time() == after_s
    cluster.members[0].fate = lambda _: fake.FINE
    assert [cluster.ask(), cluster.ask()] == ([3, 3] if members > 1 else [2, 2])
    assert cluster.opened == ([2, 3] if members > 1 else [2])
    assert CALL_TIMEOUT_S > FAILOVER_TIMEOUT_S


def test_calls_that_fail_together_go_one_member_on_and_not_several(cluster: Cluster) -> None:
    """Four batches are under way at once, and all of them miss their deadline."""
    cluster.members[0].fate = lambda _: SILENCE

    async def fail_together() -> int:
        calls = [cluster.client.call("Range", RANGE) for _ in range(4)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        return sum(isinstance(outcome, EtcdError) for outcome in outcomes)

    assert cluster.run(fail_together()) == 4
    assert cluster.ask() == 3
    assert cluster.members[2].calls == []
    cluster.members[0].fate = lambda _: fake.FINE
    cluster.members[1].leaderless = cluster.members[2].leaderless = True
    for _ in range(2):
        with pytest.raises(EtcdError, match="no leader"):
            cluster.ask()
    assert cluster.ask() == 2, "it is the first one's turn again"
    cluster.members[0].script("Range", Fate(None, 1.0, NO_LEADER), LEADERLESS)
    late = cluster.loop.create_task(cluster.client.call("Range", RANGE))
    for call in (revision(cluster.client), revision(cluster.client), late):
        with pytest.raises(EtcdError, match="no leader"):
            cluster.run(call)
    cluster.members[2].leaderless = False
    assert cluster.ask() == 4, "what fails late was not asked of the one whose turn it is"


def test_a_name_that_did_not_resolve_is_looked_up_by_a_new_channel() -> None:
    """The channel that has not found it would not look again for up to two minutes."""
    cluster = Cluster(1)
    why = "DNS resolution failed for etcd:2: Domain name not found"
    fates = [fake.refused(why, StatusCode.UNAVAILABLE, answers_s) for answers_s in (1.0, 0.0)]
    cluster.members[0].script("Range", *fates)
    late = cluster.loop.create_task(cluster.client.call("Range", RANGE))
    with pytest.raises(EtcdError, match=why):
        cluster.ask()
    assert cluster.ask() == 2
    with pytest.raises(EtcdError, match=why):
        cluster.run(late)
    assert [cluster.ask(), *cluster.opened] == [2, 2, 2], "the late failure is the old channel's"


def test_a_watch_ends_with_its_members_leader_and_the_next_is_elsewhere(cluster: Cluster) -> None:
    refused = WatchResponse(canceled=True, cancel_reason="etcdserver: permission denied")

    async def watch() -> int:
        replies = cluster.client.watch(WATCH)
        assert (await anext(replies)).header.revision == 2
        cluster.members[0].leaderless = True
        cluster.members[0].store.end_watches(NO_LEADER)
        with pytest.raises(EtcdError, match="no leader"):
            await anext(replies)
        replies = cluster.client.watch(WATCH)
        found: int = (await anext(replies)).header.revision
        cluster.members[1].store.watches[0].deliver(refused)
        with pytest.raises(EtcdError, match="permission denied"):
            await anext(replies)
        return found

    assert cluster.run(watch()) == 3


def test_the_first_member_asked_is_a_random_one(cluster: Cluster) -> None:
    random = Random(1)
    assert {cluster.ask(cluster.client_of(random)) for _ in range(40)} == {2, 3, 4}


def test_after_an_expired_token_the_next_call_logs_in_again(cluster: Cluster) -> None:
    """Every other member would refuse it as well."""
    login = ("order", "hunter2")
    client = cluster.client_of(FirstOf(), etcd_user=login[0], etcd_password=login[1])
    users = cluster.members[0].users
    assert [cluster.ask(client), cluster.ask(client)] == [2, 2]
    assert users.logins == [login]
    users.token += " has expired"
    with pytest.raises(EtcdError, match="invalid auth token") as raised:
        cluster.ask(client)
    assert raised.value.failure is Failure.AUTHENTICATION
    assert [cluster.ask(client), cluster.ask(client)] == [2, 2]
    assert users.logins == [login, login]


# What gRPC itself does.


@pytest.mark.parametrize(("host", "target"), [("etcd", "etcd:2379"), ("::1", "[::1]:2379")])
def test_a_members_address_is_written_as_grpc_reads_it(
    monkeypatch: pytest.MonkeyPatch, host: str, target: str
) -> None:
    monkeypatch.setattr(grpc.aio, "insecure_channel", lambda target, _options: target)
    opened: object = open_channel(Settings(), host, 2379)
    assert opened == target


@asynccontextmanager
async def real_server(reply: Callable[[], Coroutine[Any, Any, Any]]) -> AsyncIterator[int]:
    """Give the port of a gRPC server that answers every Range with this."""

    async def answer(_request: Any, _context: Any) -> Any:
        return await reply()

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(
        answer, RangeRequest.FromString, RangeResponse.SerializeToString
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("etcdserverpb.KV", {"Range": handler}),)
    )
    port: int = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield port
    await server.stop(None)


def test_a_call_whose_channel_is_closed_has_an_unknown_outcome_and_its_task_goes_on() -> None:
    """gRPC cancels such a call, which looks as if its task were cancelled, and is not."""

    async def main() -> list[Any]:
        arrived = asyncio.Event()

        async def never() -> Any:
            arrived.set()
            await asyncio.get_running_loop().create_future()

        async with real_server(never) as port:
            system = System(None, open_channel, lambda: 0.0, Random(1), Threads)  # type: ignore[arg-type]
            client = Client(Settings(etcd_endpoints=(("127.0.0.1", port),)), system)
            under_way = asyncio.create_task(client.call("Range", RANGE))
            await arrived.wait()
            cancelled = asyncio.create_task(client.call("Range", RANGE))
            await asyncio.sleep(0)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            await client.close()
            after = (client.call("Range", RANGE), anext(client.watch(WATCH)))
            return list(await asyncio.gather(under_way, *after, return_exceptions=True))

    for outcome in asyncio.run(main()):
        assert isinstance(outcome, EtcdError)
        assert outcome.failure is Failure.UNKNOWN
        assert "closed" in str(outcome)


def test_no_proxy_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that Docker is configured with is in every container's environment."""
    for variable in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")

    async def answer() -> Any:
        return RangeResponse(count=7)

    async def main() -> list[Any]:
        async with real_server(answer) as port:
            system = System(None, open_channel, lambda: 0.0, Random(1), Threads)  # type: ignore[arg-type]
            client = Client(Settings(etcd_endpoints=(("127.0.0.1", port),)), system)
            outcomes = await asyncio.gather(client.call("Range", RANGE), return_exceptions=True)
            await client.close()
            return list(outcomes)

    assert asyncio.run(main()) == [RangeResponse(count=7)]


def test_etcds_messages_are_read_by_compiled_code() -> None:
    """Protobuf's pure Python costs four times the CPU, and nothing else tells that it is used."""
    assert api_implementation.Type() == "upb"
