"""Counters that Graphite shows."""

from typing import Any

import pytest

from servers import graphite


def test_a_point_on_its_way_to_the_file_still_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Carbon shows it nowhere for a moment; a count never goes down."""
    answers: list[Any] = [
        [{"datapoints": [[1.0, 100], [2.0, 101]]}],
        [{"datapoints": [[1.0, 100], [None, 101], [4.0, 102]]}],
        [],
    ]
    monkeypatch.setattr(graphite, "fetch_json", lambda *_: answers.pop(0))
    counters = graphite.GraphiteCounters("http://graphite", since=100)
    assert [counters.count("orders_processed") for _ in range(3)] == [3, 7, 7]
