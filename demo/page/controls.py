"""What the page's buttons do: a fixed list of actions on the containers of one project.

A request chooses only the key of a button and the name of an existing process.
"""

import asyncio
import time
import tomllib
from asyncio import to_thread
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from demo.compose import Compose, ComposeStage
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
    "caption": "Press a button, or its key.",
}
"""What the page shows beside the board: its settings, and what happens."""

_SERVERS = {"rabbitmq": 1, "etcd": 1, "receiver": 1}
_MOST_REPLICAS = 3
_BEAT_S, _A_BEAT = 0.1, 10
_WITHIN_S = 90.0


class Button(NamedTuple):
    """A button's group and label, and its action, given the process to act on."""

    group: str
    label: str
    work: Callable[[str], Coroutine[Any, Any, None]]


class Controls:
    """The buttons by their keys. Their actions run in `tasks`."""

    def __init__(self, compose: Compose, sources: Sources, tasks: asyncio.TaskGroup) -> None:
        self.told: dict[str, Any] = dict(_AT_FIRST)
        self._compose, self._sources, self._tasks = compose, sources, tasks
        self._board, self._replicas = sources.board, dict.fromkeys(SERVICES, 1)
        self._stack, self._play = asyncio.Lock(), asyncio.Lock()
        self._playing, self._ends = "", False
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
        for name, steps in ACTS.items():
            key, _, label = name.partition(" ")
            self.buttons[key] = Button("Acts", label, partial(self._act, label, steps))

    async def run(self) -> None:
        """Publish a tenth of the rate ten times a second."""
        while True:
            await self._publish("new", _A_BEAT if self.told["rate"] else 0)
            await asyncio.sleep(_BEAT_S)

    def press(self, key: str, target: str) -> None:
        """Start a button's action; some buttons act on the process `target`. Raises KeyError."""
        button = self.buttons[key]
        if button.group not in (CHOSEN, DIES):
            target = ""
        elif target not in self._board.processes:
            self.told["caption"] = f"{target} is gone"  # The page may not know yet.
            return
        elif not self._play.locked():
            self.told["caption"] = f"{target}: {button.label}"
        self._tasks.create_task(self._told(button.work(target)))

    def snapshot(self) -> dict[str, Any]:
        """Return everything that the page shows, including its buttons."""
        buttons = [(button.group, key, button.label) for key, button in self.buttons.items()]
        return self._board.snapshot() | self.told | {"buttons": buttons}

    async def _told(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except (CannotPlayError, OSError) as error:
            self.told["caption"] = str(error)

    async def _process(self, verb: str, name: str) -> None:
        try:
            await to_thread(self._compose.docker, verb, name)
        except CommandFailedError:
            state = getattr(self._board.processes.get(name), "state", "gone")
            raise CannotPlayError(f"{name} is {state}: no {verb}") from None

    async def _receiver(self, mood: str, _: str) -> None:
        await self._process("stop" if mood == "down" else "start", "receiver-1")
        if mood != "down":
            command = ("sh", "-c", f"echo {mood} >/tmp/receiver/mood")
            await to_thread(self._compose.docker, "exec", "receiver-1", *command)
        self.told["receiver"] = mood

    async def _scale(self, by: int, name: str) -> None:
        async with self._stack:
            service = self._service(name)
            replicas = self._replicas[service] + by
            if 0 < replicas <= _MOST_REPLICAS:
                await to_thread(self._compose.up, {service: replicas}, "--no-recreate")
                self._replicas[service] = replicas

    async def _die(self, points: Mapping[str, str], name: str) -> None:
        async with self._stack:
            service = self._service(name)
            await to_thread(self._compose.up, {service: 1}, point=points[service])
            self._replicas[service] = 1
        if not self._play.locked():
            self.told["caption"] = f"{service} will kill itself, once: publish an event."

    async def _publish(self, kind: Kind, times: int, _: str = "") -> None:
        self._sources.outbox += [self._board.publish(kind) for _i in range(times)]

    async def _rate(self, _: str) -> None:
        self.told["rate"] = not self.told["rate"]

    async def _memory(self, wanted: str) -> None:
        """Run both services with records in etcd ("on") or without ("off"); "" switches."""
        async with self._stack:
            on = {"on": True, "off": False}.get(wanted, not self.told["memory"])
            self._compose.set(ENABLE_ETCD="true" if on else "false")
            await to_thread(self._compose.up, self._replicas)
            await self._until(lambda: {each.has_records for each in self._running()} == {on})
            self.told["memory"] = on

    async def _wipe(self, _: str) -> None:
        async with self._stack:
            await to_thread(self._compose.wipe, "etcd")

    async def _heal(self, _: str) -> None:
        async with self._stack:
            await to_thread(self._compose.up, _SERVERS)
            # Separately: Compose would wait for healthy servers, and fail if one is not healthy.
            await to_thread(self._compose.up, self._replicas)
        await self._receiver("well", "")

    async def reset(self, _: str = "") -> None:
        """Begin a round, also the first: one replica of each service, with etcd, empty queues."""
        self.told["rate"], self._ends = False, True  # A running act ends after its current command.
        async with self._play, self._stack:
            self._playing, self._ends = "The reset", False
            self.told["caption"], self._sources.outbox = "A new round begins ...", deque()
            # They hold events of the last round, and new replicas are numbered from 1.
            await to_thread(self._compose.remove, *SERVICES)
            await to_thread(self._compose.up, _SERVERS)
            await self._until(lambda: not self._running())
            purge = partial(self._sources.broker.purge, QUEUES)
            await to_thread(eventually, purge, _WITHIN_S, also=(OSError,))
            self._sources.outbox = deque()  # Drop what the last round published meanwhile.
            self._board.begin()
            self.told = dict(_AT_FIRST)
            self._compose.set(ENABLE_ETCD="true", NOTIFY_URL=ComposeStage.receiver_url)
            self._replicas = dict.fromkeys(SERVICES, 1)
            await to_thread(self._compose.up, self._replicas)
        await self._receiver("well", "")

    async def _act(self, label: str, steps: list[Any], _: str) -> None:
        """Play an act, one at a time: press each step's keys and wait for its numbers to grow."""
        if self._play.locked():
            raise CannotPlayError(f"{self._playing} is not over yet.")
        async with self._play:
            self._playing, shown = label, self._board.snapshot
            for text, presses, grows in steps:
                self.told["caption"], before = text, shown()["numbers"]
                for press in presses.split():
                    key, _, target = press.partition(":")
                    await self.buttons[key].work(target)
                goals = Counter({name: before[name] + more for name, more in grows.items()})
                await self._until(lambda: shown()["numbers"] >= goals)  # noqa: B023 - awaited here

    async def _until(self, seen: Callable[[], bool]) -> None:
        """Wait until `seen` is true. Raises CannotPlayError after 90 s, or at a reset."""
        deadline = time.monotonic() + _WITHIN_S
        while self._ends or not seen():
            if self._ends or time.monotonic() > deadline:
                raise CannotPlayError(f"Not seen within {_WITHIN_S:g} s: {self.told['caption']}")
            await asyncio.sleep(_BEAT_S)

    def _service(self, name: str) -> str:
        service = name.rpartition("-")[0]
        if service not in SERVICES:
            raise CannotPlayError(f"{name}: that is for order and notify")
        return service

    def _running(self) -> list[Process]:
        return [each for each in self._board.processes.values() if each.service in SERVICES]
