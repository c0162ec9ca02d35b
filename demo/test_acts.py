from __future__ import annotations

import subprocess
import sys

import pytest

from demo.acts import ACTS, chosen
from demo.fake_stage import FakeStage, played
from demo.play import Play
from demo.screen import Screen
from demo.steps import CannotPlayError, PlayFailedError
from servers.servers import REPOSITORY


def typed(play: Play) -> list[str]:
    return [entry.text for entry in play.screen.story if entry.kind == "typed"]


@pytest.mark.parametrize(
    ("number", "checks"), [("1", 3), ("2", 5), ("3", 13), ("4", 10), ("5", 15)]
)
def test_an_act_alone_starts_what_it_needs(number: str, checks: int) -> None:
    play, _ = played(acts=number)
    assert play.passed == checks
    assert chosen(number) == [ACTS[number]]
    calls, with_etcd = "NOTIFY_URL=receiver " * (number == "4"), str(number in "45").lower()
    assert typed(play)[0] == f"ENABLE_ETCD={with_etcd} {calls}up"
    assert any("curl -i" in command for command in typed(play))


def test_acts_in_a_row_start_the_services_once_with_each_setting() -> None:
    play, _ = played()
    assert chosen("") == list(ACTS.values())
    assert play.passed == 42
    assert [command for command in typed(play) if "up" in command] == [
        "ENABLE_ETCD=false up",
        "ENABLE_ETCD=true up",
        "ENABLE_ETCD=true NOTIFY_URL=receiver up",
        "ENABLE_ETCD=true up",
        "ENABLE_ETCD=true up, 3 each",
    ]


@pytest.mark.parametrize("versions", [{}, {"order-35": 2}])
def test_an_order_that_is_missing_or_written_twice_fails_a_check(versions: dict[str, int]) -> None:
    stage = FakeStage()
    stage.written.update(versions)
    play = Play(stage, Screen())
    with pytest.raises(PlayFailedError, match="the order was placed once: 0 of 1 in etcd"):
        play.expect_orders(["order-35"], "the order was placed once")


def test_there_is_a_reason_why_events_are_skipped_or_not() -> None:
    play = Play(FakeStage(), Screen())
    assert "without etcd" in play.skipping(0)
    ACTS["3"](play)
    assert play.skipping(0) == "nothing: each event is new"
    assert play.skipping(6) == "order-3: etcd holds its record, so this copy is a duplicate"
    ACTS["4"](play)
    assert play.skipping(6) == "nothing: each event is new"


@pytest.mark.parametrize("number", ["0", "6", "two", "1 2", " 1", "-1", "\n"])
def test_another_number_is_refused_in_one_line(number: str) -> None:
    with pytest.raises(CannotPlayError, match=r"^ACT is .*: write a number from 1 to 5, .*$"):
        chosen(number)


def test_a_wrong_act_ends_the_demo_with_one_line_and_code_2() -> None:
    command = [sys.executable, "-m", "demo", "--act", "7"]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "demo: ACT is '7': write a number from 1 to 5, or leave it out for all\n"
