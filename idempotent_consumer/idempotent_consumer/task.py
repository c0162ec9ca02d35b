"""An event in hand."""

from __future__ import annotations

from .bus.delivery import Delivery
from .event import Event
from .handlers import Handler
from .policies import HELD_CLAIM, Backoff


class Task:
    """An event in hand, with every delivery of it: they share its fate.

    ``others`` are deliveries with its id and another body; they are judged when it has ended.
    """

    __slots__ = (
        "called",
        "deliveries",
        "error",
        "event",
        "handler",
        "key",
        "others",
        "published",
        "state",
        "token",
        "waits",
    )

    def __init__(
        self, key: bytes, token: str, event: Event, handler: Handler, delivery: Delivery
    ) -> None:
        self.key, self.token, self.event, self.handler = key, token, event, handler
        self.deliveries = [delivery]
        self.others: list[Delivery] = []
        self.called = self.published = False
        self.error = self.state = ""
        self.waits: Backoff | None = None

    def waits_in(self, state: str) -> Backoff:
        """Return its waits for another process to take its record out of this state."""
        if self.waits is None or state != self.state:
            self.state, self.waits = state, Backoff(HELD_CLAIM)
        return self.waits

    def join(self, delivery: Delivery, digest: str) -> None:
        """Add a delivery of the same id; those that have gone back meanwhile are let go."""
        mates = self.deliveries if digest == self.event.digest else self.others
        if mates and not mates[0].alive:
            mates[:] = [mate for mate in mates if mate.alive]
        mates.append(delivery)
