"""What is kept of a run, and how it is judged."""

from pathlib import Path

import pytest

from .calls import SCENARIOS
from .latency import Latencies
from .marks import Mark, judge, verdict
from .progress import Rate, Rates
from .publishing import CONFIRMED, UNCONFIRMED
from .ratios import IDLE, medians, ratios, read_ratios, write_ratios
from .results import Results
from .subjects import (
    BARE,
    BARE_SMALL,
    CEILING,
    DUPLICATES,
    HALF,
    NAIVE,
    ORDER,
    ORDER_SMALL,
)

PER_S = {
    CEILING: 1000,
    BARE: 600,
    BARE_SMALL: 450,
    ORDER: 400,
    ORDER_SMALL: 310,
    NAIVE: 20,
    HALF: 900,
    DUPLICATES: 1200,
}
OF_SLOTS, OF_CLIENT = 0.95, 0.5


def calls(of_slots: float = OF_SLOTS, of_client: float = OF_CLIENT) -> Rates:
    """Return a round in which all calls reach such a part of their slots and of their client."""
    rates: Rates = {}
    for each in SCENARIOS:
        per_s = of_slots * (each.most_per_s or 1000)
        rates |= {each.name: Rate(per_s, 1.0), each.alone: Rate(per_s / of_client, 1.0)}
    return rates


def results(idle: Latencies, calls: Rates) -> Results:
    """Return a run of one round."""
    return Results(
        machine="",
        events=1,
        idle=idle,
        calls=[calls],
        consuming=[{name: Rate(per_s, 1.0) for name, per_s in PER_S.items()}],
        publishing=[{CONFIRMED: Rate(70, 1.0), UNCONFIRMED: Rate(100, 1.0)}],
    )


def test_every_ratio_is_of_a_subject_to_its_reference() -> None:
    found = medians(ratios(results(Latencies([3.0], [1.0], [1.0]), calls())))

    of_calls = [OF_CLIENT] * 12 + [OF_SLOTS] * 8
    assert list(found.values()) == [0.6, 0.4, 0.45, 0.31, 0.9, 1.2, 30.0, *of_calls, 0.7, 0.6667]


def test_a_service_that_gets_slower_has_a_smaller_idle_ratio() -> None:
    """More is better in all ratios, so that the guard need not know which one it looks at."""
    slower, faster = (
        ratios(results(Latencies([recorded_ms], [1.0], [1.0]), calls()))[IDLE].median
        for recorded_ms in (4.0, 3.0)
    )

    assert slower < faster


@pytest.mark.parametrize(("recorded_ms", "missed"), [(3.9, []), (4.1, ["at most 2"])])
def test_a_mark_is_missed_where_the_median_is_on_its_wrong_side(
    recorded_ms: float, missed: list[str]
) -> None:
    marks = judge(ratios(results(Latencies([recorded_ms], [1.0], [1.0]), calls())))

    assert [mark.target for mark in marks if not mark.met] == missed


@pytest.mark.parametrize(
    ("of_slots", "of_client", "met"),
    [(0.91, 0.41, True), (0.5, 0.61, True), (0.89, 0.59, False)],
)
def test_calls_to_a_slow_receiver_reach_the_lesser_of_two_bounds(
    of_slots: float, of_client: float, met: bool
) -> None:
    """Where a thousand wait at once the client cannot fill the slots, and is the bound."""
    found = ratios(results(Latencies([3.0], [1.0], [1.0]), calls(of_slots, of_client)))
    marks = [mark for mark in judge(found) if "of the slots" in mark.what]

    assert [mark.met for mark in marks] == [met] * 4


def test_calls_to_a_receiver_that_answers_at_once_are_held_against_their_client() -> None:
    found = ratios(results(Latencies([3.0], [1.0], [1.0]), calls(of_client=0.39)))
    missed = [mark.what for mark in judge(found) if not mark.met]

    assert [", 0 ms, " in what for what in missed] == [True] * 4


def test_one_missed_mark_is_the_verdict_of_a_run() -> None:
    met, missed = Mark("a / b", 0.51, "at least 0.5", True), Mark("c / d", 2.1, "at most 2", False)

    assert verdict([met, met]) == ("All 2 marks are met.", True)
    assert verdict([met, missed]) == ("1 of 2 marks MISSED: c / d", False)


def test_what_is_kept_is_read_back(tmp_path: Path) -> None:
    write_ratios(tmp_path / "ratios.json", {"a / b": 0.5})

    assert read_ratios(tmp_path / "ratios.json") == {"a / b": 0.5}


@pytest.mark.parametrize("text", ['{"a": "0.5"}', '{"a": 0}', "[1]", "{"])
def test_what_holds_no_ratios_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "ratios.json").write_text(text)

    with pytest.raises(ValueError, match=r"ratios by name|Expecting"):
        read_ratios(tmp_path / "ratios.json")
