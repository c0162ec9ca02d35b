"""What the page's buttons do: a fixed list of actions, on the containers of one project.

Nothing here comes from a request but the name of an action, and of a process that there is.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from demo.command import CommandFailedError, run
from demo.compose import Compose
from demo.page.board import Board, Kind
from demo.page.publisher import Message, Publisher
from demo.page.sources import purge
from demo.stage import SERVICES, CannotPlayError

Work = Callable[[], Coroutine[Any, Any, None]]

MOST_REPLICAS = 3
_RATE_PER_S, _AT_A_TIME = 100, 10
_WITHIN_S = 60.0
_MOODS = {"well": "HUP", "slow": "USR1", "failing": "USR2"}
_LISTENS = "import socket; socket.create_connection(('localhost', 8000), timeout=1)"
_ON_PROCESS: dict[str, Sequence[str]] = {
    "stop": ("stop", "--time", "10"),
    "start": ("start",),
    "kill": ("kill", "--signal", "KILL"),
    "freeze": ("pause",),
    "thaw": ("unpause",),
}


class RefusedError(Exception):
    """There is no such action, or nothing that it could be done to; the message says which."""


@dataclass
class Told:
    """What the page says beside the board: how it is set, what plays, and what happens."""

    memory: bool = True
    rate: bool = False
    receiver: str = "well"
    playing: str = ""
    caption: str = "Press a button, or its key."
    round: str = ""


class Controls:
    """The stack's buttons. `board` is the round's; `reset` begins another."""

    def __init__(self, compose: Compose, project: str, amqp_url: str) -> None:
        self.board, self.told = Board(), Told()
        self._compose, self._project, self._amqp_url = compose, project, amqp_url
        self._loop = asyncio.get_running_loop()
        self.publisher = Publisher(amqp_url, self._sent, self._confirmed)
        self.told.round = self.publisher.round
        self._stack = asyncio.Lock()
        self._each: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._rate: asyncio.Task[None] | None = None
        self._play: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._actions: dict[str, Work] = {
            "one": partial(self.publish, "new"),
            "ten": partial(self.publish, "new", 10),
            "rate": self._toggle_rate,
            "again": partial(self.publish, "again"),
            "other": partial(self.publish, "other"),
            "invalid": partial(self.publish, "invalid"),
            "memory": self._toggle_memory,
            "wipe": self.wipe,
            **{mood: partial(self.receiver, mood) for mood in (*_MOODS, "down")},
            "heal": self.heal,
            "reset": self.reset,
        }

    def add(self, name: str, title: str, play: Work) -> None:
        """Add an act: one is played at a time, and a reset ends it."""
        self._actions[name] = partial(self._begin, title, play)

    def press(self, action: str, target: str) -> None:
        """Begin what a button does; raises RefusedError."""
        if action in self._actions:
            work = self._actions[action]()
        elif action in _ON_PROCESS or action in ("more", "less"):
            if target not in self.board.processes:
                raise RefusedError(f"there is no process {target!r}")
            work = self._on(action, target)
        else:
            raise RefusedError(f"there is no action {action!r}")
        self._spawn(self._told(work))

    async def end(self) -> None:
        """End what is under way."""
        self.publisher.end()
        tasks = [task for task in (*self._tasks, self._rate, self._play) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # The producer.

    async def publish(self, kind: Kind, times: int = 1) -> None:
        """Publish so many."""
        for _ in range(times):
            self.publisher.publish(kind)

    def _sent(self, message: Message) -> None:
        self.board.sent(message.label, message.event_id, message.kind)

    def _confirmed(self, message: Message) -> None:
        board, now_s = self.board, time.monotonic()
        self._loop.call_soon_threadsafe(board.confirm, message.label, now_s)

    async def _toggle_rate(self) -> None:
        self.told.rate = not self.told.rate
        if self.told.rate and self._rate is None:
            self._rate = asyncio.create_task(self._publish_at_rate())

    async def _publish_at_rate(self) -> None:
        due_s = time.monotonic()
        while self.told.rate:
            await self.publish("new", _AT_A_TIME)
            due_s = max(due_s + _AT_A_TIME / _RATE_PER_S, time.monotonic())
            await asyncio.sleep(due_s - time.monotonic())
        self._rate = None

    # One process.

    async def _on(self, action: str, name: str) -> None:
        process = self.board.processes[name]
        if not self.told.playing:
            self.say(f"{name}: {action}")
        if action not in _ON_PROCESS:
            await self._scale(process.service, action)
            return
        try:
            await self.process(action, name)
        except CommandFailedError:
            raise RefusedError(f"{name} is {process.state}: no {action}") from None

    async def process(self, action: str, name: str) -> None:
        """Stop, start, kill, freeze or thaw a process."""
        async with self._each[name]:
            if action == "stop":
                await self._thaw([name])  # A frozen one does not hear of it.
            await self._docker(*_ON_PROCESS[action], self._container(name))

    async def receiver(self, mood: str) -> None:
        """Have the receiver well, slow, failing or down."""
        name = "receiver-1"
        if mood == "down":
            await self.process("stop", name)
        else:
            async with self._each[name]:
                await self._thaw([name])
                await self._docker("start", self._container(name))
                # Before it listens a signal would end it.
                listens = ("exec", self._container(name), "python", "-c", _LISTENS)
                await self._try(partial(self._docker, *listens))
                await self._docker("kill", "--signal", _MOODS[mood], self._container(name))
        self.told.receiver = mood

    # All of them.

    async def _scale(self, service: str, action: str) -> None:
        if service not in SERVICES:
            raise RefusedError(f"{service} has one process")
        async with self._stack:
            wanted = len(self._of(service)) + (1 if action == "more" else -1)
            await self._up({service: max(1, min(wanted, MOST_REPLICAS))}, "--no-recreate")

    async def _toggle_memory(self) -> None:
        await self.memory(not self.told.memory)

    async def memory(self, on: bool) -> None:
        """Run both services again, with records in etcd or without."""
        async with self._stack:
            self._compose.set(ENABLE_ETCD="true" if on else "false")
            self.told.memory = on
            await self._up({service: len(self._of(service)) or 1 for service in SERVICES})

    async def wipe(self) -> None:
        """Remove etcd with its data, and start one that has none."""
        async with self._stack:
            await self._compose_run("rm", "--stop", "--force", "etcd")
            await self._docker("volume", "rm", f"{self._project}_etcd-data")
            await self._compose_run("up", "--detach", "--no-deps", "etcd")

    async def heal(self) -> None:
        """Have each process run, and the receiver well."""
        async with self._stack:
            await self._heal_servers()
            await self._up({service: len(self._of(service)) or 1 for service in SERVICES})
        await self.receiver("well")

    async def reset(self) -> None:
        """Begin another round as at the start: one replica each, with memory, nothing queued."""
        self.told.rate = False
        if self._play is not None:
            self._play.cancel()
        async with self._stack:
            self.publisher.begin()
            replicas = [self._container(each) for each in self._of(*SERVICES)]
            # Killed, for they may hold much; what they hold is not of the round that begins.
            await self._quietly("kill", *replicas)
            await self._heal_servers()
            await self._try(partial(asyncio.to_thread, purge, self._amqp_url))
            self.publisher.begin()
            self.board = self.board.next_round()
            self._compose.set(ENABLE_ETCD="true")
            await self._up(dict.fromkeys(SERVICES, 1))
        await self.receiver("well")
        self.told = Told(round=self.publisher.round)

    async def start(self) -> None:
        """Start the services and the receiver, as a reset leaves them."""
        self._compose.set(ENABLE_ETCD="true", NOTIFY_URL="http://receiver:8000")
        await self._compose_run("up", "--detach", "--no-deps", "--no-build", "receiver", *SERVICES)

    async def _heal_servers(self) -> None:
        await self._thaw(list(self.board.processes))
        servers = [self._container(f"{name}-1") for name in ("rabbitmq", "etcd", "receiver")]
        await self._docker("start", *servers)

    async def _up(self, replicas: dict[str, int], *flags: str) -> None:
        await self._thaw(self._of(*replicas))
        scale = [f"--scale={service}={number}" for service, number in replicas.items()]
        await self._compose_run(
            "up", "--detach", "--no-deps", "--no-build", *flags, *scale, *replicas
        )

    # Acts.

    async def _begin(self, title: str, play: Work) -> None:
        if self._play is not None and not self._play.done():
            self.told.caption = f"{self.told.playing} is still played."
            return
        self.told.playing = title
        self._play = asyncio.create_task(self._played(play))

    async def _played(self, play: Work) -> None:
        try:
            await self._told(play())
        finally:
            self.told.playing = ""

    def say(self, text: str) -> None:
        """Say what happens, in the page's live region."""
        self.told.caption = text

    async def until(self, seen: Callable[[], bool], within_s: float = _WITHIN_S) -> None:
        """Wait until the board shows something; raises RefusedError if it does not."""
        deadline = time.monotonic() + within_s
        while not seen():
            if time.monotonic() > deadline:
                raise RefusedError(f"It was not seen within {within_s:g} s: {self.told.caption}")
            await asyncio.sleep(0.1)

    # Commands.

    async def _told(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except (CannotPlayError, RefusedError) as error:
            self.told.caption = str(error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _try(self, work: Work) -> None:
        """Do it as soon as it can be done; raises CannotPlayError."""
        deadline = time.monotonic() + _WITHIN_S
        while True:
            try:
                return await work()
            except (OSError, CannotPlayError) as error:
                if time.monotonic() > deadline:
                    raise CannotPlayError(str(error)) from None
            await asyncio.sleep(0.1)

    def _of(self, *services: str) -> list[str]:
        return [each.name for each in self.board.processes.values() if each.service in services]

    def _container(self, name: str) -> str:
        return f"{self._project}-{name}"

    async def _thaw(self, names: list[str]) -> None:
        frozen = [name for name in names if self.board.processes[name].state == "frozen"]
        if frozen:
            await self._quietly("unpause", *map(self._container, frozen))

    async def _quietly(self, *arguments: str) -> None:
        """Run a docker command that may find nothing to do."""
        try:
            await self._docker(*arguments)
        except CannotPlayError:
            return

    async def _docker(self, *arguments: str) -> None:
        command = partial(run, ["docker", *arguments], os.environ, timeout_s=_WITHIN_S)
        await asyncio.to_thread(command)

    async def _compose_run(self, *arguments: str) -> None:
        await asyncio.to_thread(partial(self._compose.run, *arguments, timeout_s=_WITHIN_S))
