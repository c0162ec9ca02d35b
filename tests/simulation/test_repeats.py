from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from simulation.plan import OF_DATA, OF_PROCESSES, PER_MESSAGE, PER_REQUEST, TIMED
from simulation.repeats import CASES, COLUMNS, WINDOW_S, look, recorded_s, run

PAGE = Path(__file__).parents[2] / "docs" / "when-can-my-code-run-twice.md"


def read_table() -> dict[str, dict[str, bool]]:
    """Return the page's table of faults: by row and column, whether there can be a repeat."""
    table: dict[str, dict[str, bool]] = {}
    inside = False
    for line in PAGE.read_text().splitlines():
        first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if cells == list(COLUMNS):
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not set(first) <= set("-"):
            assert set(cells) <= {"yes", "no"}, f"{first}: {cells}"
            table[first] = {
                column: cell == "yes" for column, cell in zip(COLUMNS, cells, strict=True)
            }
    return table


def test_the_page_has_a_row_for_each_case() -> None:
    assert list(read_table()) == list(CASES)


def test_every_fault_of_the_simulation_is_in_a_row() -> None:
    known = {*PER_REQUEST, *PER_MESSAGE, *TIMED, *OF_PROCESSES, *OF_DATA}
    assert {fault for case in CASES.values() for fault in case.faults} == {"", *known}


@pytest.mark.parametrize("row", CASES)
def test_the_page_says_what_the_runs_show(row: str) -> None:
    """Each "yes" was there in some run of the row's faults, each "no" in none of them."""
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
    worlds = [run(case, "", seed) for seed in range(case.runs)]
    apart_s = [
        later_s - earlier_s
        for world in worlds
        if world is not None
        for times_s in recorded_s(world).values()
        for earlier_s, later_s in pairwise(times_s)
    ]
    assert len(apart_s) >= 10
    assert min(apart_s) >= WINDOW_S


def test_the_page_links_to_what_is_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", PAGE.read_text())
    assert links
    assert [link for link in links if not (PAGE.parent / link).exists()] == []
