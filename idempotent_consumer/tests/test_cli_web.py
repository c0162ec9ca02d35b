"""How pages are fetched by HTTP, and where the management API is."""

import base64
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from idempotent_consumer.cli.broker import Management
from idempotent_consumer.cli.web import Page, Tls, WebError, fetch
from idempotent_consumer.settings import Settings


@pytest.fixture
def server() -> Iterator[str]:
    """Yield the address of a server that answers with the login it gets.

    /alarm and /cut answer 503, /cut with too short a body. /moved redirects to another host.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response({"/alarm": 503, "/cut": 503, "/moved": 302}.get(self.path, 200))
            if self.path == "/moved":
                self.send_header("Location", f"http://localhost:{running.server_port}/")
            if self.path == "/cut":
                self.send_header("Content-Length", "50")
            self.end_headers()
            self.wfile.write((self.headers["Authorization"] or "none").encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_login_in_the_url_is_sent_and_the_servers_time_is_read(server: str) -> None:
    page = fetch(f"http://us%40er:pa%2Fss@{server}/", Tls())
    assert base64.b64decode(page.body.removeprefix(b"Basic ")) == b"us@er:pa/ss"
    assert page.date is not None
    assert abs((datetime.now(UTC) - page.date).total_seconds()) < 60
    assert fetch(f"http://{server}/", Tls()).body == b"none"


@pytest.mark.parametrize(("page", "body"), [("alarm", b"Basic"), ("cut", b"")])
def test_an_error_keeps_its_body_if_it_is_whole_and_hides_the_password(
    server: str, page: str, body: bytes
) -> None:
    with pytest.raises(WebError, match="answers 503") as caught:
        fetch(f"http://u:secret@{server}/{page}", Tls())
    assert (caught.value.status, caught.value.body[:5]) == (503, body)
    assert "secret" not in str(caught.value)


def test_a_login_does_not_follow_a_redirect(server: str) -> None:
    assert fetch(f"http://u:secret@{server}/moved", Tls()).body == b"none"


def test_no_proxy_is_used(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert fetch(f"http://{server}/", Tls()).body == b"none"


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "https://127.0.0.1:1", "http://[::1]:1"])
def test_a_server_that_does_not_answer_is_an_error(url: str) -> None:
    with pytest.raises(WebError, match="does not answer") as caught:
        fetch(url, Tls())
    assert caught.value.status == 0


@pytest.mark.parametrize(
    ("broker", "management", "asked"),
    [
        ("", "", ["http://guest:guest@localhost:15672/api/queues/%2F"]),
        ("amqp://u:p%40@h:5673/%2Fteam", "", ["http://u:p%40@h:15672/api/queues/%2Fteam"]),
        ("amqps://h/team", "", ["https://guest:guest@h:15671/api/queues/team"]),
        ("amqp://u:p@[::1]/", "", ["http://u:p@[::1]:15672/api/queues/%2F"]),
        ("amqp://a,amqp://b", "", [f"http://guest:guest@{h}:15672/api/queues/%2F" for h in "ab"]),
        ("amqp://a,amqp://b", "http://c:1/sub/", ["http://c:1/sub/api/queues/%2F"]),
    ],
)
@pytest.mark.parametrize(
    ("error", "says"),
    [
        (WebError("away"), "RABBITMQ_MANAGEMENT_URL says where"),
        (WebError("answers 401", 401), "answers 401"),
    ],
    ids=["away", "refuses"],
)
def test_the_management_api_is_on_the_brokers_hosts_or_at_its_own_url(
    broker: str, management: str, asked: list[str], error: WebError, says: str
) -> None:
    """The nodes are asked until one answers: the others would answer the same."""
    environ = {"RABBITMQ_URL": broker, "RABBITMQ_MANAGEMENT_URL": management}
    urls: list[str] = []

    def fail(url: str, _tls: Tls) -> Page:
        urls.append(url)
        raise error

    with pytest.raises(WebError, match=says):
        Management(environ, Settings.from_environ(environ), fail).get("/queues/{vhost}")
    assert urls == (asked[:1] if error.status else asked)
