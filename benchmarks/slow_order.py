"""The order service with a handler that waits for HANDLER_MS milliseconds and has no effect."""

from __future__ import annotations

import os
import sys
import time

from idempotent_consumer import Event, Service

_COST_S = float(os.environ["HANDLER_MS"]) / 1000

service = Service("order", noun="orders")


@service.handler("new_order")
def take_a_while(_event: Event) -> None:
    """Wait, as for an answer of something outside, and compute nothing."""
    if _COST_S:
        time.sleep(_COST_S)


if __name__ == "__main__":
    sys.exit(service.run())
