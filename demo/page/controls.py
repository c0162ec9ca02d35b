"""What the page's buttons do: a fixed list of actions, on the containers of one project.

Nothing here comes from a request but the key of a button, and the name of a process that there is.
"""

from __future__ import annotations

import asyncio
import time
import tomllib
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from demo.compose import Compose
from demo.page.board import Kind, Process
from demo.page.sources import QUEUES, Sources
from demo.stage import SERVICES
from demo.steps import CannotPlayError, CommandFailedError
from servers.wait import eventually

ACTS: dict[str, list[Any]] = tomllib.loads(Path(__file__).with_name("acts.toml").read_text())

CHOSEN, DIES = "Chosen process", "Dies by itself, once"
_BEFORE_RECORD = {"order": "handler left:1", "notify": "call made:1"}
_BEFORE_ACK = {"order": "reply read:1", "notify": "claim completed:1"}
_AFTER_ACK = {"order": "after ack:1", "notify": "after ack:1"}

_AT_FIRST = {
    "memory": True,
    "rate": False,
    "receiver": "well",
    "playing": "",
    "caption": "Press a button, or its key.",
}
"""What the page says beside the board: how it is set, what plays, and what happens."""

_MOST_REPLICAS = 3
_BEAT_S, _A_BEAT = 0.1, 10
_WITHIN_S = 90.0


class Button(NamedTuple):
    """Where it stands, what it says, and what it does, given what it acts on."""

    group: str
    label: str
    work: Callable[[str], Coroutine[Any, Any, None]]


