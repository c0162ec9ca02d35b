"""The notify service: one POST for each event, with a key by which a repeat can be dropped."""

import asyncio
import contextlib
import json
import threading
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import aiohttp
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import notify
from idempotent_consumer import Event, Reject, RetryAfter, encode_id
from notify import NotSentError

EVENT = Event("12/ä", "new_order", {"item": "bicycle"})
CALLS_AT_ONCE = 200
"""More than aiohttp's default limit of 100 connections."""

Call = Callable[..., None]


class Receiver(ThreadingHTTPServer):
    """A local HTTP server that keeps its requests.

    It answers with ``status`` and ``headers``, or with the bytes ``head`` instead. Then it sends
    ``drips`` bytes, one every tenth of a second. With a ``meeting``, it answers no call before all
    calls have arrived there.
    """

    request_queue_size = CALLS_AT_ONCE

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.status, self.head, self.drips = 204, b"", 0
        self.headers = {"Location": "/elsewhere"}
        self.connections: set[object] = set()
        self.meeting: threading.Barrier | None = None
        self.hung_up, self.closing = threading.Event(), threading.Event()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.requests.append((self.path, dict(self.headers), body))
                receiver.connections.add(self.client_address)
                if receiver.meeting:
                    receiver.meeting.wait(30)
                if receiver.head:
                    self.wfile.write(receiver.head)
                else:
                    self.send_response(receiver.status)
                    for name, value in receiver.headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(receiver.drips))
                    self.end_headers()
                try:
                    for _ in range(receiver.drips):
                        self.wfile.write(b".")
                        if receiver.closing.wait(0.1):
                            return
                except OSError:
                    receiver.hung_up.set()

            def log_message(self, *_: object) -> None:
                pass

        self.handler = Handler
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server_port}"


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    receiver = Receiver()
    # A daemon: it must not keep pytest from ending after a failure.
    thread = threading.Thread(target=receiver.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("NOTIFY_URL", f"http://{receiver.address}/hook")
    yield receiver
    receiver.closing.set()
    receiver.shutdown()
    receiver.server_close()
    thread.join(10)


@pytest.fixture
def call() -> Iterator[Call]:
    """Call the handler as the library does: on one event loop, and cancelled at its time-out."""

    async def several(timeout_s: float, at_once: int) -> None:
        calls = [notify.notify(EVENT, timeout_s) for _ in range(at_once)]
        await asyncio.gather(*(asyncio.wait_for(call, timeout_s) for call in calls))

    async def close() -> None:
        await notify.session().close()

    with asyncio.Runner() as loop:
        yield lambda timeout_s=5.0, at_once=1: loop.run(several(timeout_s, at_once))
        loop.run(close())
        notify.session.cache_clear()


def test_it_handles_exactly_new_order_under_a_claim() -> None:
    assert list(notify.service.handlers) == ["new_order"]
    assert notify.service.handlers["new_order"].timeout_s == 5.0
    assert (notify.service.name, notify.service.noun) == ("notify", "notifications")


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_an_event_is_posted_once_as_json_with_its_key(
    receiver: Receiver, call: Call, status: int
) -> None:
    receiver.status = status
    call()
    ((path, headers, body),) = receiver.requests
    assert path == "/hook"
    assert json.loads(body) == {"id": "12/ä", "type": "new_order", "args": {"item": "bicycle"}}
    assert headers["Content-Type"] == "application/json"
    assert headers["Idempotency-Key"] == "12/%C3%A4"


@pytest.mark.parametrize("retry_after", [None, "0", "120", "soon"])
@pytest.mark.parametrize("status", [302, 304, 429, 500, 503, 400, 404, 409, 499])
def test_what_is_not_2xx_raises_and_is_not_sent_again_by_itself(
    receiver: Receiver, call: Call, status: int, retry_after: str | None
) -> None:
    """The event is retried on the broker, or parked if a retry would get the same answer.

    A busy receiver says when to try again.
    """
    receiver.status = status
    if retry_after is not None:
        receiver.headers["Retry-After"] = retry_after
    with pytest.raises((Reject, RetryAfter, NotSentError)) as raised:
        call()
    assert f"the receiver answered {status}" in str(raised.value)
    assert len(receiver.requests) == 1
    if status in (400, 404, 409, 499):
        assert raised.type is Reject
    elif status in (429, 503) and retry_after in ("0", "120"):
        assert isinstance(raised.value, RetryAfter)
        assert raised.value.seconds == float(retry_after)
    else:
        assert raised.type is NotSentError


def test_retry_after_is_seconds_or_a_date() -> None:
    seconds = {"0": 0, "120": 120, "9" * 30: 999_999_999}
    neither = ["", "soon", "-1", "1.5", "\N{ARABIC-INDIC DIGIT FIVE}", "Fri, 31 Dec 1999 23:59:59"]
    neither.append("Fri, 31 Dec 1999 23:59:59 +" + "9" * 16)
    expected = {**seconds, **dict.fromkeys(neither)}
    assert {text: notify.retry_after_s(text) for text in expected} == expected
    in_an_hour = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    found = notify.retry_after_s(in_an_hour)
    assert found is not None
    assert 3500 < found <= 3600


def test_a_receiver_that_is_not_there_raises(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    monkeypatch.setenv("NOTIFY_URL", "http://127.0.0.1:1/hook")
    with pytest.raises(aiohttp.ClientConnectorError, match=r"127\.0\.0\.1:1 ") as raised:
        call()
    assert isinstance(raised.value.os_error, ConnectionRefusedError)
    assert "hook" not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"220 mail.example ESMTP\r\n", id="not-http"),
        pytest.param(b"HTTP/1.1 204 .\r\nX-Half: ", id="connection-lost"),
    ],
)
def test_a_failure_is_raised_without_the_address(
    receiver: Receiver, call: Call, head: bytes
) -> None:
    """The address of a hook is a secret, and what a handler raises goes to logs and headers."""
    receiver.head = head
    with pytest.raises(NotSentError, match="not HTTP, or there is none") as raised:
        call()
    assert "hook" not in "".join(traceback.format_exception(raised.value))


