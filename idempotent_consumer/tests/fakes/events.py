"""Bodies and handlers for tests."""

from __future__ import annotations

from typing import Any

import orjson

from idempotent_consumer.effects import Put
from idempotent_consumer.event import Event


def body(event_id: str, event_type: str = "new_order", **args: Any) -> bytes:
    """Return an event as a producer sends it."""
    return orjson.dumps({"id": event_id, "type": event_type, "args": args})


class Pure:
    """A pure handler: an order as its effect. It raises as often as ``fails`` says.

    ``seen`` are the ids it was called with.
    """

    def __init__(self, fails: int = 0) -> None:
        self.fails, self.seen = fails, list[str]()

    def __call__(self, event: Event) -> Put:
        """Handle one event."""
        self.seen.append(event.id)
        if self.fails:
            self.fails -= 1
            raise RuntimeError("out of\nstock")
        return Put(f"/orders/{event.id}", orjson.dumps(event.args))


class Claimed:
    """A claimed handler: its effect outside is that it was called, with these ids."""

    def __init__(self, fails: int = 0) -> None:
        self.fails, self.calls = fails, list[str]()

    def __call__(self, event: Event, _timeout_s: float) -> None:
        """Make one call."""
        self.calls.append(event.id)
        if self.fails:
            self.fails -= 1
            raise ConnectionError("refused")
