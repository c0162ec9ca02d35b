"""The catalogue fits the code, and only a failed assertion or a violation catches a mutant."""

from __future__ import annotations

import ast
import builtins
from pathlib import Path

import pytest

from mutants.bench import REPOSITORY, run_suite
from mutants.catalogue import (
    SIMULATION,
    Edit,
    Mutant,
    OutOfDate,
    mutated,
    read_catalogue,
    suite_file,
)
from mutants.probe import check_origin, is_judged, is_judgement

MUTANTS = read_catalogue()


def test_no_two_mutants_have_one_name() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 143


def test_each_mutant_changes_the_code_as_it_is() -> None:
    """The code contains each of its texts once, and is still Python with the mutant's instead."""
    for mutant in MUTANTS:
        for path, text in mutated(REPOSITORY, mutant).items():
            assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(path.read_text())), mutant.name


def test_each_mutant_names_a_suite_that_exists() -> None:
    suites = {mutant.suite for mutant in MUTANTS} - {SIMULATION}
    assert [suite for suite in suites if not (REPOSITORY / suite_file(suite)).is_file()] == []


@pytest.mark.parametrize(("text", "times"), [("one\n", 0), ("two\ntwo\n", 2)])
def test_a_text_that_the_code_does_not_contain_once_is_named_in_one_line(
    tmp_path: Path, text: str, times: int
) -> None:
    (tmp_path / "code.py").write_text(text)
    with pytest.raises(OutOfDate, match=f"'old' must be .* {times} times in code.py") as raised:
        mutated(tmp_path, Mutant("old", "", SIMULATION, (Edit("code.py", "two", "three"),)))
    assert "\n" not in str(raised.value)


def test_a_failed_assertion_is_a_judgement() -> None:
    assert is_judgement(pytest.fail.Exception("it is so"))
    assert is_judgement(AssertionError("1 != 2"))
    assert is_judgement(ExceptionGroup("two ways", [AssertionError(), AssertionError()]))


@pytest.mark.parametrize("kind", ["NameError", "ImportError", "TypeError", "KeyError", "OSError"])
def test_any_other_exception_is_a_crash(kind: str) -> None:
    error = getattr(builtins, kind)("botched")
    assert not is_judgement(error)
    assert not is_judgement(ExceptionGroup("two ways", [AssertionError(), error]))


def test_a_violation_is_a_judgement_unless_it_is_an_exception() -> None:
    """A misspelt name ends the simulated process as it would end a real one."""
    assert is_judged("early ack: p0.1 b'x'")
    assert not is_judged("an exception ended the process: NameError(\"name 'x' is not defined\")")


CODE = "idempotent_consumer/idempotent_consumer/flow.py"
COMMITS = "        answers, again = await self._ledger.commit(asks)\n"
FAULT = "        answers, again = [], []\n"
BOTCHED = "        answers, again = await self._ledger.comit(asks)\n"


@pytest.mark.parametrize(
    ("suite", "new", "judged"),
    [
        (SIMULATION, COMMITS, None),
        (SIMULATION, FAULT, True),
        (SIMULATION, BOTCHED, False),
        ("test_flow", FAULT, True),
        ("test_flow", BOTCHED, False),
        ("test_no_such", COMMITS, False),
    ],
)
def test_a_suite_judges_the_mutated_copy(suite: str, new: str, judged: bool | None) -> None:
    """Unchanged code passes, a fault is judged, and a misspelt name is no more than a crash."""
    mutant = Mutant("commits", "", suite, (Edit(CODE, COMMITS, new),))
    outcome = run_suite(suite, mutant, seeds=2)
    assert (outcome.judged if outcome.sign else None) is judged, outcome


def test_code_that_is_not_of_the_copy_is_never_judged(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"was imported from .*idempotent_consumer"):
        check_origin(tmp_path)
