"""The page of `make play`: each button does what it says, on the page and at the servers."""

import os
import random
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from selenium.common import WebDriverException
from selenium.webdriver import Keys

from browser.chromium import Chromium
from demo.compose import Compose, Ports
from demo.page.__main__ import PROJECT
from demo.page.controls import ACTS
from demo.stage import SERVICES
from servers.etcd import EtcdClient
from servers.processes import Child
from servers.servers import REPOSITORY
from servers.wait import eventually, lasts

# The first test waits for the images to be built and the stack to start.
pytestmark = [pytest.mark.timeout(400), pytest.mark.long]

MINUTES = float(os.environ.get("PLAY_MINUTES") or 1)
RANDOM = "gkftsgt+-qleuj/."  # Without "w" and "m": there is no guarantee without etcd's data.
GROWTH_BYTES = 2_000_000

DESK, PHONE = (1280, 720), (390, 844)

SEEN = """
const all = (selector, pair) =>
  Object.fromEntries([...document.querySelectorAll(selector)].map(pair))
const text = (selector, within = document) => within.querySelector(selector).textContent
return {
  ...all("[data-number]", (each) => [each.dataset.number, Number(each.textContent)]),
  ...all("nav [aria-pressed]", (each) => [each.dataset.key, each.ariaPressed]),
  ...all(".process", (each) => [text("b", each), text("i", each)]),
  ...all(".process", (each) => ["why " + text("b", each), text("small", each)]),
  keys: all(".process", (each) => [text("b", each), each.dataset.key]),
  "every key": [...document.querySelectorAll("[data-key]")].map((each) => each.dataset.key),
  states: Object.keys(all(".process", (each) => [each.dataset.state])),
  dots: Object.keys(all(".dot", (each) => [each.title])).join("; "),
  round: document.body.dataset.round, moving: document.getAnimations().length,
  caption: text("#caption"), told: text("#told"), receiver: text("#receiver"),
}
"""


class Play:
    """The running page, in the browser."""

    def __init__(self, chromium: Chromium, ports: Ports) -> None:
        self.chromium, self.url = chromium, f"http://127.0.0.1:{ports.numbers['PORT_PLAY']}"
        self.compose = Compose(PROJECT.name, ports.settings(), PROJECT.files)
        self.etcd, self._broker = EtcdClient(ports.etcd(), timeout_s=5), ports.broker()

    def open(self, size: tuple[int, int], *, scheme: str = "light") -> None:
        """Open it, and wait until it shows the stack."""
        self.chromium.prefer(scheme)
        self.chromium.open(self.url, *size)
        self.shows(60, keys=lambda keys: len(keys) >= len(PROCESSES))

    def press(self, presses: str) -> None:
        """Press keys, as in "k:order-1 p": a process after a colon is chosen first."""
        for press in presses.split():
            key, _, process = press.partition(":")
            self.chromium.keys((self.seen()["keys"][process] if process else "") + key)

    def seen(self) -> Any:
        return self.chromium.run(SEEN)

    def shows(self, within_s: float = 40.0, /, **expected: Any) -> None:
        """Wait until the page and the servers show a value, a part of a text, or what a
        function accepts.
        """

        def shown() -> None:
            seen = self.seen()
            seen |= {name: self._ask(name, seen) for name in expected.keys() - seen.keys()}
            for name, value in expected.items():
                found = seen[name]
                if callable(value):
                    assert value(found), (name, seen)
                elif value and isinstance(found, str):
                    assert value in found, (name, seen)
                else:
                    assert found == value, (name, seen)

        eventually(shown, within_s, also=(OSError,))

    def _ask(self, name: str, seen: Any) -> Any:
        """Return a container's state, a queue's depth, or how many orders there are."""
        if name == "/orders/":
            return self.etcd.count(f"/orders/{seen['round']}-")
        if name.endswith(".dead-letter"):
            return self._broker.waiting(name)
        assert name.startswith("docker "), f"{name} is not shown"
        return self.compose.containers().get(name.removeprefix("docker "), {}).get("State", "")


