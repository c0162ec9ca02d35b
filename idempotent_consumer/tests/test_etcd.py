"""etcd's client: what it takes a failure for, and which member it asks next."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
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
LEADERLESS = Fate(None, error=NO_LEADER)
SILENCE = Fate(None)
RANGE = RangeRequest(key=b"key")
WATCH = WatchRequest(create_request=WatchCreateRequest(key=b"key"))


class AuthenticatingStore(fake.Store):
    """An etcd's data with users. ``token`` is the valid one."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        super().__init__(now_s)
        self.token = ""
        self.logins: list[tuple[str, str]] = []

    def _authenticate(self, request: Any) -> Any:
        self.logins.append((request.name, request.password))
        self.token = f"token {len(self.logins)}"
        return AuthenticateResponse(token=self.token)


class Member(fake.FakeEtcd):
    """A member of a cluster. Its revision is its port."""

    def __init__(self, agenda: Agenda, port: int) -> None:
        self.users = AuthenticatingStore(agenda.time)
        super().__init__(agenda, self.users)
        self.store.wipe(port)
        self.leaderless = False
        self.fate = self._fate

    def _fate(self, call: Call) -> Fate:
        if self.leaderless and ("hasleader", "true") in call.metadata:
            return LEADERLESS
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
        endpoints = [("etcd", 2 + number) for number in range(len(self.members))]
        return client_of(endpoints, self._open, random, **login)

    def ask(self, client: Client | None = None) -> int:
        """Return the port of the member that answers. Raises EtcdError."""
        reply = self.loop.run_until_complete((client or self.client).call("Range", RANGE))
        return int(reply.header.revision)

    def _open(self, settings: Settings, host: str, port: int) -> fake.FakeChannel:
        self.opened.append(port)
        return self.members[port - 2].open_channel(settings, host, port)


def client_of(
    endpoints: Sequence[tuple[str, int]], opening: Any, random: Random, **login: str
) -> Client:
    """Return a client that opens its channels with ``opening``."""
    settings = Settings(etcd_endpoints=tuple(endpoints), **login)  # type: ignore[arg-type]
    return Client(settings, System(None, opening, lambda: 0.0, random, Threads))  # type: ignore[arg-type]


class FirstOf(Random):
    """Draws the first number of a range."""

    def randrange(self, *_: Any) -> int:
        return 0


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
def test_a_failure_is_classified_by_its_text(text: str, failure: Failure, hint: str) -> None:
    """The hint names the setting to look at. The integration tests compare the texts with etcd."""
    found, line = _classify(text)
    assert found is failure
    assert line
    assert line.endswith(" ".join(text.split()))
    assert hint in line.removesuffix(text)


# Which member is asked.


GONE = Fate(None, error=fake.CLOSED)
WITHOUT_DETAILS = Fate(None, error=grpc.aio.AioRpcError(StatusCode.UNAVAILABLE, (), ()))


@pytest.mark.parametrize(
    ("members", "fate", "why", "after_s"),
    [
        (3, LEADERLESS, "no leader", 0.0),
        (3, GONE, "Socket closed", 0.0),
        (2, WITHOUT_DETAILS, "UNAVAILABLE", 0.0),
        (2, SILENCE, "Deadline Exceeded", FAILOVER_TIMEOUT_S),
        # With no other member to ask, there is more time.
        (1, SILENCE, "Deadline Exceeded", CALL_TIMEOUT_S),
    ],
)
def test_after_a_failure_the_next_member_is_asked(
    members: int, fate: Fate, why: str, after_s: float
) -> None:
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


def test_calls_that_fail_together_go_on_by_one_member_only(cluster: Cluster) -> None:
    """As when several batches are under way and all of them miss their deadline."""
    cluster.members[0].fate = lambda _: SILENCE

    async def fail_together() -> int:
        calls = [cluster.client.call("Range", RANGE) for _ in range(4)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        return sum(isinstance(outcome, EtcdError) for outcome in outcomes)

    assert cluster.loop.run_until_complete(fail_together()) == 4
    assert cluster.ask() == 3
    assert cluster.members[2].calls == []
    cluster.members[0].fate = lambda _: fake.FINE
    cluster.members[1].leaderless = cluster.members[2].leaderless = True
    for _ in range(2):
        with pytest.raises(EtcdError, match="no leader"):
            cluster.ask()
    assert cluster.ask() == 2, "after the last member comes the first one"
    cluster.members[0].script("Range", Fate(None, 1.0, NO_LEADER), LEADERLESS)
    late = cluster.loop.create_task(cluster.client.call("Range", RANGE))
    for ask in (cluster.ask, cluster.ask, lambda: cluster.loop.run_until_complete(late)):
        with pytest.raises(EtcdError, match="no leader"):
            ask()
    cluster.members[2].leaderless = False
    assert cluster.ask() == 4, "the late failure was another member's"


def test_a_name_that_did_not_resolve_is_looked_up_by_a_new_channel() -> None:
    """The old channel would wait for up to two minutes before it looks the name up again."""
    cluster = Cluster(1)
    why = "DNS resolution failed for etcd:2: Domain name not found"
    fates = [fake.refused(why, StatusCode.UNAVAILABLE, answers_s) for answers_s in (1.0, 0.0)]
    cluster.members[0].script("Range", *fates)
    late = cluster.loop.create_task(cluster.client.call("Range", RANGE))
    with pytest.raises(EtcdError, match=why):
        cluster.ask()
    assert cluster.ask() == 2
    with pytest.raises(EtcdError, match=why):
        cluster.loop.run_until_complete(late)
    assert [cluster.ask(), *cluster.opened] == [2, 2, 2], "the late failure is the old channel's"


def test_after_a_watch_that_fails_the_next_asks_another_member(cluster: Cluster) -> None:
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

    assert cluster.loop.run_until_complete(watch()) == 3


def test_each_client_starts_with_a_random_member(cluster: Cluster) -> None:
    random = Random(1)
    assert {cluster.ask(cluster.client_of(random)) for _ in range(40)} == {2, 3, 4}


def test_after_an_expired_token_the_next_call_logs_in_again(cluster: Cluster) -> None:
    """On the same member: the others would refuse the token too."""
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
async def client_of_a_real_server(
    reply: Callable[[], Coroutine[Any, Any, Any]],
) -> AsyncIterator[Client]:
    """Give the client of a gRPC server that answers every Range with this."""

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
    client = client_of([("127.0.0.1", port)], open_channel, Random(1))
    yield client
    await client.close()
    await server.stop(None)


def test_a_call_whose_channel_is_closed_has_an_unknown_outcome_and_its_task_goes_on() -> None:
    """gRPC cancels such a call, which looks as if the task had been cancelled."""

    async def main() -> list[Any]:
        arrived = asyncio.Event()

        async def never() -> Any:
            arrived.set()
            await asyncio.get_running_loop().create_future()

        async with client_of_a_real_server(never) as client:
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


def test_a_proxy_in_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """If Docker is configured with one, every container has it in its environment."""
    for variable in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")

    async def answer() -> Any:
        return RangeResponse(count=7)

    async def main() -> list[Any]:
        async with client_of_a_real_server(answer) as client:
            calls = [client.call("Range", RANGE)]
            return list(await asyncio.gather(*calls, return_exceptions=True))

    assert asyncio.run(main()) == [RangeResponse(count=7)]


def test_etcds_messages_are_read_by_compiled_code() -> None:
    """Protobuf's pure Python takes four times the CPU, and nothing else shows that it is used."""
    assert api_implementation.Type() == "upb"
