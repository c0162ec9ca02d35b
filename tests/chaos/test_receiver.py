"""`account` finds wrong calls, and the receiver sees when a call ends."""

import socket
from contextlib import closing
from urllib.parse import urlsplit

import pytest

from chaos.checks import becomes
from chaos.receiver import Call, Receiver, account


def call(key: str, began_s: float, ended_s: float | None, caller: str = "p0") -> Call:
    return Call(key, None, caller, began_s, ended_s)


def test_an_account_returns_the_repeats_that_have_a_cause() -> None:
    calls = [call("a", 1, 2), call("b", 1, 2), call("a", 3, 4, "p1")]
    assert account(calls, {"a", "b"}, lambda *pair: pair[0].caller == "p0") == {"a"}


@pytest.mark.parametrize(
    ("calls", "done", "found"),
    [
        ([call("a", 1, 2)], {"a", "b"}, "not called: {'b'}"),
        ([call("a", 1, 2)], set[str](), "not done: {'a'}"),
        ([call("a", 1, 2), call("a", 3, 4)], {"a"}, "without a cause"),
        ([call("a", 1, 3), call("a", 2, 4)], {"a"}, "at the same time"),
        ([call("a", 3, 4), call("a", 1, None)], {"a"}, "at the same time"),
    ],
)
def test_an_account_fails_for_wrong_calls(calls: list[Call], done: set[str], found: str) -> None:
    with pytest.raises(AssertionError, match=found):
        account(calls, done, lambda *_: found == "at the same time")


@pytest.mark.parametrize(("status", "accepted"), [(204, {"e-1"}), (404, set[str]())])
def test_a_call_ends_when_it_is_answered(status: int, accepted: set[str]) -> None:
    """A call with another answer than 204 is not accepted."""
    with closing(Receiver(0.05)) as receiver:
        receiver.status = status
        with _post(receiver, "p0") as caller:
            assert caller.recv(64).split()[1] == str(status).encode()
        becomes(lambda: receiver.under_way("p0"), set[str]())
        (seen,) = receiver.calls
        assert receiver.accepted() == accepted
    assert (seen.key, seen.body, seen.caller, seen.answered) == ("e-1", {}, "p0", True)
    assert seen.ended_s is not None
    assert seen.ended_s >= seen.began_s + 0.05


def test_a_held_call_ends_when_its_caller_hangs_up_and_others_are_let_through() -> None:
    with closing(Receiver(0.05)) as receiver:
        receiver.hold()
        receiver.let_through("p1")
        callers = {name: _post(receiver, name) for name in ("p0", "p1")}
        becomes(lambda: [each.answered for each in receiver.calls if each.caller == "p1"], [True])
        assert receiver.under_way("p0") == {"e-1"}
        callers["p0"].close()
        becomes(lambda: receiver.under_way("p0"), set[str]())
        assert {each.caller: each.answered for each in receiver.calls} == {"p0": False, "p1": True}
        callers["p1"].close()


def _post(receiver: Receiver, caller: str) -> socket.socket:
    """Send a notification and leave the answer unread."""
    url = urlsplit(receiver.url_for(caller))
    connection = socket.create_connection((url.hostname, url.port or 0))
    head = f"POST {url.path} HTTP/1.1\r\nIdempotency-Key: e-1\r\nContent-Length: 2\r\n\r\n"
    connection.sendall(head.encode() + b"{}")
    return connection
