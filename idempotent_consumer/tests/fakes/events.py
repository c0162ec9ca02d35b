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
    """A pure handler: an order as its effect, for which it computes for ``takes_s``.

    It raises as often as ``fails`` says. ``seen`` are the ids it was called with.
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
    """A claimed handler: its effect outside is that it was called, with these ids.

    A call ends at once, or where it ``waits`` when the test says so. It returns what ``returns``
    does, or raises as often as ``fails`` says.
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
        """Let calls under way end, all of them or those for these ids."""
        under_way, self._under_way = self._under_way, []
        for event_id, ended in under_way:
            if ids and event_id not in ids:
                self._under_way.append((event_id, ended))
            elif not ended.done():
                loop: Any = ended.get_loop()
                loop.call_soon(ended.set_result, None)
                loop.run_until_idle()


@dataclass(frozen=True)
class OutOfStock(Exception):
    """An exception that refuses every assignment to it."""

    sku: str


class Speechless(Exception):
    """An exception whose text cannot be read."""

    def __str__(self) -> str:
        raise SystemExit("no text")
