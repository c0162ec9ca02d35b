"""HTTP: RabbitMQ's management API, etcd's metrics, and a service's health."""

from __future__ import annotations

import base64
import ssl
from contextlib import suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import HTTPSHandler, ProxyHandler, Request, build_opener

import orjson

from .output import CommandError

_TIMEOUT_S = 5.0


class WebError(CommandError):
    """A page could not be fetched. ``status`` is HTTP's, or 0 without an answer."""

    def __init__(self, why: str, status: int = 0, body: bytes = b"") -> None:
        super().__init__(why)
        self.status, self.body = status, body


class Page(NamedTuple):
    """A page's body, and the server's time in whole seconds if it sent one."""

    body: bytes
    date: datetime | None = None

    def json(self) -> Any:
        """Decode the body as JSON. Raises WebError."""
        try:
            return orjson.loads(self.body)
        except orjson.JSONDecodeError:
            raise WebError("the answer is not JSON") from None


class Tls(NamedTuple):
    """The files that TLS needs; without ``ca_cert`` the system's authorities are trusted."""

    ca_cert: str | None = None
    cert: str | None = None
    key: str | None = None


def fetch(url: str, tls: Tls) -> Page:
    """Get a page, with the login that the URL has. Raises WebError.

    The environment's proxies are not used: AMQP does not use them either.
    """
    parts, shown = urlsplit(url), urlsplit(without_login(url))
    where = f"{shown.scheme}://{shown.netloc}"
    try:
        request = Request(without_login(url))  # noqa: S310 - it is HTTP wherever a URL is read.
        if parts.username is not None:
            login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            # A redirect may lead to another host, which must not get it.
            basic = base64.b64encode(login.encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {basic}")
        context = ssl.create_default_context(cafile=tls.ca_cert)
        if tls.cert:
            context.load_cert_chain(tls.cert, tls.key)
        opener = build_opener(ProxyHandler({}), HTTPSHandler(context=context))
        with opener.open(request, timeout=_TIMEOUT_S) as answer:
            date = None
            with suppress(TypeError, ValueError):
                date = parsedate_to_datetime(answer.headers["Date"])
            return Page(answer.read(), date)
    except HTTPError as error:
        body = b""
        with error, suppress(OSError, HTTPException):  # The body may be cut off.
            body = error.read()
        raise WebError(f"{where} answers {error.code} {error.reason}", error.code, body) from None
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise WebError(f"{where} does not answer: {reason}") from None


def without_login(url: str) -> str:
    """Return a URL without its user and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def is_address(url: str) -> bool:
    """Return whether this is an HTTP URL with a host."""
    try:
        parts = urlsplit(url)
        complete = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        return False
    # An "@" behind the host is a password's, with a "/", "?" or "#" in it.
    return bool(complete) and "@" not in parts.path + parts.query + parts.fragment
