import pytest

from demo.acts import ACTS
from demo.fake_stage import FakeStage, played
from demo.play import Play
from demo.screen import Screen
from demo.steps import PlayFailedError


def typed(play: Play) -> list[str]:
    return [entry.text for entry in play.screen.story if entry.kind == "typed"]


@pytest.mark.parametrize(
    ("number", "checks"), [("1", 3), ("2", 5), ("3", 13), ("4", 10), ("5", 15)]
)
def test_an_act_alone_starts_what_it_needs(number: str, checks: int) -> None:
    play, _ = played(acts=number)
    assert play.passed == checks
    calls, with_etcd = "NOTIFY_URL=receiver " * (number == "4"), str(number in "45").lower()
    assert typed(play)[0] == f"ENABLE_ETCD={with_etcd} {calls}up"
    assert any("curl -i" in command for command in typed(play))


def test_acts_in_a_row_start_the_services_once_with_each_setting() -> None:
    play, _ = played()
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
