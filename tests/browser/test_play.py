"""The page of `make play`: each button does what it says, on the page and at the servers."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser.chromium import Chromium
from browser.play import DESK, PHONE, Play, start_play
from demo.page.controls import ACTS
from servers.servers import REPOSITORY
from servers.wait import eventually, lasts

# The first test waits for the images to be built, and for the stack.
pytestmark = [pytest.mark.timeout(400), pytest.mark.long]

MINUTES = float(os.environ.get("PLAY_MINUTES") or 1)
_RANDOM = "gkftsgt+-qleuj/."  # Not "w" and "m": without etcd's data there is no guarantee.
_GROWTH_BYTES = 2_000_000


@pytest.fixture(scope="module")
def play(chromium: Chromium, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Play]:
    """Run the page for this module, open."""
    with start_play(chromium, tmp_path_factory.mktemp("play")) as running:
        running.open()
        yield running


@pytest.fixture(autouse=True)
def without_errors(play: Play) -> Iterator[None]:
    """Begin each test with a round of its own; nothing may be wrong in the console after it."""
    play.reset()
    yield
    assert play.chromium.errors() == []


def both(**expected: Any) -> dict[str, Any]:
    """Return what is expected of both services' numbers."""
    return {
        f"{service} {n}": value for service in ("order", "notify") for n, value in expected.items()
    }


def test_what_is_published_comes_to_rest_in_etcd(play: Play) -> None:
    before = play.etcd.count("/orders/")
    play.press("po")
    play.shows(**both(processed=11, waiting=0), confirmed=11, calls=11, lost=0, double=0)
    assert play.etcd.count("/orders/") - before == 11


def test_what_is_repeated_is_skipped_and_what_is_wrong_is_parked_with_its_reason(
    play: Play,
) -> None:
    play.press("p")
    play.shows(**both(processed=1))
    play.press("abi")
    play.shows(
        **both(processed=1, skipped=1, parked=2), dots="parked, conflict: ", lost=0, double=0
    )
    assert [play.broker.waiting(f"{name}.dead-letter") for name in ("order", "notify")] == [2, 2]
    play.chromium.run("document.querySelector('#order .dot[data-state=parked]').click()")
    play.shows(told=": parked, ")


def test_a_hundred_a_second_until_pressed_again(play: Play) -> None:
    play.press("h")
    play.shows(h="true", published=lambda number: number > 200)
    play.press("h")
    play.shows(h="false")
    published = play.seen()["published"]
    play.shows(**both(processed=published), published=published, double=0)


@pytest.mark.parametrize("name", ["order-1", "notify-1", "rabbitmq-1", "etcd-1", "receiver-1"])
def test_a_process_is_killed_frozen_stopped_and_comes_back(play: Play, name: str) -> None:
    for key, shown, state in (
        ("k", "killed", "exited"),
        ("g", "running", "running"),
        ("f", "frozen", "paused"),
        ("t", "running", "running"),
        ("s", "stopped", "exited"),
        ("g", "running", "running"),
    ):
        play.press(key, name)
        play.shows(**{name: shown})
        assert play.inspect(name, "{{.State.Status}}") == state
    play.press("p")
    play.shows(**both(processed=1))


def test_an_event_waits_for_the_service_that_is_stopped(play: Play) -> None:
    play.press("s", "notify-1")
    play.shows(**{"notify-1": "stopped"})
    play.press("p")
    play.shows(**{"order processed": 1, "notify processed": 0, "notify waiting": 1})
    assert play.broker.waiting("notify") == 1
    play.press("g")
    play.shows(**both(processed=1, waiting=0))


def test_three_replicas_come_and_go(play: Play) -> None:
    play.press("++", "order-1")
    play.shows(**{"order-2": "running", "order-3": "running"})
    assert play.inspect("order-3", "{{.State.Status}}") == "running"
    play.press("--")
    play.shows(keys=lambda keys: sum(name.startswith("order") for name in keys) == 1)


@pytest.mark.parametrize("name", ["order", "notify"])
@pytest.mark.parametrize(
    ("key", "recorded", "again"),
    [
        ("/", 0, {"processed": 1, "skipped": 0}),
        ("j", 1, {"processed": 1, "skipped": 1}),
        (".", 1, {"processed": 1, "skipped": 0}),
    ],
    ids=["before its record", "between record and ack", "after its ack"],
)
def test_a_service_kills_itself_at_a_crash_point(
    play: Play, name: str, key: str, recorded: int, again: dict[str, int]
) -> None:
    play.press(key, f"{name}-1")
    eventually(lambda: is_armed(play, f"{name}-1"), also=(subprocess.CalledProcessError,))
    play.press("p")
    play.shows(**{f"{name}-1": "killed", f"{name} processed": recorded})
    play.shows(**{f"{name} waiting": int(key != ".")})
    play.press("g")
    play.shows(**{f"{name} {number}": value for number, value in again.items()})
    play.shows(**both(processed=1, waiting=0), lost=0, double=0)


