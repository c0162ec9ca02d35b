"""What one fault at a time repeats: the page "When can my code run twice?" says what runs show."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest

from idempotent_consumer.bus import MAX_BYTES_IN_FLIGHT
from simulation.checker import Checker
from simulation.run import OF_DATA, OF_PROCESSES, PER_MESSAGE, PER_REQUEST, Plan
from simulation.world import TIMED, World, draw_plan, simulate

PAGE = Path(__file__).parents[2] / "docs" / "when-can-my-code-run-twice.md"

RUNS_AGAIN = "Pure handler runs again"
RECORDED_TWICE = "Recorded twice"
CALLED_AGAIN = "Call repeated"
OVERLAP = "Calls overlap"
PARKED_TWICE = "Parked twice"
PUBLISHED_AGAIN = "Event published again"
COLUMNS = (RUNS_AGAIN, RECORDED_TWICE, CALLED_AGAIN, OVERLAP, PARKED_TWICE, PUBLISHED_AGAIN)

WINDOW_S = 3
_RUNS_AT_MOST = 20
"""A multiple of a case's own number of runs."""

_RATES = {
    **dict.fromkeys(PER_REQUEST, 0.1),
    **dict.fromkeys(PER_MESSAGE, 0.3),
    **dict.fromkeys((*TIMED, *OF_PROCESSES), 6.0),
    **dict.fromkeys(OF_DATA, 1.0),
    "etcd away": 1.0,
    "etcd away for longer than a lease": 1.0,
    "publish refused": 0.6,
    "stopped": 3.0,
}
"""The probability for each request or message, or the number of times."""

_FAILING = {"types": ("flaky", "flaky_call", "announce")}
_MANY_CALLS = {"types": ("order", "announce", "call", "call", "call")}
_MUCH_IN_HAND = {
    "types": ("order", "announce", "call", "call"),
    "shares": (50, 25, 0, 0, 25),
    "events": 60,
}
# Some records are half published at any time, and copies of their events wait at other replicas.
_MANY_HALF_PUBLISHED = {
    "types": ("announce", "announce", "announce", "call"),
    "shares": (30, 65, 0, 0, 5),
    "events": 300,
    "latency_s": 0.05,
    "replicas": 5,
}
_WITH_OTHER_BODIES = {"shares": (40, 25, 25, 0, 10)}
_SLOW_NETWORK = {"latency_s": 0.2}
_IN_TIME = {"call_timeout_s": 5.0, "call_s": 2.0}
_SLOW_CALLS = {"call_timeout_s": 5.0, "call_s": 5.0}


@dataclass(frozen=True)
class Case:
    """The runs for one row of the page: at least ``runs`` for each of its faults alone.

    The fault "" is none. ``changes`` are changes of the plan, ``settings`` of the service's
    settings. With ``copies`` the row is about events that are sent several times; otherwise a pure
    handler's runs count only for events sent once. With ``claims_hold`` a run in which a claim's
    lease ends is left out: it belongs to another row. ``excused`` are violations that the checker,
    which knows no window, may report.
    """

    faults: tuple[str, ...] = ("",)
    runs: int = 25
    changes: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    copies: bool = False
    claims_hold: bool = False
    excused: tuple[str, ...] = ()


