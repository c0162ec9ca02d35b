"""The catalogue is up to date with the code, and a crash is no judgement."""

from __future__ import annotations

import ast
import builtins
from pathlib import Path

import pytest

from mutants.bench import REPOSITORY, Options, copied, run_suite
from mutants.catalogue import SIMULATION, Edit, Mutant, OutOfDate, mutate, read_catalogue
from mutants.probe import check_imported
from mutants.signs import Outcome, Sign, is_judgement, of_violation

MUTANTS = read_catalogue()


def test_no_two_mutants_have_one_name() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 10


def test_each_mutant_can_be_put_into_the_code_as_it_is() -> None:
    """Its texts are there once each, and what stands there then is still Python."""
    for mutant in MUTANTS:
        with copied() as root:
            mutate(root, mutant)
            for edit in mutant.edits:
                text = (root / edit.file).read_text()
                ast.parse(text)
                assert text != (REPOSITORY / edit.file).read_text(), mutant.name


def test_each_mutant_names_a_suite_that_is_there() -> None:
    for mutant in MUTANTS:
        for file in mutant.suite.split():
            assert file == SIMULATION or (REPOSITORY / file).is_file(), mutant.name


@pytest.mark.parametrize(("text", "times"), [("one\n", 0), ("two\ntwo\n", 2)])
def test_a_text_that_is_not_there_once_is_said_in_one_line(
    tmp_path: Path, text: str, times: int
) -> None:
    (tmp_path / "code.py").write_text(text)
    with pytest.raises(OutOfDate, match=f"'old' must be .* {times} times in code.py") as raised:
        mutate(tmp_path, Mutant("old", "", SIMULATION, (Edit("code.py", "two", "three"),)))
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
    assert of_violation(7, "early ack: p0.1 b'x'") == Sign("seed 7: early ack: p0.1 b'x'", True)
    crash = "an exception ended the process: NameError(\"name 'x' is not defined\") File"
    assert of_violation(7, crash) == Sign(f"seed 7: {crash}", judged=False)


@pytest.mark.parametrize("sign", [None, Sign("so", judged=True)])
def test_an_outcome_is_read_as_it_was_written(sign: Sign | None) -> None:
    outcome = Outcome(sign, runs=3, broken=1)
    assert Outcome.from_json(outcome.to_json()) == outcome


CODE = "idempotent_consumer/idempotent_consumer/flow.py"
COMMITS = "        answers, again = await self._ledger.commit(asks)\n"
FAULT = "        answers, again = [], []\n"
BOTCHED = "        answers, again = await self._ledger.comit(asks)\n"
UNIT_TESTS = "idempotent_consumer/tests/test_flow.py"


@pytest.mark.parametrize(
    ("suite", "new", "judged"),
    [
        (SIMULATION, COMMITS, None),
        (SIMULATION, FAULT, True),
        (SIMULATION, BOTCHED, False),
        (UNIT_TESTS, FAULT, True),
        (UNIT_TESTS, BOTCHED, False),
        ("idempotent_consumer/tests/test_no_such.py", COMMITS, False),
    ],
)
def test_a_suite_judges_the_mutated_copy(suite: str, new: str, judged: bool | None) -> None:
    """Unchanged code passes, a fault is judged, and what is botched is no more than a crash."""
    mutant = Mutant("commits", "", suite, (Edit(CODE, COMMITS, new),))
    outcome = run_suite(suite, mutant, Options(seeds=2))
    assert (outcome.sign.judged if outcome.sign else None) is judged, outcome


def test_a_module_that_is_not_of_the_copy_is_noticed() -> None:
    """What is installed for the work on this repository must not be what is judged."""
    mutant = Mutant("commits", "", SIMULATION, (Edit(CODE, COMMITS, "        pass\n"),))
    with pytest.raises(RuntimeError, match=r"flow was imported from .*, without 'commits'"):
        check_imported(mutant)
