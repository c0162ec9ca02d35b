"""The arithmetic on what a run has found, and how it is judged, kept and shown."""

from pathlib import Path

import pytest

from . import marks, pictures, results, tables
from .keyspace import gauges_of
from .marks import Mark
from .results import Percentiles, Rate, Rates, Sample, Spread
from .subjects import CALLS, CONFIRMED, CONSUMERS, DUPLICATES, SWEEP, UNCONFIRMED

CEILING, NAIVE, BARE, BARE_SMALL, ORDER, ORDER_SMALL, HALF = (each.name for each in CONSUMERS)
SUBJECTS = CEILING, NAIVE, BARE, BARE_SMALL, ORDER, ORDER_SMALL, HALF, DUPLICATES
PER_S = dict(zip(SUBJECTS, (1000, 20, 600, 450, 500, 350, 900, 1200), strict=True))
OF_SLOTS, OF_CLIENT = 0.95, 0.5
GAUGES = gauges_of("")._replace(keys=1000, memory=10**9, file=10**9, used=10**9)


def rates(**per_second: float) -> Rates:
    """Return a round with these events per second."""
    return {name: Rate(number, 1e6 / number) for name, number in per_second.items()}


def load(recorded_ms: list[float], *, per_s: float = 100.0, due_per_s: int = 100) -> results.Load:
    """Return a round at such a rate."""
    return results.Load(due_per_s, per_s, 0.1, recorded_ms)


def bench(
    recorded_ms: float = 2.7, of_slots: float = OF_SLOTS, of_client: float = OF_CLIENT, **per_s: int
) -> results.Bench:
    """Return a run of one round, in which all calls reach such a part of slots and client."""
    calls: Rates = {}
    for each in CALLS:
        reached = of_slots * (each.most_per_s or 1000)
        calls |= {each.name: Rate(reached, 1.0), each.alone: Rate(reached / of_client, 1.0)}
    points = {subject.name: Rate(500, 2.0) for pair in SWEEP.values() for subject in pair}
    return results.Bench(
        machine="a machine",
        events=40_000,
        consuming=[{name: Rate(number, 1.0) for name, number in (PER_S | per_s).items()}],
        calls=[calls],
        publishing=[{CONFIRMED: Rate(70, 1.0), UNCONFIRMED: Rate(100, 1.0)}],
        idle=results.Idle([recorded_ms], [1.0], [1.0]),
        sweep=[{CEILING: Rate(1000, 1.0), **points}],
        loads=[
            Percentiles.of([load([1.0] * 60 + [20.0] * 40)]),
            Percentiles.of([load([2.0], per_s=80, due_per_s=1_000)]),
        ],
    )


def growth(transactions: int = 0) -> results.Growth:
    """Return a run with no record and with a thousand, each of which takes 50 bytes of memory."""
    empty = results.Size(0, GAUGES, [results.Start(200.0, 0.0, 50_000_000)], 0, 0, Rate(10.0, 1.0))
    longest = results.Size(
        1000, GAUGES, [results.Start(250.0, 1.5, 50_050_000)], 500, transactions, Rate(9.0, 1.0)
    )
    return results.Growth("a machine", [empty, longest], 99.0)


def steady(lasts_s: int, late_s: int = 0, grows: int = 0) -> results.Steady:
    """Return a run with a lease a second, revoked after its time and `late_s`."""
    samples = [
        Sample(
            at_s=at_s,
            memory=10**8 + grows * at_s,
            ready=20_000,
            etcd=GAUGES._replace(
                granted=at_s, revoked=max(0, at_s - 66 - late_s), written=1000 * at_s
            ),
        )
        for at_s in range(0, lasts_s + 1, 5)
    ]
    return results.Steady("a machine", 60, 66, "a flag", samples, 5, 5, 66.0, 130.0, GAUGES)


def missed(judged: list[Mark]) -> list[str]:
    return [mark.what for mark in judged if not mark.met]


def test_a_ratio_is_taken_round_by_round() -> None:
    """The machine is ten times slower in the second round: the ratio of the medians is 0.8."""
    rounds = [rates(a=50, b=100), rates(a=8, b=10), rates(a=60, b=100)]

    assert results.ratio(rounds, "a", "b") == Spread(0.6, 0.5, 0.8)


def test_a_round_that_a_subject_took_no_part_in_does_not_count() -> None:
    rounds = [rates(a=10, b=100), rates(b=50), rates(a=30)]

    assert results.per_s(rounds, "a") == Spread(20, 10, 30)
    assert results.cpu_us(rounds, "b") == Spread(15_000, 10_000, 20_000)
    assert results.ratio(rounds, "a", "b") == Spread(0.1, 0.1, 0.1)


