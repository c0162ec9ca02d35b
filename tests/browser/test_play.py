"""The page of `make play`: each button does what it says, on the page and at the servers."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser.chromium import Chromium
from browser.play import DESK, PHONE, Play, start_play
from demo.page.acts import KILLED
from servers.servers import REPOSITORY
from servers.wait import eventually, lasts

# The first test waits for the images to be built, and for the stack.
pytestmark = [pytest.mark.timeout(400), pytest.mark.long]

MINUTES = float(os.environ.get("PLAY_MINUTES") or 1)
_RANDOM = "gkftsgt+-qleu"  # Not "w" and "m": without etcd's data there is no guarantee.
_GROWTH_BYTES = 2_000_000


@pytest.fixture(scope="module")
def play(chromium: Chromium, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Play]:
    """Run the page for this module, open."""
    with start_play(chromium, tmp_path_factory.mktemp("play")) as running:
        running.open()
        running.all_run()
        yield running


@pytest.fixture(autouse=True)
def without_errors(play: Play) -> Iterator[None]:
    """Begin each test with a round of its own; nothing may be wrong in the console after it."""
    play.reset()
    yield
    assert play.chromium.errors() == []


def counts(play: Play, service: str, **expected: int) -> None:
    """Wait for the numbers of a lane."""
    play.shows(**{service: lambda seen: {name: seen[name] for name in expected} == expected})


def test_what_is_published_comes_to_rest_in_etcd(play: Play) -> None:
    before = play.etcd.count("/orders/")
    play.keys("po")
    counts(play, "order", processed=11, waiting=0, in_flight=0)
    counts(play, "notify", processed=11, waiting=0, in_flight=0)
    play.shows(confirmed=11, calls=11, lost=0, double=0)
    assert play.etcd.count("/orders/") - before == 11


def test_what_is_repeated_is_skipped_and_what_is_wrong_is_parked_with_its_reason(
    play: Play,
) -> None:
    play.keys("p")
    counts(play, "order", processed=1)
    play.keys("a")
    counts(play, "order", skipped=1)
    play.keys("bi")
    for service in ("order", "notify"):
        counts(play, service, processed=1, skipped=1, parked=2)
        assert play.broker.waiting(f"{service}.dead-letter") == 2
    play.shows(about=lambda dots: any("parked, conflict: " in dot for dot in dots))
    play.chromium.run("document.querySelector('#order .dot.parked').click()")
    assert ": parked, " in play.chromium.run("return document.querySelector('#told').textContent")
    play.has(lost=0, double=0)


def test_a_hundred_a_second_until_pressed_again(play: Play) -> None:
    play.keys("h")
    play.shows(rate="true", published=lambda number: number > 200)
    play.keys("h")
    play.shows(rate="false")
    published = play.seen()["published"]
    counts(play, "order", processed=published)
    play.has(published=published, double=0)


@pytest.mark.parametrize("name", ["order-1", "notify-1", "rabbitmq-1", "etcd-1", "receiver-1"])
def test_a_process_is_killed_frozen_stopped_and_comes_back(play: Play, name: str) -> None:
    play.choose(name)
    for key, shown, state in (
        ("k", "killed", "exited"),
        ("g", "running", "running"),
        ("f", "frozen", "paused"),
        ("t", "running", "running"),
        ("s", "stopped", "exited"),
        ("g", "running", "running"),
    ):
        play.keys(key)
        play.shows(cards=lambda cards, shown=shown: cards[name][0] == shown)
        assert play.inspect(name, "{{.State.Status}}") == state
    play.keys("p")
    counts(play, "order", processed=1)
    counts(play, "notify", processed=1)


def test_an_event_waits_for_the_service_that_is_stopped(play: Play) -> None:
    play.choose("notify-1")
    play.keys("s")
    play.shows(cards=lambda cards: cards["notify-1"][0] == "stopped")
    play.keys("p")
    counts(play, "order", processed=1)
    counts(play, "notify", processed=0, waiting=1)
    assert play.broker.waiting("notify") == 1
    play.keys("g")
    counts(play, "notify", processed=1, waiting=0)


def test_replicas_come_and_go(play: Play) -> None:
    play.choose("order-1")
    play.keys("+")
    play.all_run("order-2")
    play.shows(cards=lambda cards: "order-2" in cards)
    assert play.inspect("order-2", "{{.State.Status}}") == "running"
    play.keys("-")
    play.shows(cards=lambda cards: sum(name.startswith("order") for name in cards) == 1)


def test_without_etcd_a_duplicate_is_double(play: Play) -> None:
    play.keys("m")
    play.shows(memory="false", cards=lambda cards: "order-1" in cards)
    eventually(lambda: has_setting(play, "ENABLE_ETCD=false"))
    play.all_run()
    play.keys("pa")
    counts(play, "order", processed=2, skipped=0)
    counts(play, "notify", processed=2, skipped=0)
    play.shows(double=2)
    play.keys("m")
    play.shows(memory="true")
    eventually(lambda: has_setting(play, "ENABLE_ETCD=true"))


def has_setting(play: Play, setting: str) -> None:
    for name in ("order-1", "notify-1"):
        assert setting in play.inspect(name, "{{.Config.Env}}")


def test_services_notice_that_etcd_was_wiped(play: Play) -> None:
    play.keys("p")
    counts(play, "order", processed=1)
    play.keys("w")
    play.shows(cards=lambda cards: "etcd: wiped" in cards["order-1"][1])
    play.shows(cards=lambda cards: "etcd: wiped" in cards["notify-1"][1])
    assert play.etcd.count("/orders/") == 0
    play.reset()
    play.keys("p")
    counts(play, "order", processed=1)


def test_the_receiver_is_slow_failing_down_and_well(play: Play) -> None:
    play.keys("l")
    play.shows(receiver="slow")
    play.keys("p")
    play.shows(about=lambda dots: any("notify: claimed" in dot for dot in dots))
    counts(play, "notify", processed=1)
    play.keys("e")
    play.shows(receiver="failing")
    play.keys("p")
    play.shows(about=lambda dots: any("the receiver answered 500" in dot for dot in dots))
    play.keys("d")
    play.shows(receiver="down", cards=lambda cards: cards["receiver-1"][0] != "running")
    play.keys("q")
    play.shows(receiver="well")
    counts(play, "notify", processed=2, retry=0)
    play.has(calls=2, lost=0, double=0)


@pytest.mark.parametrize(
    ("key", "last", "double"),
    [
        ("z", "Act 1: both have it", 0),
        ("x", "Act 2: notify has caught up", 0),
        ("c", "Act 3: still skipped", 4),
        ("v", "Act 4: all 30 are called for", 0),
        ("n", f"{KILLED} It came again", 0),
    ],
)
def test_an_act_plays_to_its_end(play: Play, key: str, last: str, double: int) -> None:
    play.keys(key)
    play.shows(120, caption=lambda caption: caption.startswith(last), lost=0, double=double)


def test_the_fault_is_quoted_from_its_page() -> None:
    page = (REPOSITORY / "docs" / "when-can-my-code-run-twice.md").read_text()
    text = " ".join(page.replace("**", "").split())
    assert all(f"{sentence.strip('.')}" in text for sentence in KILLED.split(". "))


@pytest.mark.timeout(60 * MINUTES + 400)
def test_random_buttons_at_a_hundred_a_second_lose_and_double_nothing(play: Play) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    choice, until_s = random.Random(seed), time.monotonic() + 60 * MINUTES
    play.keys("h")
    play.shows(published=lambda number: number > 300)
    heap = play.chromium.heap()
    while time.monotonic() < until_s:
        cards = play.seen()["cards"]
        play.keys(str(choice.randint(1, len(cards))))
        play.keys(choice.choice(_RANDOM))
        lasts(choice.uniform(0.2, 2.0))
    play.keys("hu")
    play.shows(rate="false", receiver="well")
    play.all_run()
    published = play.seen()["published"]
    for service in ("order", "notify"):
        # A dead process's claims end with its lease, and a retry waits for a minute.
        play.shows(150, **{service: lambda seen: seen["processed"] + seen["parked"] == published})
    play.shows(confirmed=published, lost=0, double=0)
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
    play.choose("notify-1")
    play.keys("oaaai")
    counts(play, "notify", processed=10, skipped=3, parked=1)
    play.keys("k")
    play.shows(cards=lambda cards: cards["notify-1"][0] == "killed")
    play.keys("o")
    counts(play, "notify", waiting=10)
    assert play.chromium.overflow() == 0
    # What moves is to be where it goes, and the page at its top.
    play.chromium.run("document.activeElement.blur(); scrollTo(0, 0)")
    eventually(lambda: at_rest(play))
    kept = (size, scheme) == (DESK, "light")
    name = "play.png" if kept else f"play-{size[0]}-{scheme}.png"
    play.chromium.picture((pictures if kept else tmp_path) / name)
    play.open()


def at_rest(play: Play) -> None:
    assert play.chromium.run("return document.getAnimations().length") == 0
