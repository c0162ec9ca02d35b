"""The notify service: one POST for each event, with a key by which a repeat can be dropped."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import notify
from idempotent_consumer import Event, encode_id

EVENT = Event("12/ä", "new_order", {"item": "bicycle"})


class Receiver(ThreadingHTTPServer):
    """A local HTTP server that keeps what it is sent, and answers as it is told."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.status, self.drips = 204, 0
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.requests.append((self.path, dict(self.headers), body))
                self.send_response(receiver.status)
                if receiver.status == 302:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", str(receiver.drips))
                self.end_headers()
                for _ in range(receiver.drips):
                    self.wfile.write(b".")
                    if receiver.gone.wait(0.1):
                        return

            def log_message(self, *_: object) -> None:
                pass

        self.gone = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        """Return its address."""
        return f"http://127.0.0.1:{self.server_address[1]}/hook"


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    receiver = Receiver()
    # A daemon: whatever fails here, it does not keep the run from ending.
    thread = threading.Thread(
        target=receiver.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    monkeypatch.setenv("NOTIFY_URL", receiver.url)
    yield receiver
    receiver.gone.set()
    receiver.shutdown()
    receiver.server_close()
    thread.join(10)
    notify.http.clear()


def test_it_handles_exactly_new_order_under_a_claim() -> None:
    assert list(notify.service.handlers) == ["new_order"]
    assert notify.service.handlers["new_order"].timeout_s == 5.0
    assert (notify.service.name, notify.service.noun) == ("notify", "notifications")


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_an_event_is_posted_once_as_json_with_its_key(receiver: Receiver, status: int) -> None:
    receiver.status = status
    notify.notify(EVENT, 5.0)
    ((path, headers, body),) = receiver.requests
    assert path == "/hook"
    assert json.loads(body) == {"id": "12/ä", "type": "new_order", "args": {"item": "bicycle"}}
    assert headers["Content-Type"] == "application/json"
    assert headers["Idempotency-Key"] == "12/%C3%A4"


@pytest.mark.parametrize("status", [302, 304, 400, 404, 409, 429, 500, 503])
def test_what_is_not_2xx_raises_and_is_not_sent_again_by_itself(
    receiver: Receiver, status: int
) -> None:
    """The event is retried on the broker; a repeat inside the call would not be counted."""
    receiver.status = status
    with pytest.raises(notify.NotSentError, match=str(status)):
        notify.notify(EVENT, 5.0)
    assert len(receiver.requests) == 1


def test_a_receiver_that_is_not_there_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_URL", "http://127.0.0.1:1/hook")
    with pytest.raises(Exception, match="refused"):
        notify.notify(EVENT, 5.0)


def test_a_receiver_that_drips_its_answer_does_not_hold_the_call(receiver: Receiver) -> None:
    """The claim covers the call for so long and no longer; each drip is within the time-out."""
    receiver.status, receiver.drips = 200, 40
    started_s = time.monotonic()
    with pytest.raises(Exception, match=r"."):
        notify.notify(EVENT, 0.5)
    assert time.monotonic() - started_s < 2.0


def test_every_event_of_one_type_uses_the_same_connection_pool(receiver: Receiver) -> None:
    """A connection that the receiver has closed is not taken for a failure."""
    for _ in range(5):
        notify.notify(EVENT, 5.0)
    assert len(receiver.requests) == 5


def test_without_an_address_it_is_logged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NOTIFY_URL", raising=False)
    notify.notify(EVENT, 5.0)
    out = capsys.readouterr().out
    assert "notification" in out
    assert "12/" in out


@pytest.mark.parametrize("blank", ["", "  "])
def test_a_blank_address_is_none(monkeypatch: pytest.MonkeyPatch, blank: str) -> None:
    monkeypatch.setenv("NOTIFY_URL", blank)
    assert notify.notify_url() is None


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://h/x",
        "/hook",
        "http://",
        "https:///x",
        "http://h:99999/",
        "http://[::1/",
        "http://a b/",
        "http:/h",
        "http://a..b/",
        f"http://{'a' * 70}.b/",
    ],
)
def test_a_wrong_address_ends_the_service_with_one_line_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    # A second wrong setting: should the first pass, the service does not run for ever.
    monkeypatch.setenv("BATCH_SIZE", "wrong")
    monkeypatch.setenv("NOTIFY_URL", url)
    assert notify.main() == 2
    out, err = capsys.readouterr()
    assert err.startswith("notify: NOTIFY_URL")
    assert err.count("\n") == 1
    assert out == ""


IDS = st.text(min_size=1) | st.sampled_from(
    [
        "%",
        "%25",
        "%2525",
        "a\r\nX-Injected: 1",
        " ",
        "%20",
        "\t",
        "\x7f",
        "ä",
        "%C3%A4",
        "é",
        "e\u0301",
        "x" * 10_000,
        "sha256:0",
    ]
)


@given(IDS)
@example("a\r\nHost: evil")
def test_a_key_is_visible_ascii_of_bounded_length(event_id: str) -> None:
    key = notify.idempotency_key(event_id)
    assert all(0x21 <= ord(letter) <= 0x7E for letter in key)
    assert 0 < len(key) <= 3 * 128


@given(IDS, IDS)
def test_two_events_never_have_the_same_key(one: str, other: str) -> None:
    assert (notify.idempotency_key(one) == notify.idempotency_key(other)) == (one == other)


@pytest.mark.parametrize("event_id", ["123", "a/b:c", "~!@#$&*()_+{}|<>?\"'`\\^[]=;,.-"])
def test_an_ordinary_id_is_its_own_key(event_id: str) -> None:
    """The receiver reads the id that the producer chose."""
    assert notify.idempotency_key(event_id) == event_id == encode_id(event_id)
