"""Sends a notification for each new_order event, to NOTIFY_URL or into the log."""

import asyncio
import os
import sys
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from http import HTTPStatus
from urllib.parse import quote

import aiohttp
import structlog
from yarl import URL

from idempotent_consumer import Event, Reject, RetryAfter, Service, encode_id

service = Service("notify", noun="notifications")
log = structlog.get_logger(service="notify")


class NotSentError(Exception):
    """The receiver did not accept the notification; the event is retried."""


def notify_url() -> URL | None:
    """Return where notifications go, or None for the log. Raises ValueError."""
    text = os.environ.get("NOTIFY_URL", "").strip()
    return parse(text) if text else None


@cache
def parse(text: str) -> URL:
    """Return a URL that HTTP can use. Raises ValueError, whose message does not have the URL."""
    with suppress(ValueError):
        url = URL(text)
        user, password = url.user or "", url.password or ""
        # with_host() refuses characters that no host has, the codec names that DNS cannot look up.
        if url.scheme in ("http", "https") and url.host and url.with_host(url.host):
            url.host.encode("idna")
            (user + password).encode("latin-1")  # HTTP's Basic login is user:password.
            if ":" not in user:
                return url
    raise ValueError(
        "NOTIFY_URL is wrong: write http://host/path or https://host/path. A login in it is of "
        "Latin-1 letters, its user without a colon"
    )


def idempotency_key(event_id: str) -> str:
    """Return an id as a header can hold it: "%" and all but visible ASCII are percent-encoded."""
    return quote(encode_id(event_id), safe="!#$&'()*+,/:;=?@[]<>\\^`{|}\"")


def retry_after_s(text: str) -> float | None:
    """Parse a Retry-After header: seconds or a date (RFC 9110, 10.2.3). None if it is neither."""
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, OverflowError):  # No date, or one without a time zone.
        return None


_BUSY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
_BODY_WITHIN_S = 1.0
_MARGIN_S = 0.1  # Reading the body ends this long before the time-out: the status is enough.


@cache
def session() -> aiohttp.ClientSession:
    """Return the session that all calls share. The first call opens it, on its event loop."""
    connector = aiohttp.TCPConnector(limit=0)  # CALLS_AT_ONCE bounds the connections.
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        timeout=aiohttp.ClientTimeout(),  # None: the library cancels a call at its time-out.
    )


@service.claimed_handler("new_order", timeout_s=5.0)
async def notify(event: Event, timeout_s: float) -> None:
    """Send one notification. A repeat carries the same key, so that the receiver can drop it."""
    url = notify_url()
    if url is None:
        log.info("notification", event_id=event.id, type=event.type)
        return
    now_s = asyncio.get_running_loop().time
    answered_by_s = now_s() + timeout_s - _MARGIN_S
    try:
        async with session().post(
            url,
            json={"id": event.id, "type": event.type, "args": event.args},
            headers={"Idempotency-Key": idempotency_key(event.id)},
            allow_redirects=False,
        ) as response:
            # Only the status counts. Reading the body to its end lets the connection be reused.
            with suppress(aiohttp.ClientError, TimeoutError):
                async with asyncio.timeout_at(min(answered_by_s, now_s() + _BODY_WITHIN_S)):
                    async for _ in response.content.iter_any():
                        pass
    except aiohttp.ClientConnectorError:
        raise  # Its text has only the host and the port of the URL.
    except aiohttp.ClientError as error:
        # The text of any other error may contain the URL, which may be a secret.
        why = getattr(error, "message", "") or type(error).__name__
        raise NotSentError(f"the receiver's answer is not HTTP, or there is none: {why}") from None
    status, answered = response.status, f"the receiver answered {response.status}"
    if status in _BUSY:
        after_s = retry_after_s(response.headers.get("Retry-After", ""))
        raise NotSentError(answered) if after_s is None else RetryAfter(after_s, answered)
    if 400 <= status < 500:
        raise Reject(answered)  # It would answer the same again.
    if not 200 <= status < 300:
        raise NotSentError(answered)


def main() -> int:
    """Check this service's own setting and run the service."""
    try:
        notify_url()
    except ValueError as error:
        print(f"notify: {error}", file=sys.stderr)
        return 2
    return service.run()


if __name__ == "__main__":
    sys.exit(main())
