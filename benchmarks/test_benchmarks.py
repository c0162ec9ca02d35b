"""The arithmetic on figures, and how they are judged, compared and shown."""

from collections import Counter
from itertools import chain
from pathlib import Path
from pkgutil import resolve_name

import pytest

from . import history, scenarios
from .__main__ import RESULTS, SCENARIOS, main, marks_of
from .pictures import draw
from .report import Mark, Report, Table, compare
from .runner import BARE, GAUGES, Progress, gauges_of, rate
from .scenarios import percentile, pooled, summary


def missed(heading: str, table: Table) -> list[str]:
    return [mark.name for mark in marks_of(Report("", 1, 1, {heading: table})) if mark.met is False]


def test_each_scenario_has_its_function_and_each_part_is_one() -> None:
    for each in SCENARIOS.values():
        measured = [SCENARIOS[name] for name in each.parts] or [each]
        assert all(callable(resolve_name(f"benchmarks.{one.measure}")) for one in measured)


def test_a_mark_is_judged_by_its_median() -> None:
    for target, met in {"at least 0.6": True, "at most 0.6": True, "at most 0.59": False}.items():
        assert Mark("a / b", [0.5, 0.8, 0.6], target).met is met


def test_a_percentile_is_the_sample_that_so_many_do_not_exceed() -> None:
    """Too few samples have none."""
    expected = {1000: [500, 990, 999], 999: [500, 990], 101: [51, 100], 100: [50, 99], 99: [50]}
    for samples, values in {**expected, 3: [2], 2: [1], 1: [], 0: []}.items():
        found = (percentile(range(samples, 0, -1), per_mille) for per_mille in (500, 990, 999))
        assert list(chain(*found)) == values


def test_percentiles_are_of_all_rounds_together() -> None:
    """Each round has enough samples for its own median, but one has too few for p99."""
    rounds = [[1.0] * 100, [3.0] * 40]
    assert [pooled(rounds, n) for n in (500, 990, 999)] == [[1.0, 1.0, 3.0], [3.0], []]


def test_a_latency_begins_when_its_event_was_due() -> None:
    """Event 3 of 2/s is due 1.5 s after the start, whenever it is sent; the first second is out."""
    recorded_s = {0: 1000.5, 1: 1000.6, 2: 1001.25, 3: 1002.0}
    assert scenarios.latencies_ms(2, 1000.0, recorded_s) == pytest.approx([250.0, 500.0])


