"""Where the board's observations come from, and the producer: blocking clients on threads.

Each goes on for as long as the page runs, whatever comes and goes meanwhile. What it sees waits
until the page's loop takes it: the board is of that loop alone.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from subprocess import PIPE, STDOUT, Popen
from threading import Thread
from typing import Any

import pika

from demo.broker import Broker
from demo.command import run
from demo.compose import Ports
from demo.page.board import READINGS, Board
from demo.stage import NO_ANSWER, SERVICES, CannotPlayError
from idempotent_consumer import Settings
from idempotent_consumer.bus import queue_arguments
from idempotent_consumer.names import EXCHANGE, dead_letter_queue
from servers.etcd import EtcdClient
from servers.services import ask_health

_QUEUES: dict[str, dict[str, object]] = {}
"""Of both services: the arguments by the name."""
for _service in SERVICES:
    _QUEUES |= queue_arguments(_service, Settings().retry_delays)

_LABEL = "x-play"
"""The header with a publication's label."""

_SHOWN = ("rabbitmq", "etcd", "receiver", *SERVICES)
_EVERY_S = 12 / READINGS
_SILENT_S = 10.0
_DEAD_LETTERS_AT_ONCE = 100


class Sources:
    """What goes on in the stack of a compose project, told to the board by `take`."""

    def __init__(self, project: str, ports: Ports, board: Board) -> None:
        self.outbox: deque[tuple[str, bytes]] = deque()
        """Labels and bodies to publish. A round that begins puts an empty one in its place."""
        self._project, self._board, numbers = project, board, ports.numbers
        self._broker = Broker(ports.host, numbers["PORT_RABBITMQ"], numbers["PORT_RABBITMQ_UI"])
        self._etcd = EtcdClient(f"{ports.host}:{numbers['PORT_ETCD']}", timeout_s=2)
        self._seen: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._containers: set[str] = set()
        self._revision = 0

    def start(self) -> None:
        """Start the threads: daemons, for a frozen server may hold one for some seconds."""
        for watch in (self._docker, self._changes, self._depths, self._produce):
            Thread(target=self._forever, args=[watch], daemon=True).start()

    def take(self) -> None:
        """Tell the board what was seen since the last call."""
        while not self._seen.empty():
            self._seen.get()()

    def purge(self) -> None:
        """Empty each queue of the services, also where none is yet; raises OSError."""
        with self._broker.connected() as connection:
            channel = connection.channel()
            for queue, arguments in _QUEUES.items():
                channel.queue_declare(queue, durable=True, arguments=arguments)
                channel.queue_purge(queue)

    def _see(self, method: Callable[..., None], *arguments: Any) -> None:
        self._seen.put(partial(method, *arguments))

    def _forever(self, watch: Callable[[], None]) -> None:
        while True:
            with suppress(*NO_ANSWER, CannotPlayError, RuntimeError):
                watch()
            time.sleep(_EVERY_S)

    # Docker.

    def _docker(self) -> None:
        """List the containers. Docker tells of a change too, but of a pause before its list."""
        label, seen = f"label=com.docker.compose.project={self._project}", []
        listing = ("docker", "ps", "--all", "--no-trunc", "--filter", label, "--format", "json")
        found = [json.loads(line) for line in run(listing, os.environ, timeout_s=10).splitlines()]
        before, self._containers = self._containers, {each["ID"] for each in found}
        for each in found:
            name = each["Names"].removeprefix(f"{self._project}-")
            service, _, number = name.rpartition("-")
            if service not in _SHOWN:
                continue
            seen.append((_SHOWN.index(service), number, name, service, *_state(each)))
            if service in SERVICES and each["State"] == "running":
                self._see(self._board.answers, name, _missing(each["Ports"]))
            if service in (*SERVICES, "receiver") and each["ID"] not in before:
                Thread(target=self._log, args=[name, each["ID"]], daemon=True).start()
        self._see(self._board.containers, [card for _, _, *card in sorted(seen)])

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
                self._see(self._board.line, name, json.loads(text))
        elif text.startswith("again "):
            self._see(self._board.repeat, text.removeprefix("again "))
        elif name.startswith("receiver"):
            self._see(self._board.effect, "notify", text)

    # etcd.

    def _changes(self) -> None:
        """Watch all keys behind the last change; an etcd that was wiped begins again."""
        try:
            newest = self._etcd.revision()
        except OSError:
            self._see(self._board.answers, "etcd-1", {"etcd": "does not answer"})
            return
        self._see(self._board.answers, "etcd-1", {})
        self._revision = self._revision if newest >= self._revision else 0
        for changes in self._etcd.watch(self._revision + 1, timeout_s=_SILENT_S):
            for change in changes:
                self._revision = change.revision
                found = re.fullmatch(r"/(?:service/)?(orders|order|notify)/(.+)", change.key)
                if not found or change.kind == "delete":
                    continue
                if found[1] == "orders":
                    self._see(self._board.effect, "order", found[2])
                else:
                    record = json.loads(change.value)
                    self._see(self._board.record, *found.groups(), record["state"], record["token"])

    # RabbitMQ.

    def _depths(self) -> None:
        """Read the depths, over a connection that is kept."""
        read = dict.fromkeys(SERVICES, 0)
        try:
            with self._broker.connected() as connection:
                while True:
                    unacked = self._broker.unacked()
                    ready = _ready(connection, [queue for queue in _QUEUES if queue in unacked])
                    for service in SERVICES:
                        letters = ready.get(dead_letter_queue(service), 0)
                        if letters != read[service]:
                            self._read_dead_letters(connection, service)
                        read[service] = letters
                    self._see(self._board.answers, "rabbitmq-1", {})
                    self._see(self._board.depths, ready, unacked)
                    connection.sleep(_EVERY_S)
        except NO_ANSWER:
            self._see(self._board.answers, "rabbitmq-1", {"rabbitmq": "does not answer"})

    def _read_dead_letters(self, connection: Any, service: str) -> None:
        """Read some, and leave them there: what is not acked goes back with its channel."""
        with connection.channel() as channel:
            for _ in range(_DEAD_LETTERS_AT_ONCE):
                method, properties, _body = channel.basic_get(dead_letter_queue(service))
                if method is None:
                    return
                headers = properties.headers or {}
                why = f"{headers.get('x-reason', 'by RabbitMQ')}: {headers.get('x-error', '')}"
                self._see(self._board.park, service, str(headers.get(_LABEL, "")), why)

    def _produce(self) -> None:
        """Publish in order, each until RabbitMQ has confirmed it and has a queue for it."""
        with self._broker.connected() as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            while True:
                outbox = self.outbox
                if not outbox:
                    connection.sleep(0.02)
                    continue
                label, body = outbox[0]
                properties = pika.BasicProperties(headers={_LABEL: label}, delivery_mode=2)
                channel.basic_publish(EXCHANGE, "play", body, properties, mandatory=True)
                outbox.popleft()
                self._see(self._board.confirm, label)


def _ready(connection: Any, queues: list[str]) -> dict[str, int]:
    """Return the ready messages of each queue: exact, by passive declares."""
    with connection.channel() as channel:
        declared = {queue: channel.queue_declare(queue, passive=True) for queue in queues}
    return {queue: answer.method.message_count for queue, answer in declared.items()}


def _missing(ports: str) -> dict[str, str] | None:
    """Ask a service what it lacks, by what Docker says of its ports; None for no answer."""
    published = re.search(r":(\d+)->8080/tcp", ports)
    try:
        url = f"http://127.0.0.1:{published[1] if published else 0}/readyz"
        missing: dict[str, str] = ask_health(url, timeout_s=1).body["missing"]
    except NO_ANSWER:
        return None
    return missing


def _state(container: dict[str, str]) -> tuple[str, str]:
    """Return Docker's state and status in the page's words: the state, and why."""
    state, status = container["State"], container["Status"]
    if state == "paused":
        return "frozen", ""
    if state != "running":
        return ("killed", "by signal 9") if "(137)" in status else ("stopped", "")
    health = re.search(r"\((health: starting|unhealthy)\)", status)
    return "running", health[1] if health else ""