CASES = {
    "Nothing fails, and the event is sent once": Case(changes={"shares": (90, 0, 0, 0, 10)}),
    "Nothing fails, and the event is sent several times": Case(copies=True),
    "The producer gets no confirm and sends again": Case(("publish not confirmed",), copies=True),
    "Another body comes under the same id": Case(changes=_WITH_OTHER_BODIES, copies=True),
    "A duplicate comes after the window": Case(
        settings={"dedup_window_s": WINDOW_S}, copies=True, excused=("double", "unexpected key")
    ),
    "The handler raises": Case(changes=_FAILING),
    "The handler raises, and its retry comes back twice or finds no queue": Case(
        ("dead-lettered twice", "queue deleted"), changes={**_FAILING, **_SLOW_NETWORK}
    ),
    "The receiver is down, slow, flapping or rejecting for a while": Case(
        ("receiver down", "receiver slow", "receiver flapping", "receiver rejecting")
    ),
    "Process killed": Case(("killed",), changes=_SLOW_NETWORK),
    "SIGTERM, and no call takes longer than 7 s": Case(
        ("stopped",), 100, changes={"latency_s": 0.02, **_SLOW_CALLS}, settings={"calls_at_once": 1}
    ),
    "Process frozen, but not past its heartbeats, its lease or a call's time-out": Case(
        ("frozen",), changes={**_IN_TIME, "longest_freeze_s": 2.0}, claims_hold=True
    ),
    "Process frozen for longer": Case(("frozen",), 50, changes={**_MANY_CALLS, **_SLOW_CALLS}),
    "RabbitMQ restarted, connection lost, channel closed, consumer cancelled": Case(
        ("broker restarted", "connection lost", "channel closed", "consumer cancelled"),
        changes=_SLOW_NETWORK,
    ),
    "RabbitMQ reorders messages, or refuses one that is sent on": Case(
        ("reordered", "publish refused")
    ),
    "RabbitMQ confirms late, or has an alarm": Case(("confirm late", "alarm")),
    "etcd away or full, requests lost, late or refused, and the claim's lease outlasts it": Case(
        ("etcd away", "etcd out of space", *PER_REQUEST), claims_hold=True
    ),
    "etcd away for longer than the claim's lease": Case(
        ("etcd away for longer than a lease",), changes={**_MANY_HALF_PUBLISHED, **_SLOW_CALLS}
    ),
    "An operator revokes the claim's lease": Case(("lease revoked",), changes=_SLOW_CALLS),
    "etcd wiped, and the service restarted": Case(
        ("etcd wiped",), 50, changes={**_MUCH_IN_HAND, **_SLOW_CALLS}
    ),
    "etcd restored from a snapshot, and the service restarted": Case(
        ("etcd restored",), 50, changes={**_MUCH_IN_HAND, **_SLOW_CALLS}
    ),
}
"""The cases by the first cell of their row."""


def draw(case: Case, fault: str, rng: Random) -> Plan:
    """Draw a run of a case, with this fault alone."""
    drawn = draw_plan(rng)
    settings: dict[str, Any] = {
        "batch_size": rng.choice([1, 8, 128]),
        "etcd_max_txn_ops": 128,
        "retry_delays": (("1s", 1), ("2s", 2)),
        "dedup_window_s": 86400,
        "calls_at_once": rng.choice([4, 16]),
    }
    plan = replace(
        drawn,
        replicas=rng.choice([2, 3]),
        settings=replace(drawn.settings, **{**settings, **case.settings}),
        cache_entries=1000,
        call_s=min(2.0, drawn.call_timeout_s),
        events=30,
        faulty_s=20.0,
        max_bytes=MAX_BYTES_IN_FLIGHT,
        rates={fault: _RATES[fault]} if fault else {},
        types=("order", "announce", "call"),
        shares=(50, 40, 0, 0, 10),
        restarted_at_once=rng.random() < 0.5,
    )
    return replace(plan, **case.changes)


@dataclass
class Seen:
    """What the runs of a case have shown. ``yes`` has by column the seeds with its repeat."""

    runs: int = 0
    fired: int = 0
    judged: Counter[str] = field(default_factory=Counter)
    yes: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    complaints: list[str] = field(default_factory=list)


def look(case: Case, wanted: Collection[str]) -> dict[str, Seen]:
    """Do a case's runs, and return by fault what was repeated.

    Further runs look for a ``wanted`` repeat that is rare, so no test depends on a known seed.
    """
    seen = {fault: Seen() for fault in case.faults}
    for seed in range(_RUNS_AT_MOST * case.runs):
        found = {column for one in seen.values() for column in one.yes}
        if seed >= case.runs and found.issuperset(wanted):
            break
        for fault, one in seen.items():
            world = simulate(seed, partial(draw, case, fault))
            if case.claims_hold and world.run.fired["claim ended by its lease"]:
                continue
            one.runs += 1
            one.fired += any(f"{kind} ".startswith(f"{fault} ") for kind in world.run.fired)
            violations = [v for v in world.run.violations if not v.startswith(case.excused)]
            one.complaints += [f"seed {seed}: {violation}" for violation in violations]
            for column, times in counted(world, case.copies).items():
                one.judged[column] += len(times)
                if any(times):
                    one.yes[column].append(seed)
    return seen