def test_a_receiver_that_drips_its_answer_does_not_hold_the_call(
    receiver: Receiver, call: Call
) -> None:
    """The claim covers the call only for its time-out, although each drip comes in time."""
    receiver.head, receiver.drips = b"HTTP/1.1 204 No Content\r\nX-Drops: ", 5_000
    with pytest.raises(TimeoutError):
        call(timeout_s=0.5)
    assert receiver.hung_up.wait(10), "the connection is still open"


@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("breaks_off", [False, True])
def test_a_status_counts_whatever_becomes_of_the_body(
    receiver: Receiver, call: Call, status: int, breaks_off: bool
) -> None:
    """The receiver has decided: sending the event again would repeat what it has accepted."""
    receiver.status, receiver.drips = status, 5_000
    if breaks_off:
        receiver.head = b"HTTP/1.0 %d .\r\nContent-Length: 9\r\n\r\n" % status
        receiver.drips = 2
    with pytest.raises(Reject) if status == 400 else contextlib.nullcontext():
        call(timeout_s=0.5)  # Shorter than the limit for a body.
    assert breaks_off or receiver.hung_up.wait(10), "the connection is still open"


@pytest.mark.parametrize("status", [204, 503])
def test_a_connection_is_used_again(receiver: Receiver, call: Call, status: int) -> None:
    receiver.handler.protocol_version = "HTTP/1.1"
    receiver.status, receiver.drips = status, 0 if status == 204 else 2
    for _ in range(3):
        with contextlib.suppress(NotSentError):
            call()
    assert len(receiver.requests) == 3
    assert len(receiver.connections) == 1


def test_cookies_and_bodies_of_answers_are_ignored(
    receiver: Receiver, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that the receiver closes after its answer is no failure."""
    # By its name: a client ignores cookies from an IP address.
    monkeypatch.setenv("NOTIFY_URL", f"http://localhost:{receiver.server_port}/hook")
    receiver.head = (
        b"HTTP/1.0 200 OK\r\nSet-Cookie: a=b\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n"
    )
    receiver.drips = 2
    for _ in range(3):
        call()
    assert ["Cookie" in headers for _, headers, _ in receiver.requests] == [False] * 3


def test_as_many_calls_are_made_at_once_as_the_library_makes(
    receiver: Receiver, call: Call
) -> None:
    receiver.meeting = threading.Barrier(CALLS_AT_ONCE)
    call(timeout_s=60, at_once=CALLS_AT_ONCE)
    assert len(receiver.connections) == CALLS_AT_ONCE


def test_a_proxy_of_the_environment_is_not_used(
    receiver: Receiver, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1/")
    call()
    assert len(receiver.requests) == 1


def test_a_user_and_password_in_the_address_are_its_login(
    receiver: Receiver, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_URL", f"http://user:secret@{receiver.address}/hook")
    call()
    ((_, headers, _),) = receiver.requests
    assert headers["Authorization"] == "Basic dXNlcjpzZWNyZXQ="


@pytest.mark.parametrize("blank", ["", "  "])
def test_without_an_address_it_is_logged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], call: Call, blank: str
) -> None:
    monkeypatch.setenv("NOTIFY_URL", blank)
    call()
    out = capsys.readouterr().out
    assert "notification" in out
    assert "12/" in out


WRONG_ADDRESSES = [
    *("localhost:8000", "ftp://h/x", "/hook", "http://", "https:///x", "http://h:99999/"),
    *("http://[::1/", "http://a b/", "http:/h", "http://a..b/", f"http://{'a' * 70}.b/"),
    *("http://user:secret@h:99999/", "http://user:secret@a b/?key=secret"),
    *("http://user:secret\N{EURO SIGN}@h/", "http://us%3Aer:secret@h/"),
]


@pytest.mark.parametrize("url", WRONG_ADDRESSES)
def test_a_wrong_address_ends_the_service_with_one_line_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    # A second wrong setting ends the service if the first does not.
    monkeypatch.setenv("BATCH_SIZE", "wrong")
    monkeypatch.setenv("NOTIFY_URL", url)
    assert notify.main() == 2
    out, err = capsys.readouterr()
    assert err.startswith("notify: NOTIFY_URL")
    assert err.count("\n") == 1
    assert "secret" not in err
    assert out == ""


AWKWARD_IDS = [
    *("%", "%25", "%2525", "a\r\nX-Injected: 1", " ", "%20", "\t", "\x7f"),
    *("ä", "%C3%A4", "é", "e\u0301", "x" * 10_000, "sha256:0"),
]
IDS = st.text(min_size=1) | st.sampled_from(AWKWARD_IDS)


@given(IDS, IDS)
@example("a\r\nHost: evil", " ")
def test_a_key_is_visible_ascii_of_bounded_length_and_no_other_events(one: str, other: str) -> None:
    key = notify.idempotency_key(one)
    assert all(0x21 <= ord(letter) <= 0x7E for letter in key)
    assert 0 < len(key) <= 3 * 128
    assert (key == notify.idempotency_key(other)) == (one == other)


@pytest.mark.parametrize("event_id", ["123", "a/b:c", "~!@#$&*()_+{}|<>?\"'`\\^[]=;,.-"])
def test_an_ordinary_id_is_its_own_key(event_id: str) -> None:
    """The receiver reads the id that the producer chose."""
    assert notify.idempotency_key(event_id) == event_id == encode_id(event_id)
