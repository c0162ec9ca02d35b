"""The guard tells what has fallen, what is gone and what is new."""

import pytest

from .comparing import compare


@pytest.mark.parametrize(("now", "passes"), [(1.2, True), (0.81, True), (0.79, False)])
def test_a_ratio_may_fall_by_a_fifth_and_no_more(now: float, passes: bool) -> None:
    (compared,) = compare({"a / b": 1.0}, {"a / b": now})

    assert compared.passes is passes
    assert str(compared).startswith("ok" if passes else "FELL")


def test_the_fall_is_of_what_is_kept_not_of_what_is_measured() -> None:
    """From 1.2 to 1.0 is a sixth of the one and a fifth of the other."""
    (compared,) = compare({"a / b": 50.0}, {"a / b": 40.5})

    assert compared.passes
    assert str(compared).endswith("kept 50.000, now 40.500 (-19 %)")


def test_each_ratio_is_held_against_its_own_name() -> None:
    compared = compare({"a": 1.0, "b": 2.0}, {"b": 1.0, "a": 1.0})

    assert [(each.name, each.passes) for each in compared] == [("a", True), ("b", False)]


def test_a_ratio_that_is_no_longer_measured_fails() -> None:
    gone, kept = compare({"gone": 1.0, "kept": 1.0}, {"kept": 1.0})

    assert not gone.passes
    assert kept.passes
    assert str(gone) == "MISSING  gone: kept 1.000, not measured now"


def test_a_ratio_that_is_not_kept_yet_is_told_and_passes() -> None:
    old, new = compare({"old": 1.0}, {"new": 0.1, "old": 1.0})

    assert old.name == "old"
    assert new.passes
    assert str(new).startswith("new      new: 0.100, not kept yet")