def counted(world: World, copies: bool) -> dict[str, list[int]]:
    """Return by column how often each event was repeated."""
    seen, sent = Checker(world), Counter(one.event_id for one in world.broker.sent.values())
    runs = Counter(event.id for event in world.outside.runs if copies or sent[event.id] == 1)
    reached = [[call for call in calls if call.reached] for calls in seen.calls.values()]
    times = {
        RUNS_AGAIN: runs.values(),
        RECORDED_TWICE: map(len, recorded_s(seen).values()),
        CALLED_AGAIN: filter(None, map(len, reached)),
        PARKED_TWICE: (number for body, number in seen.parked.items() if body),
        PUBLISHED_AGAIN: map(len, world.broker.published_s.values()),
    }
    overlaps = [
        sum(second.start_s < first.end_s for first, second in pairwise(calls))
        for calls in filter(None, reached)
    ]
    return {OVERLAP: overlaps, **{column: [n - 1 for n in ns] for column, ns in times.items()}}


def recorded_s(seen: Checker) -> dict[bytes, list[float]]:
    """Return when each record was put as done."""
    done: dict[bytes, list[float]] = defaultdict(list)
    for change, _ in seen.done:
        done[change.key].append(change.at_s)
    return done


def read_table() -> dict[str, dict[str, bool]]:
    """Return the page's table of faults: by row and column, whether a repeat is possible."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text().splitlines()
    ]
    assert [*COLUMNS] in [cells for _, *cells in lines]
    return {
        first: {column: cell == "yes" for column, cell in zip(COLUMNS, cells, strict=True)}
        for first, *cells in lines
        if cells and {"yes", "no"}.issuperset(cells)
    }


def test_the_page_has_a_row_for_each_case() -> None:
    assert list(read_table()) == list(CASES)


def test_every_fault_of_the_simulation_is_in_a_row() -> None:
    known = {*PER_REQUEST, *PER_MESSAGE, *TIMED, *OF_PROCESSES, *OF_DATA}
    assert {fault for case in CASES.values() for fault in case.faults} == {"", *known}


# Some rows take a thousand runs, and a busy machine takes longer for them.
@pytest.mark.timeout(600)
@pytest.mark.parametrize("row", CASES)
def test_the_page_says_what_the_runs_show(row: str) -> None:
    """Each "yes" is seen in some run of the row's faults, each "no" in none."""
    case, said = CASES[row], read_table()[row]
    looks = look(case, {column for column, can_be in said.items() if can_be})
    for fault, seen in looks.items():
        assert seen.complaints == []
        assert not fault or seen.fired > seen.runs / 3, f"{fault} has fired {seen.fired} times"
        assert min(seen.judged.values()) >= 50, f"{fault}: too few events in {seen.judged}"
    for column, can_be in said.items():
        seeds = {fault: seen.yes[column] for fault, seen in looks.items() if seen.yes[column]}
        assert bool(seeds) == can_be, (
            f"{row}: {column}? The page says {'yes' if can_be else 'no'}, "
            f"and these seeds, by fault, had it: {seeds}"
        )


def test_a_record_is_kept_for_the_window_at_least() -> None:
    case = CASES["A duplicate comes after the window"]
    worlds = [simulate(seed, partial(draw, case, "")) for seed in range(case.runs)]
    apart_s = [
        later_s - earlier_s
        for world in worlds
        for times_s in recorded_s(Checker(world)).values()
        for earlier_s, later_s in pairwise(times_s)
    ]
    assert len(apart_s) >= 10
    assert min(apart_s) >= WINDOW_S
