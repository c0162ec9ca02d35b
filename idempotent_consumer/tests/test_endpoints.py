"""How calls go over from one etcd member to another, against members that are gRPC servers here."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import etcd3
import grpc
import pytest

from fakes.deadline import DEADLINE_S
from idempotent_consumer.ledger import messages as m
from idempotent_consumer.ledger.etcd import (
    CALL_TIMEOUT_S,
    FAILOVER_TIMEOUT_S,
    Etcd,
    EtcdError,
    Failure,
)
from idempotent_consumer.settings import Settings


class Member:
    """A member of a cluster that answers as it is told to."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.leaderless = self.silent = False
        self.asked = self.watches = 0
        self.token = ""
        self.logins: list[tuple[str, str]] = []
        self._going_on = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(8))
        self._server.add_generic_rpc_handlers((_Handler(self),))
        self.port: int = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def authenticate(self, request: Any, _context: Any) -> Any:
        """Give the token that every other call has to have from now on."""
        self.logins.append((request.name, request.password))
        self.token = f"token {len(self.logins)}"
        return m.AuthenticateResponse(token=self.token)

    def expire(self) -> None:
        """Know the token no more."""
        self.token = f"token {len(self.logins) + 1}"

    def range(self, _request: Any, context: Any) -> Any:
        """Answer with this member's number as the revision."""
        self.asked += 1
        self._refuse(context)
        if self.silent:
            self._going_on.wait()
        reply = m.RangeResponse()
        reply.header.revision = self.number
        return reply

    def watch(self, _requests: Any, context: Any) -> Iterator[Any]:
        """Answer that the watch is there, then nothing until the leader is lost."""
        self.watches += 1
        self._refuse(context)
        reply = m.WatchResponse(created=True)
        reply.header.revision = self.number
        yield reply
        self._going_on.wait()
        self._refuse(context)

    def lose_leader(self) -> None:
        """Refuse whoever wants a leader, and end the watches."""
        self.leaderless = True
        self._going_on.set()

    def stop(self) -> None:
        """End it, with everything that waits in it."""
        self._going_on.set()
        self._server.stop(None).wait()

    def _refuse(self, context: Any) -> None:
        metadata = context.invocation_metadata()
        if self.leaderless and ("hasleader", "true") in metadata:
            context.abort(grpc.StatusCode.UNAVAILABLE, "etcdserver: no leader")
        if self.token and ("token", self.token) not in metadata:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "etcdserver: invalid auth token")