@pytest.fixture(scope="module")
def play(chromium: Chromium, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Play]:
    """Run the page and open it. At its end it must leave nothing behind."""
    ports, log = Ports.read(PORT_PLAY="8090").elsewhere(), tmp_path_factory.mktemp("play") / "log"
    command, env = [sys.executable, "-m", "demo.page"], {**os.environ, **ports.settings()}
    program, running = Child(command, env=env, cwd=REPOSITORY, log=log), Play(chromium, ports)
    program.start()
    try:
        eventually(partial(running.open, DESK), 240, also=(WebDriverException,))
        assert "Open http://localhost" in program.output()
        yield running
    finally:
        assert program.terminate(90) == 0, program.output()
    assert not running.compose.containers()


@pytest.fixture(autouse=True)
def without_errors(play: Play) -> Iterator[None]:
    """Begin a new round for each test. Afterwards the console must show no errors."""
    before, running = play.seen()["round"], dict.fromkeys(PROCESSES, "running")
    play.press("r")
    play.shows(round=lambda after: after != before, published=0, m="true", **running)
    yield
    # Chromium cannot send while a container starts or stops: the page then sends again.
    assert not [each for each in play.chromium.errors() if "ERR_NETWORK_CHANGED" not in each]


def both(**expected: Any) -> dict[str, Any]:
    """Return the same expected numbers for both services."""
    return {f"{service} {name}": expected[name] for service in SERVICES for name in expected}


PROCESSES = ("order-1", "notify-1", "rabbitmq-1", "etcd-1", "receiver-1")
LIFE = {"k": "killed", "g": "running", "f": "frozen", "t": "running", "s": "stopped"}
DOCKER = {"killed": "exited", "running": "running", "frozen": "paused", "stopped": "exited"}
DEATHS = {"before-record": ("/", 0, 0), "before-ack": ("j", 1, 1), "after-ack": (".", 1, 0)}
"""A button, the events recorded when the process is dead, and those skipped after its restart."""

BOTH_RUN = {"order-1": "running", "notify-1": "running"}
NONE_WRONG = {"lost": 0, "double": 0}

SCRIPTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "repeated-and-wrong": [
        ("p", both(processed=1)),
        ("a b i", both(processed=1, skipped=1, parked=2) | NONE_WRONG),
        ("", {"dots": "parked, conflict: ", "order.dead-letter": 2, "notify.dead-letter": 2}),
        (Keys.TAB + Keys.ENTER, {"told": ": parked, "}),
    ],
    "three-replicas": [
        ("+:order-1 +:order-1", {"order-2": "running", "docker order-2": "running"}),
        ("o", both(processed=10) | {"order-3": "running", "docker order-3": "running"}),
        ("-:order-1 -:order-1", {"docker order-2": "", "docker order-3": ""}),
    ],
    "without-records": [
        ("m", {"m": "false", **BOTH_RUN}),
        ("p a", both(processed=2, skipped=0) | {"double": 2, "/orders/": 0}),
        ("m", {"m": "true", **BOTH_RUN}),
    ],
    "wiped": [
        ("p", both(processed=1) | {"/orders/": 1}),
        ("w", {"why order-1": "etcd: wiped", "why notify-1": "etcd: wiped", "/orders/": 0}),
        ("r", {"published": 0, **BOTH_RUN}),
        ("p", both(processed=1) | {"/orders/": 1}),
    ],
    "receiver": [
        ("l", {"receiver": "slow"}),
        ("p", {"dots": "notify: claimed"}),
        ("e", {"receiver": "failing", **both(processed=1)}),
        ("p", {"dots": "the receiver answered 500"}),
        ("d", {"receiver": "down", "receiver-1": "stopped", "docker receiver-1": "exited"}),
        ("q", both(processed=2, retry=0) | NONE_WRONG | {"receiver": "well", "calls": 2}),
    ],
}
for name in PROCESSES:
    SCRIPTS[name] = [
        (f"{key}:{name}", {name: state, f"docker {name}": DOCKER[state]})
        for key, state in LIFE.items()
    ]
    SCRIPTS[name].append((f"g:{name} p", both(processed=1) | {"/orders/": 1}))
