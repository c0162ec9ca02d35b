"""Where the board's observations come from, and the producer: blocking clients on threads.

Each runs for as long as the page does, even while its server is down. Observations are handed to
the page's event loop, which alone uses the board.
"""

import asyncio
import json
import re
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import chain, product
from subprocess import PIPE, STDOUT, Popen
from threading import Thread
from typing import Any

import pika

from demo.broker import headers, ready
from demo.compose import Compose, Ports
from demo.page.board import READINGS, Board
from demo.stage import NO_ANSWER, SERVICES
from demo.steps import CannotPlayError
from idempotent_consumer import Settings
from idempotent_consumer.bus import queue_arguments
from idempotent_consumer.names import EXCHANGE, dead_letter_queue
from servers.etcd import EtcdClient
from servers.services import ask_health

_DELAYS = Settings().retry_delays
QUEUES = dict(queue for service in SERVICES for queue in queue_arguments(service, _DELAYS).items())

_SHOWN = ("rabbitmq", "etcd", "receiver", *SERVICES)
_LABEL_HEADER = "x-play"
_EVERY_S = 12 / READINGS
_SILENT_S = 10.0
_DEAD_LETTERS_AT_ONCE = 100


class Sources:
    """Observes a compose project for its board from now on. Made on the page's event loop."""

    def __init__(self, compose: Compose, ports: Ports) -> None:
        self.outbox: deque[tuple[str, bytes]] = deque()
        """Labels and bodies to publish. A new round replaces it with an empty one."""
        self.board, self._compose, self._loop = Board(), compose, asyncio.get_running_loop()
        self.broker, self._etcd = ports.broker(), EtcdClient(ports.etcd(), timeout_s=2)
        self._containers, self._revision = set[str](), 0
        asks = {"docker": self._docker, "etcd": self._changes, "rabbitmq": self._depths}
        asks["producer"] = self._produce
        for server, ask in asks.items():
            # A daemon, because a frozen server may block it for some seconds.
            Thread(target=self._forever, args=[server, ask], daemon=True).start()

    def _see(self, method: Callable[..., None], *arguments: Any) -> None:
        with suppress(RuntimeError):  # The page has ended and its loop is closed.
            self._loop.call_soon_threadsafe(method, *arguments)

    def _forever(self, server: str, ask: Callable[[], None]) -> None:
        """Ask again and again. After a failure, the server's card says that it does not answer."""
        while True:
            try:
                ask()
            except (*NO_ANSWER, CannotPlayError, RuntimeError):
                self._see(self.board.answers, f"{server}-1", {server: "does not answer"})
            time.sleep(_EVERY_S)

    def _docker(self) -> None:
        """List the containers. Docker's events would announce a pause before the list shows it."""
        found = self._compose.containers()
        # A container has another name until the one that it replaces is gone.
        pairs = product(_SHOWN, sorted(found.items()))
        cards = {name: card for of, (name, card) in pairs if name.rpartition("-")[0] == of}
        self._see(self.board.containers, {name: _state(card) for name, card in cards.items()})
        before, self._containers = self._containers, {card["ID"] for card in cards.values()}
        for name, card in cards.items():
            if name.startswith((*SERVICES, "receiver")) and card["ID"] not in before:
                Thread(target=self._log, args=[name, card["ID"]], daemon=True).start()
            if name.startswith(SERVICES) and _state(card) == "running":
                self._see(self.board.answers, name, _missing(card["Ports"]))

    def _log(self, name: str, container: str) -> None:
        """Read each line once. A log ends when its container stops, and may continue later."""
        last, follow = "0", ["docker", "logs", "--follow", "--timestamps", "--since"]
        while container in self._containers:
            with Popen([*follow, last, container], stdout=PIPE, stderr=STDOUT) as log:
                for line in log.stdout or ():
                    at, _, text = line.decode(errors="replace").strip().partition(" ")
                    # Other lines are Docker's own, or were read before the container stopped.
                    if at[:1].isdigit() and at > last:
                        last = at
                        self._say(name, text)
            time.sleep(_EVERY_S)

    def _say(self, name: str, text: str) -> None:
        if text.startswith("{"):
            with suppress(ValueError):
                self._see(self.board.line, name, json.loads(text))
        elif name.startswith("receiver"):
            key = text.removeprefix("again ")
            self._see(self.board.effect, "notify", key, key != text)

    def _changes(self) -> None:
        """Watch all keys from the last revision on, or from the first if etcd was wiped."""
        newest = self._etcd.revision()
        self._see(self.board.answers, "etcd-1", {})
        self._revision = self._revision if newest >= self._revision else 0
        watch = self._etcd.watch(self._revision + 1, timeout_s=_SILENT_S)
        with suppress(OSError, RuntimeError):  # After a silence, etcd is asked again.
            for change in chain.from_iterable(watch):
                self._revision = change.revision
                found = re.fullmatch(r"/(?:service/)?(orders|order|notify)/(.+)", change.key)
                if not found or change.kind == "delete":
                    continue
                if found[1] == "orders":
                    self._see(self.board.effect, "order", found[2])
                else:
                    record = json.loads(change.value)
                    self._see(self.board.record, *found.groups(), record["state"], record["token"])

    def _depths(self) -> None:
        """Read the queue depths and new dead letters again and again, over one connection."""
        read: dict[str, int] = {}
        with self.broker.connected() as connection:
            while True:
                unacked = self.broker.unacked()
                depths = ready(connection, [queue for queue in QUEUES if queue in unacked])
                for service in SERVICES:
                    queue = dead_letter_queue(service)
                    if depths.get(queue) != read.get(queue):
                        for letter in headers(connection, queue, _DEAD_LETTERS_AT_ONCE):
                            reason = letter.get("x-reason", "by RabbitMQ")
                            why = f"{reason}: {letter.get('x-error', '')}"
                            self._see(self.board.park, service, letter.get(_LABEL_HEADER), why)
                read = depths
                self._see(self.board.answers, "rabbitmq-1", {})
                self._see(self.board.depths, depths, unacked)
                connection.sleep(_EVERY_S)

    def _produce(self) -> None:
        """Publish in order. Each event is repeated until it is confirmed and in a queue."""
        with self.broker.connected() as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            while True:
                outbox = self.outbox
                if not outbox:
                    connection.sleep(0.02)
                    continue
                label, body = outbox[0]
                properties = pika.BasicProperties(headers={_LABEL_HEADER: label}, delivery_mode=2)
                channel.basic_publish(EXCHANGE, "play", body, properties, mandatory=True)
                outbox.popleft()
                self._see(self.board.confirm, label)


def _missing(ports: str) -> dict[str, str] | None:
    """Ask a service what it lacks, given its ports as Docker lists them. None: no answer."""
    published = re.search(r":(\d+)->8080/tcp", ports)
    url = f"http://127.0.0.1:{published[1] if published else 0}/readyz"
    with suppress(*NO_ANSWER):
        return dict(ask_health(url, timeout_s=1).body["missing"])
    return None


def _state(container: dict[str, str]) -> str:
    """Return Docker's state in the page's words."""
    ended = "killed" if "(137)" in container["Status"] else "stopped"
    return {"running": "running", "paused": "frozen"}.get(container["State"], ended)
