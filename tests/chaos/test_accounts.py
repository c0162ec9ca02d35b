"""The account of calls finds what it is there to find, and the sink sees when a call ends."""

import socket
from urllib.parse import urlsplit

import pytest

from chaos.accounts import account
from chaos.timed_sink import Span, TimedSink, listen_timed
from integration.judging import becomes
from servers.web import fetch_json


def call(key: str, began_s: float, ended_s: float | None, caller: str = "p0") -> Span:
    """Return a call."""
    return Span(key, caller, began_s, ended_s)


def test_an_account_returns_what_was_repeated_for_a_cause() -> None:
    spans = [call("a", 1, 2), call("b", 1, 2), call("a", 3, 4, "p1")]
    assert account(spans, {"a", "b"}, lambda *calls: calls[0].caller == "p0") == {"a"}


@pytest.mark.parametrize(
    ("spans", "done", "found"),
    [
        ([call("a", 1, 2)], {"a", "b"}, "not called: {'b'}"),
        ([call("a", 1, 2)], set[str](), "not done: {'a'}"),
        ([call("a", 1, 2), call("a", 3, 4)], {"a"}, "without a cause"),
        ([call("a", 1, 3), call("a", 2, 4)], {"a"}, "at the same time"),
        ([call("a", 3, 4), call("a", 1, None)], {"a"}, "at the same time"),
    ],
)
def test_an_account_finds(spans: list[Span], done: set[str], found: str) -> None:
    with pytest.raises(AssertionError, match=found):
        account(spans, done, lambda *_: found == "at the same time")


def test_a_call_ends_when_it_is_answered() -> None:
    with listen_timed() as sink:
        fetch_json("POST", sink.url_for("p0"), {"id": "e-1"}, headers={"Idempotency-Key": "e-1"})
        becomes(lambda: sink.under_way("p0"), set[str]())
        (span,) = sink.spans
    assert (span.key, span.caller, span.answered) == ("e-1", "p0", True)
    assert span.ended_s is not None
    assert span.ended_s > span.began_s


def test_a_call_ends_when_its_caller_hangs_up_and_only_held_ones_wait() -> None:
    with listen_timed() as sink:
        sink.hold()
        sink.let_through("p1")
        callers = {name: _post(sink, name) for name in ("p0", "p1")}
        becomes(lambda: [span.answered for span in sink.spans if span.caller == "p1"], [True])
        assert sink.under_way("p0") == {"e-1"}
        callers["p0"].close()
        becomes(lambda: sink.number_under_way("p0"), 0)
        assert {span.caller: span.answered for span in sink.spans} == {"p0": False, "p1": True}
        callers["p1"].close()


def _post(sink: TimedSink, caller: str) -> socket.socket:
    """Send a notification and leave the answer unread."""
    url = urlsplit(sink.url_for(caller))
    connection = socket.create_connection((url.hostname, url.port or 0))
    head = f"POST {url.path} HTTP/1.1\r\nIdempotency-Key: e-1\r\nContent-Length: 2\r\n\r\n"
    connection.sendall(head.encode() + b"{}")
    return connection
