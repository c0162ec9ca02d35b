"""`make play` as its own process, and its page in the browser."""

from __future__ import annotations

import os
import signal
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
from servers.processes import free_port
from servers.servers import REPOSITORY
from servers.wait import eventually

_UP_WITHIN_S = 240.0
_DOWN_WITHIN_S = 90.0

DESK, PHONE = (1280, 720), (390, 844)

_SEEN = """
const text = (selector) => document.querySelector(selector).textContent
const of = (service) => Object.fromEntries(
  [...document.querySelectorAll(`#${service} [data-of]`)].map(
    (station) => [station.dataset.of, Number(station.querySelector("b").textContent)]))
return {
  round: document.body.dataset.round,
  lost: Number(text("#lost")), double: Number(text("#double")), caption: text("#caption"),
  published: Number(text("#published")), confirmed: Number(text("#confirmed")),
  calls: Number(text("#calls")), repeated: Number(text("#repeated")), receiver: text("#mood"),
  rate: document.querySelector("[data-action=rate]").ariaPressed,
  memory: document.querySelector("[data-action=memory]").ariaPressed,
  order: of("order"), notify: of("notify"),
  cards: Object.fromEntries([...document.querySelectorAll(".process")].map(
    (card) => [card.dataset.name, [card.dataset.state, card.querySelector("small").textContent]])),
  numbers: Object.fromEntries([...document.querySelectorAll(".process")].map(
    (card) => [card.dataset.name, card.dataset.key])),
  about: [...document.querySelectorAll(".dot")].map((dot) => dot.dataset.about),
}
"""


class Play:
    """The running page, open in the browser. Made by `start_play`."""

    def __init__(self, chromium: Chromium, ports: Ports, port: int) -> None:
        self.chromium, self.url = chromium, f"http://127.0.0.1:{port}"
        numbers = ports.numbers
        self.etcd = EtcdClient(f"127.0.0.1:{numbers['PORT_ETCD']}", timeout_s=5)
        self.broker = Broker(ports.host, numbers["PORT_RABBITMQ"], numbers["PORT_RABBITMQ_UI"])

    def open(self, size: tuple[int, int] = DESK, *, scheme: str = "light") -> None:
        """Open it, and wait until it shows the stack."""
        self.chromium.prefer(scheme)
        self.chromium.open(self.url, *size)
        eventually(lambda: self.has(cards=lambda cards: len(cards) >= 5))

    def keys(self, keys: str) -> None:
        """Press keys, one after the other."""
        self.chromium.keys(keys)

    def choose(self, name: str) -> None:
        """Choose a process by its number."""
        self.keys(self.seen()["numbers"][name])

    def seen(self) -> Any:
        """Return what the page shows."""
        return self.chromium.run(_SEEN)

    def has(self, **expected: Any) -> None:
        """Raise AssertionError unless the page shows this: a value, or what a function takes."""
        seen = self.seen()
        for name, value in expected.items():
            assert value(seen[name]) if callable(value) else seen[name] == value, (name, seen)

    def shows(self, within_s: float = 40.0, /, **expected: Any) -> None:
        """Wait until the page shows this."""
        eventually(lambda: self.has(**expected), within_s)

    def all_run(self, name: str = "") -> None:
        """Wait until each process (or one) is shown as running."""
        self.shows(
            cards=lambda cards: all(
                state == "running" for each, (state, _) in cards.items() if name in each
            )
        )

    def reset(self) -> None:
        """Begin another round, and wait for it."""
        before = self.seen()["round"]
        self.keys("r")
        self.shows(round=lambda after: after != before, published=0, memory="true")
        self.all_run()

    def inspect(self, name: str, form: str) -> str:
        """Ask Docker about a container."""
        command = ["docker", "inspect", "--format", form, f"{PROJECT.name}-{name}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def start_play(chromium: Chromium, directory: Path) -> Iterator[Play]:
    """Run the page's program while the block runs, and check that it leaves nothing behind."""
    ports, port, log = Ports.read().elsewhere(), free_port(), directory / "play.log"
    settings = {**ports.settings(), "PORT_PLAY": str(port)}
    with log.open("w") as output:
        program = subprocess.Popen(
            [sys.executable, "-m", "demo.page"],
            cwd=REPOSITORY,
            env={**os.environ, **settings},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        eventually(lambda: _is_open(program, log), _UP_WITHIN_S)
        yield Play(chromium, ports, port)
    finally:
        program.send_signal(signal.SIGINT)
        assert program.wait(_DOWN_WITHIN_S) == 0, log.read_text()
    label = f"label=com.docker.compose.project={PROJECT.name}"
    left = ["docker", "ps", "--all", "--quiet", "--filter", label]
    assert subprocess.run(left, check=True, capture_output=True).stdout == b""


def _is_open(program: subprocess.Popen[bytes], log: Path) -> None:
    if program.poll() is not None:
        raise RuntimeError(log.read_text())
    assert "Open http://localhost" in log.read_text()
