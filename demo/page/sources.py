"""Where the board's observations come from, and the producer: blocking clients on threads.

Each goes on for as long as the page runs, whatever comes and goes meanwhile. What it sees is told
on the page's loop: the board is of that loop alone.
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
    """What goes on in a compose project, told to its board from now on. Made on the page's loop."""

    def __init__(self, compose: Compose, ports: Ports) -> None:
        self.outbox: deque[tuple[str, bytes]] = deque()
        """Labels and bodies to publish. A round that begins puts an empty one in its place."""
        self.board, self._compose, self._loop = Board(), compose, asyncio.get_running_loop()
        self.broker, self._etcd = ports.broker(), EtcdClient(ports.etcd(), timeout_s=2)
        self._containers, self._revision = set[str](), 0
        asks = {"docker": self._docker, "etcd": self._changes, "rabbitmq": self._depths}
        for server, ask in {**asks, "producer": self._produce}.items():
            # A daemon, for a frozen server may hold it for some seconds.
            Thread(target=self._forever, args=[server, ask], daemon=True).start()

    def _see(self, method: Callable[..., None], *arguments: Any) -> None:
        with suppress(RuntimeError):  # The page has ended, and its loop with it.
            self._loop.call_soon_threadsafe(method, *arguments)

    def _forever(self, server: str, ask: Callable[[], None]) -> None:
        """Ask again whenever that ends. Where it fails, the card of the server says so."""
        while True:
            try:
                ask()
            except (*NO_ANSWER, CannotPlayError, RuntimeError):
                self._see(self.board.answers, f"{server}-1", {server: "does not answer"})
            time.sleep(_EVERY_S)

    def _docker(self) -> None:
        """List the containers. Docker tells of a change too, but of a pause before its list."""
        found = self._compose.containers()
        # Not all: a container has another name for as long as the one it replaces is there.
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
        """Read each line once; a log ends when its container stops, and may go on."""
        last, follow = "0", ["docker", "logs", "--follow", "--timestamps", "--since"]
        while container in self._containers:
            with Popen([*follow, last, container], stdout=PIPE, stderr=STDOUT) as log:
                for line in log.stdout or ():
                    at, _, text = line.decode(errors="replace").strip().partition(" ")
                    # Else it is a line of Docker's own, or one that was read before the stop.
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
        """Watch all keys behind the last change; an etcd that was wiped begins again."""
        newest = self._etcd.revision()
        self._see(self.board.answers, "etcd-1", {})
        self._revision = self._revision if newest >= self._revision else 0
        watch = self._etcd.watch(self._revision + 1, timeout_s=_SILENT_S)
        with suppress(OSError, RuntimeError):  # Silence, too: then etcd is asked again.
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
        """Read the depths, and new dead letters, over a connection that is kept."""
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
        """Publish in order, each until RabbitMQ has confirmed it and has a queue for it."""
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
    """Ask a service what it lacks, by what Docker says of its ports; None for no answer."""
    published = re.search(r":(\d+)->8080/tcp", ports)
    url = f"http://127.0.0.1:{published[1] if published else 0}/readyz"
    with suppress(*NO_ANSWER):
        return dict(ask_health(url, timeout_s=1).body["missing"])
    return None


def _state(container: dict[str, str]) -> str:
    """Return Docker's state in the page's words."""
    ended = "killed" if "(137)" in container["Status"] else "stopped"
    return {"running": "running", "paused": "frozen"}.get(container["State"], ended)
