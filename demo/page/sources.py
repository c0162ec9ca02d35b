"""Where the board's observations come from: Docker, the services' logs and health, etcd, RabbitMQ.

Each source goes on by itself for as long as the page runs, whatever comes and goes meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, NamedTuple

import aiohttp
import pika
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import AMQPError

from demo.page.board import Board
from demo.stage import SERVICES
from idempotent_consumer import Settings
from idempotent_consumer.bus import queue_arguments

HEADER = "x-play"
"""The header with a publication's label."""

AWAY = (AMQPError, AMQPConnectorException, OSError)
"""What pika raises when RabbitMQ is away, or freezes while one connects."""

_AGAIN_S = 0.25
_DEAD_LETTERS_AT_ONCE = 100
_KILLED = 137
_READY = """
import time
from http.client import HTTPConnection
said = None
while True:
    try:
        connection = HTTPConnection("localhost", 8080, timeout=2)
        connection.request("GET", "/readyz")
        answer = connection.getresponse().read().decode().strip()
    except OSError:
        answer = "null"
    if answer != said:
        print(answer, flush=True)
    said = answer
    time.sleep(0.3)
"""


class Servers(NamedTuple):
    """Where they are; `project` is the compose project."""

    project: str
    amqp_url: str
    management_url: str
    etcd_url: str


class Sources:
    """Feeds the board that `board` returns: after a reset it is another one."""

    def __init__(self, servers: Servers, board: Callable[[], Board]) -> None:
        self._servers, self._board = servers, board
        self._ids: dict[str, str] = {}
        self._followers: dict[str, list[asyncio.Task[None]]] = {}
        self._unacked: dict[str, int] = {}
        self._revision = 0

    async def run(self) -> None:
        """Observe until cancelled."""
        async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as tasks:
            tasks.create_task(self._containers(tasks))
            tasks.create_task(self._etcd(session))
            tasks.create_task(self._count_unacked(session))
            tasks.create_task(self._rabbitmq())

    # Docker.

    async def _containers(self, tasks: asyncio.TaskGroup) -> None:
        """List the containers twice a second.

        Docker tells of a change, but of a pause before its list has it.
        """
        while True:
            await self._list(tasks)
            await asyncio.sleep(2 * _AGAIN_S)

    async def _list(self, tasks: asyncio.TaskGroup) -> None:
        label = f"label=com.docker.compose.project={self._servers.project}"
        listing = ("ps", "--all", "--no-trunc", "--filter", label, "--format", "{{json .}}")
        found = [json.loads(line) async for line in _lines(*listing)]
        ids, seen = {}, []
        for each in found:
            name = _short(each["Names"], self._servers.project)
            service = name.rpartition("-")[0]
            if service in (*SERVICES, "rabbitmq", "etcd", "receiver"):
                ids[name] = each["ID"]
                seen.append((name, service, *_state(each["State"], each["Status"])))
        self._board().containers(seen)
        for name, container in ids.items():
            if self._ids.get(name) != container and name.startswith((*SERVICES, "receiver")):
                self._follow(name, container, tasks)
        for gone in set(self._ids) - set(ids):
            self._unfollow(gone)
        self._ids = ids

    def _follow(self, name: str, container: str, tasks: asyncio.TaskGroup) -> None:
        self._unfollow(name)
        self._followers[name] = [tasks.create_task(self._log(name, container))]
        if name.startswith(SERVICES):
            self._followers[name].append(tasks.create_task(self._health(name, container)))

    def _unfollow(self, name: str) -> None:
        for task in self._followers.pop(name, ()):
            task.cancel()

    async def _log(self, name: str, container: str) -> None:
        """Read each line once; the log ends when the container stops, and may go on."""
        last = "0"
        while True:
            async for line in _lines(
                "logs", "--follow", "--timestamps", "--since", last, container
            ):
                at, _, text = line.partition(" ")
                # Else it is a line of Docker's own, or one that was read before the stop.
                if at[:1].isdigit() and at > last:
                    last = at
                    self._said(name, text)
            await asyncio.sleep(_AGAIN_S)

    def _said(self, name: str, text: str) -> None:
        if name.startswith("receiver"):
            again, _, key = text.rpartition(" ")
            self._board().called(key, again=bool(again))
            return
        with suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict):
                self._board().line(name, line)

    async def _health(self, name: str, container: str) -> None:
        """Ask inside of the container: it publishes no port."""
        while True:
            async for line in _lines("exec", container, "python", "-c", _READY):
                with suppress(ValueError):
                    answer = json.loads(line)
                    self._board().ready(name, answer["missing"] if answer else None)
            self._board().ready(name, None)
            await asyncio.sleep(_AGAIN_S)

    # etcd.

    async def _etcd(self, session: aiohttp.ClientSession) -> None:
        """Watch all keys, and go on behind the last change; an etcd that was wiped begins again."""
        while True:
            try:
                async for answer in self._watch(session):
                    self._answers("etcd", True)
                    for event in answer.get("events", ()):
                        self._changed(event)
                    revision = int(answer["header"]["revision"])
                    if answer.get("canceled"):
                        self._revision = int(answer.get("compact_revision", 1)) - 1
                        break
                    if answer.get("created") and revision < self._revision:
                        self._revision = 0
                        break
                    if answer.get("events"):
                        self._revision = revision
            except (aiohttp.ClientError, OSError, ValueError, KeyError, TimeoutError):
                self._answers("etcd", False)
            await asyncio.sleep(_AGAIN_S)

    async def _watch(self, session: aiohttp.ClientSession) -> AsyncIterator[dict[str, Any]]:
        """Yield what etcd answers, as its gRPC gateway writes it, from the next revision on."""
        every = b64encode(b"\0").decode()
        create = {"key": every, "range_end": every, "start_revision": str(self._revision + 1)}
        url, timeout = f"{self._servers.etcd_url}/v3/watch", aiohttp.ClientTimeout(sock_connect=2)
        body = {"create_request": create}
        async with session.post(url, json=body, timeout=timeout, read_bufsize=2**22) as stream:
            async for line in stream.content:
                yield json.loads(line)["result"]

    def _changed(self, event: dict[str, Any]) -> None:
        if event.get("type") == "DELETE":
            return
        key = b64decode(event["kv"]["key"]).decode(errors="replace")
        if key.startswith("/orders/"):
            self._board().effect(key.removeprefix("/orders/"))
        elif match := re.fullmatch(r"/service/(order|notify)/(.+)", key):
            record = json.loads(b64decode(event["kv"]["value"]))
            self._board().record(match[1], match[2], record["state"], record["token"])

    def _answers(self, server: str, well: bool) -> None:
        self._board().ready(f"{server}-1", {} if well else {server: "does not answer"})

    # RabbitMQ.

    async def _count_unacked(self, session: aiohttp.ClientSession) -> None:
        url = f"{self._servers.management_url}/api/queues?columns=name,messages_unacknowledged"
        login, timeout = aiohttp.BasicAuth("guest", "guest"), aiohttp.ClientTimeout(5)
        while True:
            with suppress(aiohttp.ClientError, OSError, ValueError, TimeoutError):
                async with session.get(url, auth=login, timeout=timeout) as answer:
                    queues = await answer.json()
                    self._unacked = {
                        each["name"]: each.get("messages_unacknowledged", 0) for each in queues
                    }
            await asyncio.sleep(1)

    async def _rabbitmq(self) -> None:
        """Ask for the depths four times a second, over a connection that is kept."""
        connection: Any = None
        while True:
            try:
                connection = connection or await asyncio.to_thread(_connect, self._servers.amqp_url)
                await self._look(connection)
            except AWAY:
                self._answers("rabbitmq", False)
                # Not where this is cancelled: a thread may be asking still.
                await asyncio.to_thread(_close, connection)
                connection = None
            await asyncio.sleep(_AGAIN_S)

    async def _look(self, connection: Any) -> None:
        queues = [name for name in self._unacked if name.startswith(SERVICES)]
        ready = await asyncio.to_thread(_ready, connection, queues)
        board = self._board()
        self._answers("rabbitmq", True)
        for service, lane in board.lanes.items():
            queue = f"{service}.dead-letter"
            if ready.get(queue, 0) != len(lane.parked):
                for label, reason, error in await asyncio.to_thread(_peek, connection, queue):
                    board.park(service, label, reason, error)
        board.depths(ready, self._unacked, time.monotonic())