for service, (death, (key, recorded, skipped)) in product(SERVICES, DEATHS.items()):
    name = f"{service}-1"
    SCRIPTS[f"{service}-{death}"] = [
        (f"{key}:{name}", {"caption": f"{service} will kill itself"}),
        ("p", {name: "killed", f"{service} processed": recorded}),
        (f"g:{name}", both(processed=1) | NONE_WRONG | {f"{service} skipped": skipped}),
    ]
for act, steps in ACTS.items():
    last, doubles = steps[-1][0], 4 if act[0] == "c" else 0
    SCRIPTS[f"act-{act[0]}"] = [(act[0], {"caption": last, "lost": 0, "double": doubles})]
SCRIPTS["act-y"].append(("", {"why order-3": "recorded", "dots": "came again and was skipped"}))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_button_does_what_it_says(play: Play, name: str) -> None:
    for presses, expected in SCRIPTS[name]:
        play.press(presses)
        play.shows(120, **expected)


def test_a_reset_numbers_the_replicas_from_1_again(play: Play) -> None:
    """Compose may keep any replica, but the acts need number 1."""
    play.press("+:notify-1")
    play.shows(**{"notify-2": "running"})
    play.compose.docker("rm", "notify-1", "--force")
    play.press("r")
    play.shows(**BOTH_RUN, **{"docker notify-1": "running", "docker notify-2": ""})


@pytest.mark.timeout(60 * MINUTES + 400)
def test_random_buttons_at_a_hundred_a_second_lose_and_double_nothing(play: Play) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    choice, until_s = random.Random(seed), time.monotonic() + 30 + 60 * MINUTES
    play.press("h")
    play.shows(h="true", published=lambda number: number > 300)
    heap = play.chromium.heap()
    play.chromium.slow_down(20)
    lasts(30)  # A page that fell behind would never catch up.
    play.chromium.slow_down(1)
    while time.monotonic() < until_s:
        process = choice.choice(list(play.seen()["keys"]))
        play.press(f"{choice.choice(RANDOM)}:{process}")
        lasts(choice.uniform(0.2, 2.0))
    play.press("h u")
    play.shows(150, h="false", receiver="well", states=["running"])
    published = play.seen()["published"]
    # The claims of a dead process end with its lease, and a retry waits up to a minute.
    rest = both(**{"waiting": 0, "in flight": 0, "retry": 0})
    play.shows(150, **rest, confirmed=published, lost=0, double=0)
    seen = play.seen()
    done = [seen[f"{service} processed"] + seen[f"{service} parked"] for service in SERVICES]
    assert done == [published, published]
    orders = play.etcd.get(f"/orders/{seen['round']}-")
    assert [order.version for order in orders] == [1] * published
    assert play.chromium.heap() - heap < GROWTH_BYTES
    assert play.chromium.run("return document.querySelectorAll('*').length") < 400


def test_every_button_has_a_name_and_a_key_of_its_own(play: Play) -> None:
    names = play.chromium.names()
    assert len(names["button"]) > 25
    assert all(names["button"])
    assert len(names["radio"]) == 5
    assert names["status"]
    keys = play.seen()["every key"]
    assert len(keys) == len(set(keys)) > 30


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_its_picture_is_taken(
    play: Play, pictures: Path, tmp_path: Path, size: tuple[int, int], scheme: str
) -> None:
    play.open(size, scheme=scheme)
    play.press("o a a a i")
    play.shows(**both(processed=10, skipped=3, parked=1))
    play.press("k:notify-1")
    play.shows(**{"notify-1": "killed"})
    play.press("o")
    play.shows(**{"notify waiting": 10})
    assert play.chromium.overflow() == 0
    # All movement must have ended, and the page must be at its top.
    play.chromium.run("document.activeElement.blur(); scrollTo(0, 0)")
    play.shows(moving=0)
    kept, name = (size, scheme) == (DESK, "light"), f"play-{size[0]}-{scheme}.png"
    play.chromium.picture(pictures / "play.png" if kept else tmp_path / name)
