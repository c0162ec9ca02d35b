"""Sends a notification for each new_order event, to NOTIFY_URL or into the log."""

from __future__ import annotations

import os
import sys
import time
from urllib.parse import quote

import structlog
import urllib3

from idempotent_consumer import Event, Service, encode_id

TIMEOUT_S = 5.0

service = Service("notify", noun="notifications")
http = urllib3.PoolManager(maxsize=16, retries=False)
log = structlog.get_logger(service="notify")


class NotSentError(Exception):
    """The receiver did not accept the notification; the event is retried."""


def notify_url() -> str | None:
    """Return where notifications go, or None for the log. Raises ValueError."""
    url = os.environ.get("NOTIFY_URL", "").strip()
    if not url:
        return None
    try:
        parts = urllib3.util.parse_url(url)
        valid = parts.scheme in ("http", "https") and parts.host and parts.host.encode("idna")
    except (urllib3.exceptions.LocationParseError, UnicodeError):
        valid = None
    if not valid:
        raise ValueError(f"NOTIFY_URL is {url!r}: write http://host/path or https://host/path")
    return url


def idempotency_key(event_id: str) -> str:
    """Write an id as a header can hold it: as it is, but for "%" and what is not visible ASCII."""
    return quote(encode_id(event_id), safe="!#$&'()*+,/:;=?@[]<>\\^`{|}\"")


@service.claimed_handler("new_order", timeout_s=TIMEOUT_S)
def notify(event: Event, timeout_s: float) -> None:
    """Send one notification. A repeat carries the same key, so that the receiver can drop it."""
    url = notify_url()
    if url is None:
        log.info("notification", event_id=event.id, type=event.type)
        return
    deadline_s = time.monotonic() + timeout_s
    response = http.request(
        "POST",
        url,
        json={"id": event.id, "type": event.type, "args": event.args},
        headers={"Idempotency-Key": idempotency_key(event.id)},
        timeout=urllib3.Timeout(total=timeout_s),
        redirect=False,
        preload_content=False,
    )
    # Read to its end, so that the connection can be used again, but not for ever.
    while response.read1(4096) and time.monotonic() < deadline_s:
        pass
    if not 200 <= response.status < 300:
        raise NotSentError(f"the receiver answered {response.status}")
    if time.monotonic() >= deadline_s:
        response.close()
        raise NotSentError(f"the receiver took longer than {timeout_s:g} s")


def main() -> int:
    """Check the one setting that is this service's own, and run."""
    try:
        notify_url()
    except ValueError as error:
        print(f"notify: {error}", file=sys.stderr)
        return 2
    return service.run()


if __name__ == "__main__":
    sys.exit(main())