def _connect(url: str) -> Any:
    parameters = pika.URLParameters(url)
    parameters.heartbeat = 4
    parameters.socket_timeout = parameters.stack_timeout = 2
    return pika.BlockingConnection(parameters)


def _close(connection: Any) -> None:
    with suppress(*AWAY):
        if connection is not None:
            connection.close()


def _ready(connection: Any, queues: list[str]) -> dict[str, int]:
    """Return the ready messages of each queue that is there: exact, by passive declares."""
    found = {}
    channel = connection.channel()
    for queue in queues:
        found[queue] = channel.queue_declare(queue, passive=True).method.message_count
    channel.close()
    return found


def _peek(connection: Any, queue: str) -> list[tuple[str, str, str]]:
    """Read dead letters, and leave them there: label, reason and error."""
    found, channel = [], connection.channel()
    for _ in range(_DEAD_LETTERS_AT_ONCE):
        method, properties, _body = channel.basic_get(queue)
        if method is None:
            break
        headers = properties.headers or {}
        said = (HEADER, "x-reason", "x-error")
        label, reason, error = (str(headers.get(header, "")) for header in said)
        found.append((label, reason or "by RabbitMQ", error))
    channel.close()  # What it has not acked goes back.
    return found


def purge(url: str) -> None:
    """Empty each queue of the services, those of retries and dead letters too; raises OSError."""
    try:
        connection = _connect(url)
        channel = connection.channel()
        for service in SERVICES:
            for queue in queue_arguments(service, Settings().retry_delays):
                channel.queue_purge(queue)
        connection.close()
    except AWAY as error:
        raise OSError(f"RabbitMQ does not answer: {error!r}") from error


async def _lines(*arguments: str) -> AsyncIterator[str]:
    """Run docker and yield its lines, of both streams; it ends with whoever reads them."""
    process = await asyncio.create_subprocess_exec(
        "docker",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=os.environ,
        limit=2**20,
    )
    assert process.stdout is not None
    try:
        async for line in process.stdout:
            yield line.decode(errors="replace").rstrip("\n")
    except BaseException:
        # Only where it has not ended by itself: asyncio would miss the end that this collects.
        with suppress(ProcessLookupError):
            process.kill()
        raise
    finally:
        await process.wait()


def _short(name: str, project: str) -> str:
    return name.removeprefix(f"{project}-")


def _state(state: str, status: str) -> tuple[str, str]:
    """Return Docker's state and status in the page's words: the state, and why."""
    if state == "paused":
        return "frozen", ""
    if state != "running":
        code = re.search(r"\((\d+)\)", status)
        killed = code is not None and int(code[1]) == _KILLED
        return ("killed", "by signal 9") if killed else ("stopped", "")
    health = re.search(r"\((health: starting|unhealthy)\)", status)
    return "running", health[1] if health else ""