@pytest.mark.parametrize(
    ("samples", "per_mille", "expected"),
    [
        *((1000, 500, 500), (1000, 990, 990), (1000, 999, 999)),
        *((100, 990, 99), (101, 990, 100), (3, 500, 2)),
        # Too few give none.
        *((999, 999, None), (99, 990, None), (1, 500, None), (0, 500, None)),
    ],
)
def test_a_percentile_is_the_sample_that_so_many_do_not_exceed(
    samples: int, per_mille: int, expected: int | None
) -> None:
    assert results.percentile([float(n) for n in range(samples, 0, -1)], per_mille) == expected


@pytest.mark.parametrize(("reached", "kept"), [(100.0, True), (99.1, True), (98.9, False)])
def test_a_publisher_keeps_its_rate_within_a_hundredth(reached: float, kept: bool) -> None:
    assert Percentiles.of([load([1.0], per_s=reached)]).kept is kept


def test_percentiles_are_of_all_rounds_together() -> None:
    """Each round has enough samples for a median of its own, only together they have for p99."""
    found = Percentiles.of([load([1.0] * 60), load([3.0] * 40)])

    assert found.samples == 100
    assert found.ms == {"p50": Spread(1.0, 1.0, 3.0), "p99": Spread(3.0, 3.0, 3.0), "p99.9": None}


def test_a_rate_that_was_not_kept_has_no_percentile() -> None:
    """One round is enough: what it would have found is what is not known."""
    found = Percentiles.of([load([1.0] * 5000), load([1.0] * 5000, per_s=80.0)])

    assert not found.kept
    assert found.slowest_per_s == 80.0
    assert set(found.ms.values()) == {None}


def test_every_ratio_is_of_a_subject_to_its_reference() -> None:
    found = marks.medians(bench(recorded_ms=3.0))

    of_calls = [OF_CLIENT] * 12 + [OF_SLOTS] * 8
    assert list(found.values()) == [0.6, 0.5, 0.45, 0.35, 0.9, 1.2, 30.0, *of_calls, 0.7, 0.6667]


def test_a_service_that_gets_slower_has_a_smaller_idle_ratio() -> None:
    """More is better in all ratios, so that the guard need not know which one it looks at."""
    slower, faster = (marks.ratios(bench(recorded_ms=ms))[marks.IDLE] for ms in (4.0, 3.0))
    assert slower < faster


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (bench(), []),
        (bench(recorded_ms=2.79), []),
        (bench(recorded_ms=2.81), ["publish to recorded, idle / bare steps, medians"]),
        (bench(**{BARE: 599}), ["durable, no effect / ceiling"]),
        (bench(**{ORDER: 499}), ["durable, one effect / ceiling"]),
        (bench(**{BARE_SMALL: 449}), ["durable, no effect / ceiling, 128 operations"]),
        (bench(**{ORDER_SMALL: 349}), ["durable, one effect / ceiling, 128 operations"]),
        (bench(**{DUPLICATES: 699}), ["all duplicates, cache warm / ceiling"]),
        (bench(**{NAIVE: 25}), ["durable, no effect / naive"]),
    ],
)
def test_a_mark_is_missed_where_the_median_is_on_its_wrong_side(
    found: results.Bench, expected: list[str]
) -> None:
    assert missed(marks.judge_bench(found)) == expected


@pytest.mark.parametrize(
    ("of_slots", "of_client", "met"),
    [(0.91, 0.41, True), (0.5, 0.61, True), (0.89, 0.59, False)],
)
def test_calls_to_a_slow_receiver_reach_the_lesser_of_two_bounds(
    of_slots: float, of_client: float, met: bool
) -> None:
    """Where a thousand wait at once the client cannot fill the slots, and is the bound."""
    judged = marks.judge_bench(bench(of_slots=of_slots, of_client=of_client))

    assert [mark.met for mark in judged if "of the slots" in mark.what] == [met] * 4


def test_calls_to_a_receiver_that_answers_at_once_are_held_against_their_client() -> None:
    assert [", 0 ms, " in what for what in missed(marks.judge_bench(bench(of_client=0.39)))] == [
        True
    ] * 4


def test_one_missed_mark_is_the_verdict_of_a_run() -> None:
    met, missed = Mark("a / b", 0.51, "at least 0.5", True), Mark("c / d", 2.1, "at most 2", False)

    assert marks.verdict([met, met]) == "All 2 marks are met."
    assert marks.verdict([met, missed]) == "1 of 2 marks MISSED: c / d"


def test_a_history_that_is_met_in_etcd_again_misses_its_mark() -> None:
    assert [mark.value for mark in marks.judge_growth(growth())] == [1.25, 1.5, 50.0, 0]
    assert not missed(marks.judge_growth(growth()))
    assert missed(marks.judge_growth(growth(1))) == [
        "1,000 records: transactions for 500 duplicates"
    ]


