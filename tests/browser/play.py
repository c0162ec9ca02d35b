"""`make play` as its own process, and its page in the browser."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from browser.chromium import Chromium
from demo.broker import Broker
from demo.compose import Ports
from demo.page.__main__ import PROJECT
from servers.etcd import EtcdClient
from servers.processes import Child
from servers.servers import REPOSITORY
from servers.wait import eventually

_UP_WITHIN_S = 240.0
_DOWN_WITHIN_S = 90.0
_PROCESSES = ("rabbitmq-1", "etcd-1", "receiver-1", "order-1", "notify-1")

_SEEN = """
const all = (selector, pair) =>
  Object.fromEntries([...document.querySelectorAll(selector)].map(pair))
const text = (selector) => document.querySelector(selector).textContent
const process = (card) => card.querySelector("b").textContent
return {
  ...all("[data-number]", (each) => [each.dataset.number, Number(each.textContent)]),
  ...all("nav [aria-pressed]", (each) => [each.dataset.key, each.ariaPressed]),
  ...all(".process", (each) => [process(each), each.querySelector("i").textContent]),
  ...all(".process", (each) => ["why " + process(each), each.querySelector("small").textContent]),
  numbers: all(".process", (each) => [process(each), each.dataset.key]),
  dots: [...document.querySelectorAll(".dot")].map((each) => each.title).join("; "),
  round: document.body.dataset.round,
  caption: text("#caption"), told: text("#told"), receiver: text("#receiver"),
}
"""


class Play:
    """The running page, open in the browser. Made by `start_play`."""

    def __init__(self, chromium: Chromium, ports: Ports) -> None:
        self.chromium, numbers = chromium, ports.numbers
        self.url = f"http://127.0.0.1:{numbers['PORT_PLAY']}"
        self.etcd = EtcdClient(f"127.0.0.1:{numbers['PORT_ETCD']}", timeout_s=5)
        self._broker = Broker(ports.host, numbers["PORT_RABBITMQ"], numbers["PORT_RABBITMQ_UI"])

    def open(self, size: tuple[int, int], *, scheme: str = "light") -> None:
        """Open it, and wait until it shows the stack."""
        self.chromium.prefer(scheme)
        self.chromium.open(self.url, *size)
        self.shows(60, numbers=lambda numbers: len(numbers) >= len(_PROCESSES))

    def press(self, presses: str) -> None:
        """Press keys, as in "k:order-1 p": a process that one acts on is chosen before."""
        for press in presses.split():
            key, _, process = press.partition(":")
            self.chromium.keys((self.seen()["numbers"][process] if process else "") + key)

    def seen(self) -> Any:
        """Return what the page shows."""
        return self.chromium.run(_SEEN)

    def shows(self, within_s: float = 40.0, /, **expected: Any) -> None:
        """Wait for this: a value, a part of a text, or what a function takes.

        What the page does not show the servers are asked for.
        """

        def shown() -> None:
            seen = self.seen()
            seen |= {name: self._ask(name, seen) for name in expected.keys() - seen.keys()}
            for name, value in expected.items():
                assert _fits(seen.get(name), value), (name, value, seen)

        eventually(shown, within_s, also=(OSError,))

    def _ask(self, name: str, seen: Any) -> Any:
        """Return a container's state, the depth of a queue, or the number of the round's orders."""
        if name == "/orders/":
            return self.etcd.count(f"/orders/{seen['round']}-")
        if name.endswith(".dead-letter"):
            return self._broker.waiting(name)
        container = f"name=^{PROJECT.name}-{name.removeprefix('docker ')}$"
        listing = ["docker", "ps", "--all", "--format", "{{.State}}", "--filter", container]
        return subprocess.check_output(listing, text=True).strip()

    def reset(self) -> None:
        """Begin another round, and wait for it."""
        before = self.seen()["round"]
        self.press("r")
        running = dict.fromkeys(_PROCESSES, "running")
        self.shows(round=lambda after: after != before, published=0, m="true", **running)


def _fits(seen: Any, expected: Any) -> bool:
    if callable(expected):
        return bool(expected(seen))
    return expected in seen if expected and isinstance(seen, str) else bool(seen == expected)


@contextmanager
def start_play(chromium: Chromium, directory: Path) -> Iterator[Play]:
    """Run the page's program while the block runs, and check that it leaves nothing behind."""
    ports, command = Ports.read(PORT_PLAY="8090").elsewhere(), [sys.executable, "-m", "demo.page"]
    settings, log = {**os.environ, **ports.settings()}, directory / "play.log"
    program = Child(command, env=settings, cwd=REPOSITORY, log=log)
    program.start()
    try:
        eventually(lambda: _is_open(program), _UP_WITHIN_S)
        yield Play(chromium, ports)
    finally:
        assert program.terminate(_DOWN_WITHIN_S) == 0, program.output()
    label = f"label=com.docker.compose.project={PROJECT.name}"
    assert not subprocess.check_output(["docker", "ps", "--all", "--quiet", "--filter", label])


def _is_open(program: Child) -> None:
    if not program.running:
        raise RuntimeError(program.output())
    assert "Open http://localhost" in program.output()