def falling(first_s: float, ready: int, per_s: float, step: int = 1) -> list[Progress]:
    """Return how a queue empties from a time on, `step` messages at once, at 10 µs each."""
    return [
        Progress(first_s + done / per_s, ready - done // step * step, done * 1e-5)
        for done in range(ready + 1)
    ]


WHOLE = falling(10.0, 1000, per_s=500.0)
TWO = [
    *(seen._replace(ready=seen.ready + 1000) for seen in falling(0.0, 1000, 100.0)),
    *falling(10.0, 1000, 400.0),
]


@pytest.mark.parametrize(
    ("seen", "behind", "prefetch", "per_s"),
    [
        # A start of ten seconds and a slow end are in the outer tenths.
        ([Progress(0.0, 1000, 0.0), *WHOLE[:950], Progress(100.0, 0, 0.01)], 0, 0, 500.0),
        # 400 of 1,000 leave the queue before the first ack.
        ([Progress(0, 1000, 0), Progress(1, 700, 0), *falling(5.0, 600, 100.0)], 0, 400, 100.0),
        # Two series have rates of their own.
        (TWO, 1000, 0, 100.0),
        (TWO, 0, 0, 400.0),
        # Acks arrive 90 at a time: a step cut in two would be wrong by up to a ninth.
        (falling(0.0, 1000, 100.0, step=90), 0, 0, 100.0),
    ],
)
def test_the_rate_is_that_of_the_inner_tenths_without_the_prefetch_window(
    seen: list[Progress], behind: int, prefetch: int, per_s: float
) -> None:
    found = rate(seen, 1000, behind=behind, prefetch=prefetch)
    assert found == pytest.approx({"events/s": per_s, "CPU µs an event": 10.0})


def test_too_few_samples_give_no_rate() -> None:
    with pytest.raises(AssertionError, match="too few events"):
        rate([Progress(0.0, 1000, 0.0), Progress(1.0, 500, 0.1), Progress(2.0, 0, 0.2)], 1000)


def test_a_series_has_the_same_order_each_time_and_its_duplicates_shuffled_or_at_the_end() -> None:
    """Ids are new each time, so the order shows in the place of each event's first copy."""
    one, other = (scenarios.series(scenarios.HALF, 100) for _ in range(2))
    places = [[bodies.index(body) for body in bodies] for bodies in (one, other)]
    twice = scenarios.series(BARE, 10)

    assert list(Counter(one).values()) == [2] * 50
    assert places[0] == places[1] != sorted(places[0])
    assert not set(one) & set(other)
    assert (twice[:10], len(set(twice))) == (twice[10:], 10)


@pytest.mark.parametrize(
    ("of_slots", "of_client", "misses"),
    [(0.91, 0.41, 0), (0.9, 0.4, 0), (0.5, 0.61, 0), (0.89, 0.59, 4), (0.89, 0.39, 8)],
)
def test_calls_to_a_slow_receiver_reach_the_lesser_of_two_bounds(
    of_slots: float, of_client: float, misses: int
) -> None:
    """With a thousand calls at once the client cannot fill the slots, and is the bound.

    Four marks are for a slow receiver, and four for one that answers at once.
    """
    table: Table = {}
    for name, (_, answer_ms, at_once) in scenarios.CALLS.items():
        reached = of_slots * (1000 * at_once / answer_ms if answer_ms else 1000)
        table[name] = {"events/s": [reached], "client alone, calls/s": [reached / of_client]}

    assert len(missed("Calls", scenarios.add_call_shares(table))) == misses


def test_the_longest_history_has_to_meet_the_marks() -> None:
    names = ("first event recorded, ms", "import, s", "service MB", "etcd's file, in use MB")
    empty = {name: [n] for name, n in zip(names, (200.0, 0.0, 50.0, 1.0), strict=True)}
    longest = {name: [n] for name, n in zip(names, (300.0, 5.0, 50.0999, 1.3), strict=True)}
    table: Table = {"0": empty, "1,000": {**longest, "transactions for duplicates": [0.0]}}
    history.add_growth(table, (0, 1000))
    worse = {
        "first event ÷ without history": 1.51,
        "import, s": 5.1,
        "service bytes a record": 100.1,
        "transactions for duplicates": 1,
    }

    assert missed("By number of records", table) == []
    assert [table["1,000"][name][0] for name in worse] == pytest.approx([1.5, 5, 99.9, 0])
    for name, value in worse.items():
        table["1,000"][name] = [value]
    assert missed("By number of records", table) == [
        f"{name}, with the most records" for name in worse
    ]


def load(lasts_s: int, late_s: int = 0, grows: float = 0) -> list[history.Sample]:
    """Return a run with one lease a second, each revoked `late_s` after its time."""
    constant = dict.fromkeys((*history.MEASURES, "ready"), 100.0)
    return [
        constant
        | {"at_s": at_s, "service MB": 100 + grows * at_s, "written": 1000 * at_s}
        | {"granted": at_s, "revoked": max(0, at_s - 66 - late_s)}
        for at_s in range(0, lasts_s + 1, 5)
    ]


@pytest.mark.parametrize(
    ("samples", "judged", "expected"),
    [
        (load(1800), 8, []),
        (load(1800, grows=1), 8, ["service MB, last third ÷ the one before"]),
        (load(1800, late_s=60), 8, ["the oldest lease, s over its time"]),
        # Too short to be judged.
        (load(120, grows=10), 0, []),
    ],
)
def test_what_grows_misses_its_mark(
    samples: list[history.Sample], judged: int, expected: list[str]
) -> None:
    table = {"figure": history.thirds(history.by_minute(samples))}
    report = Report("", 1, 1, {"After the load": table})

    assert [mark.met is None for mark in marks_of(report)].count(False) == judged
    assert missed("After the load", table) == expected


def test_the_oldest_lease_is_the_first_not_revoked() -> None:
    totals = ((0.0, 0, 0), (5, 2, 0), (10, 4, 2), (15, 6, 3), (20, 6, 6))
    samples = [dict(zip(("at_s", "granted", "revoked"), each, strict=True)) for each in totals]
    assert history.oldest_lease_s(samples) == [0, 5, 5, 10, 0]


def test_a_ratio_may_fall_by_a_fifth() -> None:
    """A ratio that is no longer measured fails; a new one passes, and is listed last."""
    kept = {"a": 1.0, "gone": 1.0, "b": 50.0}

    assert list(compare(kept, {"new": 0.1, "b": 40.5, "a": 0.79})) == [
        (False, "FELL     a: kept 1.000, now 0.790 (-21 %)"),
        (False, "MISSING  gone: kept 1.000, not measured now"),
        (True, "ok       b: kept 50.000, now 40.500 (-19 %)"),
        (True, "new      new: 0.100, not kept yet: make bench keeps it"),
    ]


def test_the_committed_page_and_pictures_are_those_of_the_committed_figures(tmp_path: Path) -> None:
    """After an intended change, `bench --show` writes them again."""
    (tmp_path / "table.json").write_text((RESULTS / "table.json").read_text())
    exit_code = main(["bench", "--show", "--to", str(tmp_path)])
    shown = {path.name: path.read_text() for path in tmp_path.iterdir()}

    assert sorted(shown) == ["latency.svg", "table.json", "table.md", "throughput.svg"]
    assert shown == {name: (RESULTS / name).read_text() for name in shown}
    assert exit_code == ("|  NO |" in shown["table.md"])


def test_there_is_no_percentile_of_a_rate_that_some_round_missed() -> None:
    """A round has to reach 0.99 of it. The picture marks the place."""
    table: Table = {
        "100": summary(100, [[1.0] * 60 + [20.0] * 40, [1.0] * 100], [0.1], [100.0, 99.1]),
        "1,000": summary(1000, [[2.0] * 900] * 2, [0.1], [1000.0, 989.0]),
    }
    picture = draw(table, **SCENARIOS["latency"].pictures["latency.svg"])

    assert [row["p50, ms"] for row in table.values()] == [[1.0, 1.0, 1.0], []]
    assert table["1,000"]["rate not kept, slowest"] == [989.0]
    assert '<circle cx="110.0" cy="390.0" r="5" fill="#0b62a4"/>' in picture
    assert picture.count(">(not reached)</text>") == 1


def test_etcds_metrics_are_found_by_their_whole_name() -> None:
    lines = [
        f"# TYPE {name} gauge\n{name}_of_another 7\n{name} {number}e+06"
        for number, (name, _) in enumerate(GAUGES.values())
    ]

    assert list(gauges_of("\n".join(lines)).values()) == [0, 1, 2, 3e6, 4e6, 5e6, 6e6, 7e6, -1e6]
    with pytest.raises(KeyError):
        gauges_of("")
