"""Calls by a plain handler, which runs on threads: notify's request, by urllib3."""

import os
import sys

from benchmarks.calls import pool, post_plainly
from idempotent_consumer import Event, Service, Settings

service = Service("plain", noun="calls")
http = pool(Settings.from_environ(os.environ).calls_at_once)
url = os.environ["NOTIFY_URL"]


@service.claimed_handler("new_order", timeout_s=5.0)
def notify(event: Event, _timeout_s: float) -> None:
    """Make one call."""
    body = {"id": event.id, "type": event.type, "args": event.args}
    post_plainly(http, url, event.id, body)


if __name__ == "__main__":
    sys.exit(service.run())
