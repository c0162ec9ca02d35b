"""Bodies and handlers for tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from idempotent_consumer.calls import Handler
from idempotent_consumer.event import Effects, Event, Put


def body(event_id: str, event_type: str = "new_order", **args: Any) -> bytes:
    """Return an event as a producer sends it."""
    return orjson.dumps({"id": event_id, "type": event_type, "args": args})


class Pure:
    """A pure handler: it takes ``takes_s``, and returns an order as its effect.

    Its first ``fails`` calls raise. ``seen`` are the ids of the events it was called with.
    """

    def __init__(self, fails: int = 0, *, takes_s: float = 0.0) -> None:
        self.fails, self.takes_s, self.seen = fails, takes_s, list[str]()
        self.handler = Handler(self)

    def __call__(self, event: Event) -> Put:
        self.seen.append(event.id)
        loop: Any = asyncio.get_running_loop()
        loop.spend(self.takes_s)
        if self.fails:
            self.fails -= 1
            raise RuntimeError("out of\nstock")
        return Put(f"/orders/{event.id}", orjson.dumps(event.args))


class Claimed:
    """A claimed handler, whose outside effect is to add the event's id to ``calls``.

    If it ``waits``, a call ends when the test says so. It returns what ``returns`` does, but its
    first ``fails`` calls raise.
    """

    def __init__(
        self,
        fails: int = 0,
        *,
        waits: bool = False,
        timeout_s: float = 5.0,
        returns: Callable[[Event], Effects] = lambda _: None,
    ) -> None:
        self.fails, self.waits, self.calls = fails, waits, list[str]()
        self._returns = returns
        self.handler = Handler(self.call, timeout_s)
        self._under_way: list[tuple[str, asyncio.Future[None]]] = []

    async def call(self, event: Event, _timeout_s: float) -> Effects:
        self.calls.append(event.id)
        if self.waits:
            ended = asyncio.get_running_loop().create_future()
            self._under_way.append((event.id, ended))
            await ended
        if self.fails:
            self.fails -= 1
            raise ConnectionError("refused")
        return self._returns(event)

    def end(self, *ids: str) -> None:
        """End calls under way: those for these ids, or all."""
        for event_id, ended in self._under_way:
            if not ended.done() and (event_id in ids or not ids):
                loop: Any = ended.get_loop()
                loop.call_soon(ended.set_result, None)
                loop.run_until_idle()


@dataclass(frozen=True)
class OutOfStock(Exception):
    """An exception whose attributes cannot be assigned."""

    sku: str


class Speechless(Exception):
    """An exception that cannot be written as text."""

    def __str__(self) -> str:
        raise SystemExit("no text")
