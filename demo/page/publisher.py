"""The page's producer: publishes each message until RabbitMQ has confirmed it."""

from __future__ import annotations

import json
import queue
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import pika

from demo.page.board import Kind
from demo.page.sources import AWAY, HEADER

_AGAIN_S = 0.25
_MOST_WAITING = 500


class Message(NamedTuple):
    """What is published: its label in a header, the event's id, what it is, and its body."""

    label: str
    event_id: str
    kind: Kind
    body: bytes


class Publisher:
    """Publishes on a thread of its own, in order, and again where the outcome is unknown.

    `sent` is called by `publish`, `confirmed` on that thread. Labels begin with the round's name,
    and a new event's id is its label: nothing of an earlier round is taken for one of this.
    """

    def __init__(
        self, url: str, sent: Callable[[Message], None], confirmed: Callable[[Message], None]
    ) -> None:
        self._url, self._sent, self._confirmed = url, sent, confirmed
        self._messages: queue.Queue[Message] = queue.Queue()
        self._ended = threading.Event()
        self._channel: Any = None
        self._last: Message | None = None
        self.begin()
        # A daemon: a frozen RabbitMQ holds it for some seconds, but not the page's end.
        threading.Thread(target=self._run, name="publisher", daemon=True).start()

    def begin(self) -> None:
        """Begin a round: what waits to be published is dropped, and numbers begin again."""
        with self._messages.mutex:
            self._messages.queue.clear()
        self.round, self._number, self._last = secrets.token_hex(2), 0, None

    def publish(self, kind: Kind) -> str:
        """Publish one more, and return its id; copies are of the last new event."""
        if self._messages.qsize() >= _MOST_WAITING:
            return ""
        last = self._last
        if last is None and kind in ("again", "other"):
            kind = "new"
        self._number += 1
        event_id = label = f"{self.round}-{self._number}"
        if kind in ("again", "other") and last is not None:
            event_id = last.event_id
        event: dict[str, object] = {"id": event_id, "type": "new_order"}
        if kind == "other":
            event["args"] = {"other": self._number}
        body = b"not an event" if kind == "invalid" else json.dumps(event).encode()
        message = Message(label, event_id, kind, body)
        self._last = message if kind == "new" else last
        self._sent(message)
        self._messages.put(message)
        return event_id

    def end(self) -> None:
        """Publish no more."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.is_set():
            with suppress(queue.Empty):
                message = self._messages.get(timeout=_AGAIN_S)
                current = self.round
                while not self._ended.is_set() and current == self.round:
                    if self._publish(message):
                        self._confirmed(message)
                        break

    def _publish(self, message: Message) -> bool:
        """Return whether RabbitMQ has confirmed the message and has a queue for it."""
        try:
            if self._channel is None:
                self._channel = _open(self._url)
            properties = pika.BasicProperties(headers={HEADER: message.label}, delivery_mode=2)
            self._channel.basic_publish("events", "play", message.body, properties, mandatory=True)
        except AWAY:
            with suppress(*AWAY):
                if self._channel is not None:
                    self._channel.connection.close()
            self._channel = None
            self._ended.wait(_AGAIN_S)
            return False
        return True


def _open(url: str) -> Any:
    parameters = pika.URLParameters(url)
    parameters.heartbeat = 4
    parameters.socket_timeout = parameters.stack_timeout = 2
    channel = pika.BlockingConnection(parameters).channel()
    channel.confirm_delivery()
    return channel
