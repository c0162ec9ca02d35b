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
from servers.servers import REPOSITORY
from servers.wait import eventually

_UP_WITHIN_S = 240.0
_DOWN_WITHIN_S = 90.0

_PROCESSES = ("rabbitmq-1", "etcd-1", "receiver-1", "order-1", "notify-1")
DESK, PHONE = (1280, 720), (390, 844)

_SEEN = """
const all = (selector, pair) =>
  Object.fromEntries([...document.querySelectorAll(selector)].map(pair))
const text = (selector) => document.querySelector(selector).textContent
return {
  ...all("[data-number]", (each) => [each.dataset.number, Number(each.textContent)]),
  ...all("nav [aria-pressed]", (each) => [each.dataset.key, each.ariaPressed]),
  ...all(".process", (each) => [each.querySelector("b").textContent, each.dataset.state]),
  "why": all(".process", (each) => [each.querySelector("b").textContent, each.innerText]),
  "keys": all(".process", (each) => [each.querySelector("b").textContent, each.dataset.key]),
  "dots": [...document.querySelectorAll(".dot")].map((each) => each.dataset.about).join("; "),
  "round": document.body.dataset.round,
  "caption": text("#caption"), "told": text("#told"), "receiver": text("#mood"),
}
"""


class Play:
    """The running page, open in the browser. Made by `start_play`."""

    def __init__(self, chromium: Chromium, ports: Ports) -> None:
        self.chromium, numbers = chromium, ports.numbers
        self.url = f"http://127.0.0.1:{numbers['PORT_PLAY']}"
        self.etcd = EtcdClient(f"127.0.0.1:{numbers['PORT_ETCD']}", timeout_s=5)
        self.broker = Broker(ports.host, numbers["PORT_RABBITMQ"], numbers["PORT_RABBITMQ_UI"])

    def open(self, size: tuple[int, int] = DESK, *, scheme: str = "light") -> None:
        """Open it, and wait until it shows the stack."""
        self.chromium.prefer(scheme)
        self.chromium.open(self.url, *size)
        self.shows(60, keys=lambda keys: len(keys) >= len(_PROCESSES))

    def press(self, keys: str, process: str = "") -> None:
        """Choose a process by its number, and press keys, one after the other."""
        self.chromium.keys((self.seen()["keys"][process] if process else "") + keys)

    def seen(self) -> Any:
        """Return what the page shows."""
        return self.chromium.run(_SEEN)

    def shows(self, within_s: float = 40.0, /, **expected: Any) -> None:
        """Wait until the page shows this: a value, a part of a text, or what a function takes."""

        def shown() -> None:
            seen = self.seen()
            for name, value in expected.items():
                assert _fits(seen.get(name), value), (name, value, seen)

        eventually(shown, within_s)

    def reset(self) -> None:
        """Begin another round, and wait for it."""
        before = self.seen()["round"]
        self.press("r")
        running = dict.fromkeys(_PROCESSES, "running")
        self.shows(round=lambda after: after != before, published=0, m="true", **running)

    def inspect(self, name: str, form: str) -> str:
        """Ask Docker about a container."""
        command = ["docker", "inspect", "--format", form, f"{PROJECT.name}-{name}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _fits(seen: Any, expected: Any) -> bool:
    if callable(expected):
        return bool(expected(seen))
    return expected in seen if isinstance(seen, str) else bool(seen == expected)


@contextmanager
def start_play(chromium: Chromium, directory: Path) -> Iterator[Play]:
    """Run the page's program while the block runs, and check that it leaves nothing behind."""
    ports, log = Ports.read(PORT_PLAY="8090").elsewhere(), directory / "play.log"
    with log.open("w") as output:
        program = subprocess.Popen(
            [sys.executable, "-m", "demo.page"],
            cwd=REPOSITORY,
            env={**os.environ, **ports.settings()},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        eventually(lambda: _is_open(program, log), _UP_WITHIN_S)
        yield Play(chromium, ports)
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