class _Handler(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc is untyped here
    def __init__(self, member: Member) -> None:
        self._member = member

    def service(self, call: Any) -> Any:
        if call.method.endswith("/Range"):
            return grpc.unary_unary_rpc_method_handler(
                self._member.range, m.RangeRequest.FromString, m.RangeResponse.SerializeToString
            )
        if call.method.endswith("/Authenticate"):
            return grpc.unary_unary_rpc_method_handler(
                self._member.authenticate,
                m.AuthenticateRequest.FromString,
                m.AuthenticateResponse.SerializeToString,
            )
        return grpc.stream_stream_rpc_method_handler(
            self._member.watch, m.WatchRequest.FromString, m.WatchResponse.SerializeToString
        )


@pytest.fixture
def members() -> Iterator[list[Member]]:
    """Give three members, numbered from 1."""
    with ExitStack() as stack:
        made = [Member(number) for number in (1, 2, 3)]
        for member in made:
            stack.callback(member.stop)
        yield made


@pytest.fixture
def client(members: list[Member]) -> Iterator[Etcd]:
    """Give a client that begins with the first member, and is impatient."""
    made = Etcd(settings(members))
    made._current, made._timeout_s = 0, 0.3
    yield made
    made.close()


def settings(members: list[Member]) -> Settings:
    """Return the settings that name these members."""
    return Settings(etcd_endpoints=tuple(("127.0.0.1", member.port) for member in members))


def ask(client: Etcd) -> int:
    """Return the number of the member that answers; raises EtcdError."""
    reply = client.call_and_wait("Range", m.RangeRequest(key=b"key"))
    number: int = reply.header.revision
    return number


def test_a_member_without_a_leader_is_left_at_once(client: Etcd, members: list[Member]) -> None:
    members[0].leaderless = True
    with pytest.raises(EtcdError, match="no leader") as raised:
        ask(client)
    assert raised.value.failure is Failure.UNKNOWN
    assert [ask(client), ask(client)] == [2, 2]


def test_a_silent_member_is_left_after_the_deadline(client: Etcd, members: list[Member]) -> None:
    members[0].silent = True
    with pytest.raises(EtcdError, match="Deadline Exceeded"):
        ask(client)
    assert ask(client) == 2


def test_a_member_that_is_gone_is_left_at_once(client: Etcd, members: list[Member]) -> None:
    members[0].stop()
    with pytest.raises(EtcdError):
        ask(client)
    assert ask(client) == 2


def test_calls_that_fail_together_go_one_member_on_and_not_several(
    client: Etcd, members: list[Member]
) -> None:
    """A batch's four commits are under way at once, and all of them miss their deadline."""
    members[0].silent = True
    ended, failed = threading.Semaphore(0), []

    def answered(_reply: Any, error: EtcdError | None) -> None:
        failed.append(error)
        ended.release()

    for _ in range(4):
        client.call("Range", m.RangeRequest(key=b"key"), answered)
    for _ in range(4):
        assert ended.acquire(timeout=10)
    assert None not in failed
    assert ask(client) == 2
    assert members[2].asked == 0


def test_all_members_are_tried_in_turn_and_the_first_one_again(
    client: Etcd, members: list[Member]
) -> None:
    for member in members:
        member.leaderless = True
    for _ in range(3):
        with pytest.raises(EtcdError, match="no leader"):
            ask(client)
    assert [member.asked for member in members] == [1, 1, 1]
    members[0].leaderless = False
    assert ask(client) == 1


def test_a_watch_ends_with_its_members_leader_and_the_next_is_elsewhere(
    client: Etcd, members: list[Member]
) -> None:
    replies = client.watch(m.WatchRequest())
    assert next(replies).header.revision == 1
    members[0].lose_leader()
    with pytest.raises(EtcdError, match="no leader"):
        next(replies)
    assert next(client.watch(m.WatchRequest())).header.revision == 2


def test_one_endpoint_has_the_longer_deadline(members: list[Member]) -> None:
    """There is nobody else to ask, so haste gains nothing."""
    assert Etcd(settings(members[:1]))._timeout_s == CALL_TIMEOUT_S
    assert Etcd(settings(members))._timeout_s == FAILOVER_TIMEOUT_S < CALL_TIMEOUT_S


def test_the_first_member_asked_is_a_random_one(members: list[Member]) -> None:
    found = set()
    for _ in range(40):
        client = Etcd(settings(members))
        found.add(ask(client))
        client.close()
    assert found == {1, 2, 3}


def test_a_token_that_has_expired_is_dropped_and_the_next_call_logs_in_anew(
    members: list[Member],
) -> None:
    """Every other member would refuse it as well."""
    login = ("order", "hunter2")
    client = Etcd(replace(settings(members), etcd_user=login[0], etcd_password=login[1]))
    first = ask(client)
    member = members[first - 1]
    assert [ask(client), ask(client)] == [first, first]
    assert member.logins == [login]
    member.expire()
    with pytest.raises(EtcdError, match="invalid auth token") as raised:
        ask(client)
    assert raised.value.failure is Failure.AUTHENTICATION
    assert [ask(client), ask(client)] == [first, first]
    assert member.logins == [login, login]
    client.close()


def test_a_name_that_did_not_resolve_is_looked_up_by_a_new_channel(
    members: list[Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The channel that has not found it would not look again for up to two minutes."""
    found, made = dict[str, str](), []

    def endpoint(host: str, **options: Any) -> Any:
        made.append(etcd3_endpoint(host=found.get(host, host), **options))
        return made[-1]

    etcd3_endpoint = etcd3.Endpoint
    monkeypatch.setattr(etcd3, "Endpoint", endpoint)
    client = Etcd(Settings(etcd_endpoints=(("etcd..example", members[0].port),)))
    found["etcd..example"] = "127.0.0.1"
    with pytest.raises(EtcdError, match=r"etcd\.\.example"):
        ask(client)
    assert ask(client) == 1
    assert len(made) == 2
    with pytest.raises(ValueError, match="closed"):
        made[0].channel.unary_unary("/etcdserverpb.KV/Range")(b"", timeout=DEADLINE_S)
    client.close()
