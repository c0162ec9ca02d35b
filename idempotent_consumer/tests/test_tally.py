"""The counters of a service, and its lines."""

from __future__ import annotations

from typing import Any

import pytest
import structlog
from structlog.testing import LogCapture

from idempotent_consumer.tally import Outcome, Tally
from idempotent_consumer.testing.process import Counts


@pytest.fixture
def lines() -> LogCapture:
    return LogCapture()


@pytest.fixture
def counts() -> Counts:
    return Counts()


@pytest.fixture
def tally(lines: LogCapture, counts: Counts) -> Tally:
    log: Any = structlog.wrap_logger(
        None, processors=[lines], wrapper_class=structlog.make_filtering_bound_logger(0)
    )
    return Tally("orders", counts, log)


def test_every_counter_shows_as_zero_from_the_start(tally: Tally, counts: Counts) -> None:
    """The names of the contract."""
    assert tally is not None
    assert counts.counts == dict.fromkeys(
        [
            "orders_received",
            "orders_processed",
            "orders_processed_skipped",
            "orders_ignored",
            "orders_conflicted",
            "orders_invalid",
            "orders_failed",
            "orders_retried",
            "orders_returned",
        ],
        0,
    )


def test_a_few_deliveries_get_a_line_each(tally: Tally, lines: LogCapture) -> None:
    for number in range(10):
        tally.settled(Outcome.PROCESSED, {"event_id": str(number)})
    tally.flush()
    assert [line["event_id"] for line in lines.entries] == [str(n) for n in range(10)]


def test_many_get_one_line_with_their_numbers(
    tally: Tally, lines: LogCapture, counts: Counts
) -> None:
    for number in range(200):
        outcome = Outcome.PROCESSED if number % 4 else Outcome.SKIPPED
        tally.settled(outcome, {"event_id": str(number)})
    tally.flush()
    (line,) = lines.entries
    assert (line["processed"], line["processed_skipped"]) == (150, 50)
    assert (counts.counts["orders_processed"], counts.counts["orders_processed_skipped"]) == (
        150,
        50,
    )


@pytest.mark.parametrize(
    ("outcome", "level"),
    [
        (Outcome.PROCESSED, "info"),
        (Outcome.FAILED, "warning"),
        (Outcome.INVALID, "warning"),
    ],
)
def test_what_is_parked_is_a_warning_among_many_too(
    tally: Tally, lines: LogCapture, outcome: Outcome, level: str
) -> None:
    for number in range(200):
        tally.settled(outcome if number == 100 else Outcome.PROCESSED, {})
    tally.flush()
    assert [line["log_level"] for line in lines.entries] == [level]


@pytest.mark.parametrize("outcome", [each for each in Outcome if each is not Outcome.RETURNED])
def test_each_outcome_has_a_line_and_a_counter(
    tally: Tally, lines: LogCapture, counts: Counts, outcome: Outcome
) -> None:
    tally.settled(outcome, {"event_id": "1"})
    tally.flush()
    assert counts.counts[f"orders_{outcome.value}"] == 1
    assert len(lines.entries) == 1


def test_nothing_is_counted_or_written_twice(
    tally: Tally, lines: LogCapture, counts: Counts
) -> None:
    tally.settled(Outcome.PROCESSED, {})
    tally.flush()
    tally.flush()
    assert counts.counts["orders_processed"] == 1
    assert len(lines.entries) == 1


def test_returned_deliveries_are_counted_and_told_only_where_there_are_any(
    tally: Tally, lines: LogCapture, counts: Counts
) -> None:
    tally.returned(0)
    assert lines.entries == []
    tally.returned(3)
    assert counts.counts["orders_returned"] == 3
    assert lines.entries[0]["deliveries"] == 3