def is_armed(play: Play, name: str) -> None:
    assert "CRASH_POINT=" in play.inspect(name, "{{.Config.Env}}")


def test_without_etcd_a_duplicate_is_double(play: Play) -> None:
    play.press("m")
    play.shows(m="false", **{"order-1": "running", "notify-1": "running"})
    for name in ("order-1", "notify-1"):
        assert "ENABLE_ETCD=false" in play.inspect(name, "{{.Config.Env}}")
    play.press("pa")
    play.shows(**both(processed=2, skipped=0), double=2)
    play.press("m")
    play.shows(m="true")


def test_services_notice_that_etcd_was_wiped(play: Play) -> None:
    play.press("p")
    play.shows(**both(processed=1))
    play.press("w")
    for name in ("order-1", "notify-1"):
        play.shows(why=lambda why, name=name: "etcd: wiped" in why[name])
    assert play.etcd.count("/orders/") == 0
    play.reset()
    play.press("p")
    play.shows(**both(processed=1))


def test_the_receiver_is_slow_failing_down_and_well(play: Play) -> None:
    play.press("l")
    play.shows(receiver="slow")
    play.press("p")
    play.shows(dots="notify: claimed")
    play.shows(**both(processed=1))
    play.press("e")
    play.shows(receiver="failing")
    play.press("p")
    play.shows(dots="the receiver answered 500")
    play.press("d")
    play.shows(receiver="down", **{"receiver-1": "stopped"})
    play.press("q")
    play.shows(receiver="well", **both(processed=2, retry=0), calls=2, lost=0, double=0)


@pytest.mark.parametrize("key", ACTS)
def test_an_act_plays_to_its_end(play: Play, key: str) -> None:
    play.press(key)
    doubles = 4 if key == "c" else 0
    play.shows(120, caption=ACTS[key]["steps"][-1][0], lost=0, double=doubles)


def test_the_fault_is_quoted_from_its_page() -> None:
    page = (REPOSITORY / "docs" / "when-can-my-code-run-twice.md").read_text()
    text = " ".join(page.replace("**", "").split())
    (quoted,) = (step[0] for step in ACTS["n"]["steps"] if step[0].startswith("Killed: "))
    assert all(sentence.strip(".") in text for sentence in quoted.split(". "))


@pytest.mark.timeout(60 * MINUTES + 400)
def test_random_buttons_at_a_hundred_a_second_lose_and_double_nothing(play: Play) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    choice, until_s = random.Random(seed), time.monotonic() + 60 * MINUTES
    play.press("h")
    play.shows(published=lambda number: number > 300)
    heap = play.chromium.heap()
    while time.monotonic() < until_s:
        play.press(choice.choice(_RANDOM), choice.choice(list(play.seen()["keys"])))
        lasts(choice.uniform(0.2, 2.0))
    play.press("hu")
    play.shows(150, h="false", receiver="well", **{"order-1": "running", "notify-1": "running"})
    published = play.seen()["published"]
    # A dead process's claims end with its lease, and a retry waits for a minute.
    at_rest = {"waiting": 0, "in flight": 0, "retry": 0}
    play.shows(150, **both(**at_rest), confirmed=published, lost=0, double=0)
    seen = play.seen()
    for service in ("order", "notify"):
        assert seen[f"{service} processed"] + seen[f"{service} parked"] == published
    orders = play.etcd.get(f"/orders/{play.seen()['round']}-")
    assert [order.version for order in orders] == [1] * published
    assert play.chromium.heap() - heap < _GROWTH_BYTES
    assert play.chromium.run("return document.querySelectorAll('*').length") < 400


def test_every_button_has_a_name_and_a_key_of_its_own(play: Play) -> None:
    names = play.chromium.names()
    assert len(names["button"]) > 25
    assert all(names["button"])
    assert len(names["radio"]) == 5
    assert names["status"]
    keys = play.chromium.run(
        "return [...document.querySelectorAll('[data-key]')].map((each) => each.dataset.key)"
    )
    assert len(keys) == len(set(keys)) > 30


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_its_picture_is_taken(
    play: Play, pictures: Path, tmp_path: Path, size: tuple[int, int], scheme: str
) -> None:
    play.open(size, scheme=scheme)
    play.press("oaaai")
    play.shows(**both(processed=10, skipped=3, parked=1))
    play.press("k", "notify-1")
    play.shows(**{"notify-1": "killed"})
    play.press("o")
    play.shows(**{"notify waiting": 10})
    assert play.chromium.overflow() == 0
    # What moves is to be where it goes, and the page at its top.
    play.chromium.run("document.activeElement.blur(); scrollTo(0, 0)")
    eventually(lambda: stands_still(play))
    kept = (size, scheme) == (DESK, "light")
    name = "play.png" if kept else f"play-{size[0]}-{scheme}.png"
    play.chromium.picture((pictures if kept else tmp_path) / name)
    play.open()


def stands_still(play: Play) -> None:
    assert play.chromium.run("return document.getAnimations().length") == 0