class Controls:
    """The stack's buttons, by their keys. Their work goes on in `tasks`."""

    def __init__(self, compose: Compose, sources: Sources, tasks: asyncio.TaskGroup) -> None:
        self.told: dict[str, Any] = dict(_AT_FIRST)
        self._compose, self._sources, self._tasks = compose, sources, tasks
        self._board = sources.board
        self._stack = asyncio.Lock()
        self._act: asyncio.Task[None] | None = None
        self.buttons = {
            "s": Button(CHOSEN, "Stop", partial(self._process, "stop")),
            "g": Button(CHOSEN, "Start", partial(self._process, "start")),
            "k": Button(CHOSEN, "Kill -9", partial(self._process, "kill")),
            "f": Button(CHOSEN, "Freeze", partial(self._process, "pause")),
            "t": Button(CHOSEN, "Thaw", partial(self._process, "unpause")),
            "+": Button(CHOSEN, "Replica", partial(self._scale, 1)),
            "-": Button(CHOSEN, "Replica", partial(self._scale, -1)),
            "q": Button("Receiver", "Well", partial(self._receiver, "well")),
            "l": Button("Receiver", "Slow", partial(self._receiver, "slow")),
            "e": Button("Receiver", "Failing", partial(self._receiver, "failing")),
            "d": Button("Receiver", "Down", partial(self._receiver, "down")),
            "/": Button(DIES, "Before its record", partial(self._die, _BEFORE_RECORD)),
            "j": Button(DIES, "Between record and ack", partial(self._die, _BEFORE_ACK)),
            ".": Button(DIES, "After its ack", partial(self._die, _AFTER_ACK)),
            "m": Button("etcd", "ENABLE_ETCD", self._memory),
            "w": Button("etcd", "Wipe", self._wipe),
            "u": Button("All", "All well", self._heal),
            "r": Button("All", "Reset", self.reset),
            "p": Button("Publish", "One", partial(self._publish, "new", 1)),
            "o": Button("Publish", "Ten", partial(self._publish, "new", 10)),
            "h": Button("Publish", "100/s", self._rate),
            "a": Button("Publish", "The same again", partial(self._publish, "again", 1)),
            "b": Button("Publish", "Same id, other body", partial(self._publish, "other", 1)),
            "i": Button("Publish", "Invalid", partial(self._publish, "invalid", 1)),
        }
        for key, (label, *steps) in ACTS.items():
            self.buttons[key] = Button("Acts", label, partial(self._play, label, steps))

    async def run(self) -> None:
        """Publish at the rate, ten times a second."""
        while True:
            await self._publish("new", _A_BEAT if self.told["rate"] else 0)
            await asyncio.sleep(_BEAT_S)

    def press(self, key: str, target: str) -> None:
        """Begin what a button does, to a process if it is for one; raises KeyError."""
        button = self.buttons[key]
        is_for_one = button.group in (CHOSEN, DIES)
        if is_for_one and target not in self._board.processes:
            self.told["caption"] = f"{target} is gone"  # The page may not know yet.
            return
        if is_for_one and not self.told["playing"]:
            self.told["caption"] = f"{target}: {button.label}"
        self._tasks.create_task(self._told(button.work(target if is_for_one else "")))

    def snapshot(self) -> dict[str, Any]:
        """Return all that the page shows, its buttons too."""
        buttons = [(button.group, key, button.label) for key, button in self.buttons.items()]
        return self._board.snapshot() | self.told | {"buttons": buttons}

    async def _told(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except (CannotPlayError, OSError) as error:
            self.told["caption"] = str(error)

    async def _process(self, verb: str, name: str) -> None:
        if verb in ("stop", "start"):
            await self._quietly([name], "unpause")  # A frozen one would not hear of it.
        try:
            await self._docker(verb, name)
        except CommandFailedError:
            state = getattr(self._board.processes.get(name), "state", "gone")
            raise CannotPlayError(f"{name} is {state}: no {verb}") from None

    async def _receiver(self, mood: str, _: str) -> None:
        await self._process("stop" if mood == "down" else "start", "receiver-1")
        if mood != "down":
            await self._docker("exec", "receiver-1", "sh", "-c", f"echo {mood} >/tmp/receiver/mood")
        self.told["receiver"] = mood

    async def _scale(self, by: int, name: str) -> None:
        async with self._stack:
            service = self._service(name)
            replicas = self._replicas()[service] + by
            if 0 < replicas <= _MOST_REPLICAS:
                await self._up("--no-recreate", **{service: replicas})
                await self._until(lambda: self._replicas()[service] == replicas)

    async def _die(self, points: Mapping[str, str], name: str) -> None:
        async with self._stack:
            service = self._service(name)
            await self._quietly([name], "unpause")
            await _run(self._compose.crash_at, points[service], service)
        if not self.told["playing"]:
            self.told["caption"] = f"{service} will kill itself, once: publish an event."

    async def _publish(self, kind: Kind, times: int, _: str = "") -> None:
        self._sources.outbox += [self._board.publish(kind) for _i in range(times)]

    async def _rate(self, _: str) -> None:
        self.told["rate"] = not self.told["rate"]

    async def _memory(self, wanted: str) -> None:
        """Run both services with records in etcd ("on") or without, or the other way round."""
        async with self._stack:
            on = wanted == "on" or (wanted != "off" and not self.told["memory"])
            self._compose.set(ENABLE_ETCD="true" if on else "false")
            await self._up(**self._replicas())
            replicas = partial(self._containers, *SERVICES)
            await self._until(lambda: {each.has_records for each in replicas().values()} == {on})
            self.told["memory"] = on

    async def _wipe(self, _: str) -> None:
        async with self._stack:
            await _run(self._compose.wipe, "etcd")
            await self._up(etcd=1)

    async def _heal(self, _: str) -> None:
        async with self._stack:
            await self._up(rabbitmq=1, etcd=1, receiver=1)
            # Apart: else Compose waits until they are healthy, and gives up where one is not.
            await self._up(**self._replicas())
        await self._receiver("well", "")

    async def reset(self, _: str = "") -> None:
        """Begin a round, also the first: one replica each, with memory, nothing queued."""
        self.told["rate"] = False
        if self._act is not None:
            self._act.cancel()
            await asyncio.wait([self._act])
        async with self._stack:
            # What they hold is not of the round that begins, and new ones are numbered from 1.
            await self._quietly(self._containers(*SERVICES), "rm", "--force")
            await self._up(rabbitmq=1, etcd=1, receiver=1)
            await self._until(lambda: not self._containers(*SERVICES))
            purge = partial(self._sources.broker.purge, QUEUES)
            await _run(eventually, purge, _WITHIN_S, also=(OSError,))
            self._sources.outbox = deque()
            self._board.begin()
            self.told = dict(_AT_FIRST)
            self._compose.set(ENABLE_ETCD="true", NOTIFY_URL="http://receiver:8000")
            await self._up(order=1, notify=1)
        await self._receiver("well", "")

    async def _play(self, label: str, steps: list[Any], _: str) -> None:
        """Play it, one at a time; a reset ends it."""
        if self.told["playing"]:
            raise CannotPlayError(f"{self.told['playing']} is still played.")
        self.told["playing"], self._act = label, asyncio.current_task()
        try:
            for step in steps:
                await self._step(*step)
        finally:
            self.told["playing"] = ""

    async def _step(self, text: str, presses: str, grows: Mapping[str, int]) -> None:
        """Say what it does, press buttons, and wait until numbers of the board have grown."""
        self.told["caption"], before = text, self._board.snapshot()["numbers"]
        for press in presses.split():
            key, _, target = press.partition(":")
            await self.buttons[key].work(target)
        goals = Counter({name: before[name] + more for name, more in grows.items()})
        await self._until(lambda: self._board.snapshot()["numbers"] >= goals)

    async def _until(self, seen: Callable[[], bool]) -> None:
        """Wait until the board shows something; raises CannotPlayError if it does not."""
        deadline = time.monotonic() + _WITHIN_S
        while not seen():
            if time.monotonic() > deadline:
                raise CannotPlayError(f"Not seen within {_WITHIN_S:g} s: {self.told['caption']}")
            await asyncio.sleep(_BEAT_S)

    def _service(self, name: str) -> str:
        service = name.rpartition("-")[0]
        if service not in SERVICES:
            raise CannotPlayError(f"{name}: that is for order and notify")
        return service

    def _containers(self, *services: str) -> dict[str, Process]:
        found = self._board.processes.items()
        return {name: process for name, process in found if process.service in services}

    def _replicas(self) -> dict[str, int]:
        return {service: len(self._containers(service)) or 1 for service in SERVICES}

    async def _docker(self, verb: str, name: str, *arguments: str) -> None:
        await _run(self._compose.docker, verb, name, *arguments)

    async def _quietly(self, names: Iterable[str], verb: str, *arguments: str) -> None:
        """Do it to each for which there is something to do."""
        for name in names:
            with suppress(CommandFailedError):
                await self._docker(verb, name, *arguments)

    async def _up(self, *flags: str, **replicas: int) -> None:
        await self._quietly(self._containers(*replicas), "unpause")
        await _run(self._compose.up, *flags, **replicas)


async def _run(command: Callable[..., object], *arguments: Any, **named: Any) -> None:
    """Run a command on a thread; one that is cancelled ends first, or the next would run beside."""
    work = partial(command, *arguments, **named)
    running, cancelled = asyncio.get_running_loop().run_in_executor(None, work), None
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError as error:  # It may be cancelled once more, as by two resets.
            cancelled = error
    if cancelled:
        raise cancelled from running.exception()
    running.result()