def test_the_oldest_lease_is_the_first_that_is_not_revoked() -> None:
    totals = ((0, 0, 0), (5, 2, 0), (10, 4, 2), (15, 6, 3), (20, 6, 6))
    samples = [
        Sample(at_s, 1, 1, GAUGES._replace(granted=granted, revoked=revoked))
        for at_s, granted, revoked in totals
    ]

    assert marks.oldest_lease_s(samples) == [0, 5, 5, 10, 0]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (steady(1800), []),
        (steady(1800, grows=10**5), ["service MB, last third ÷ the one before"]),
        (steady(1800, late_s=60), ["the oldest lease, s over its time"]),
    ],
)
def test_what_grows_misses_its_mark(found: results.Steady, expected: list[str]) -> None:
    assert len(marks.judge_steady(found)) == 8
    assert missed(marks.judge_steady(found)) == expected


def test_a_short_run_is_not_judged() -> None:
    assert marks.judge_steady(steady(120, grows=10**6)) == []
    assert "Too short" in tables.steady(steady(120))


@pytest.mark.parametrize(
    ("kept", "now", "expected"),
    [
        (1.0, 1.2, (True, "ok       a / b: kept 1.000, now 1.200 (+20 %)")),
        (1.0, 0.81, (True, "ok       a / b: kept 1.000, now 0.810 (-19 %)")),
        (1.0, 0.79, (False, "FELL     a / b: kept 1.000, now 0.790 (-21 %)")),
        # The fall is of what is kept: it is more than a fifth of what is measured.
        (50.0, 40.5, (True, "ok       a / b: kept 50.000, now 40.500 (-19 %)")),
    ],
)
def test_a_ratio_may_fall_by_a_fifth_and_no_more(
    kept: float, now: float, expected: tuple[bool, str]
) -> None:
    assert marks.compare({"a / b": kept}, {"a / b": now}) == [expected]


def test_each_ratio_is_held_against_its_own_name() -> None:
    """One that is no longer measured fails; one that is not kept yet is told last, and passes."""
    kept, now = {"a": 1.0, "gone": 1.0, "b": 2.0}, {"new": 0.1, "b": 1.0, "a": 1.0}

    assert marks.compare(kept, now) == [
        (True, "ok       a: kept 1.000, now 1.000 (+0 %)"),
        (False, "MISSING  gone: kept 1.000, not measured now"),
        (False, "FELL     b: kept 2.000, now 1.000 (-50 %)"),
        (True, "new      new: 0.100, not kept yet: make bench keeps it"),
    ]


def test_ratios_that_are_kept_are_read_back(tmp_path: Path) -> None:
    marks.write_ratios(tmp_path / "ratios.json", {"a / b": 0.5})

    assert marks.read_ratios(tmp_path / "ratios.json") == {"a / b": 0.5}


@pytest.mark.parametrize("text", ['{"a": "0.5"}', '{"a": 0}', "[1]", "{"])
def test_what_holds_no_ratios_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "ratios.json").write_text(text)

    with pytest.raises(ValueError, match=r"ratios by name|Expecting"):
        marks.read_ratios(tmp_path / "ratios.json")


@pytest.mark.parametrize("found", [bench(), growth(), steady(60)])
def test_a_run_is_read_back_as_it_was_written(
    found: results.Bench | results.Growth | results.Steady, tmp_path: Path
) -> None:
    results.write(found, tmp_path / "new" / "run.json")

    assert results.read(type(found), tmp_path / "new" / "run.json") == found


def test_tables_show_medians_with_their_spread_and_what_has_no_figure() -> None:
    found = bench()
    found.consuming.append({name: Rate(2 * number, 1.0) for name, number in PER_S.items()})
    text = tables.bench(found)

    assert "| library, no effect, 1024/512 |     900 (600 to 1,200) |" in text
    assert "**At 1,000/s there is no figure**" in text
    assert "| 500 / 0 |" in tables.growth(growth())
    assert "| 2      |    1,000 |" in tables.steady(steady(600))


def test_pictures_place_a_greater_figure_higher() -> None:
    """The ceiling is at 1,000 of 1,200, the library at 500; p50 at 1 ms of 50, p99 at 20."""
    throughput, latency = pictures.throughput(bench()), pictures.latency(bench())

    assert '"M80 131.7H700" stroke="#555"' in throughput
    assert throughput.count('cy="260.8" r="5" fill="#0b62a4"') == 6
    assert '<circle cx="110.0" cy="390.0" r="5" fill="#0b62a4"/>' in latency
    assert '<circle cx="110.0" cy="152.6" r="5" fill="#d9730d"/>' in latency
    assert ">(not reached)</text>" in latency
