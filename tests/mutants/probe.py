"""``python -m mutants.probe``: in a copy of the code, run one suite and say what it found.

The last line on standard output is the Outcome.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
from pathlib import Path
from typing import Any

import pytest

from mutants.catalogue import SIMULATION, Mutant, read_catalogue
from mutants.signs import Outcome, Sign, of_exception, of_violation

ROOT = Path(__file__).parents[2]
"""The copy: this very file is part of it."""

_PROJECTS = ("idempotent_consumer", "simulation", "fakes")


def main() -> int:
    """Run the suite that the command line names; 0 where it came to an outcome."""
    parser = argparse.ArgumentParser(prog="mutants.probe", description=__doc__)
    parser.add_argument("--mutant", help="the one that has been put into this copy")
    parser.add_argument("--suite", required=True)
    parser.add_argument("--seeds", type=int, required=True)
    parser.add_argument("--all-seeds", action="store_true", help="go on after the first sign")
    options = parser.parse_args()
    for mutant in read_catalogue():
        if mutant.name == options.mutant:
            check_imported(mutant)
    if options.suite == SIMULATION:
        outcome = run_simulation(options.seeds, options.all_seeds)
    else:
        outcome = run_tests(options.suite.split())
    check_origin()
    print(outcome.to_json())
    return 0


def check_imported(mutant: Mutant) -> None:
    """Raise unless the modules that Python imports are those that hold the mutant.

    The library is installed in the environment as well, from where it is developed.
    """
    for edit in mutant.edits:
        name = edit.file.partition("/")[2].removesuffix(".py").replace("/", ".")
        path = Path(str(importlib.import_module(name).__file__))
        if path != ROOT / edit.file or edit.new not in path.read_text():
            raise RuntimeError(f"{name} was imported from {path}, without {mutant.name!r}")


def check_origin() -> None:
    """Raise unless all that has been imported of this repository comes from the copy."""
    for name, module in sys.modules.items():
        file = getattr(module, "__file__", None)
        if name.partition(".")[0] in _PROJECTS and file and not Path(file).is_relative_to(ROOT):
            raise RuntimeError(f"{name} was imported from {file}")


def run_simulation(seeds: int, all_seeds: bool) -> Outcome:
    """Simulate run after run, up to the first that is judged, or all of them."""
    from simulation.world import simulate

    first: Sign | None = None
    runs = broken = 0
    for seed in range(seeds):
        violations = simulate(seed).run.violations
        runs += 1
        if violations:
            broken += 1
            first = first or of_violation(seed, violations[0])
            if not all_seeds:
                break
    return Outcome(first, runs, broken)


class Watcher:
    """A plugin of pytest that keeps the first failure."""

    def __init__(self) -> None:
        self.first: Sign | None = None

    def pytest_exception_interact(self, node: Any, call: Any) -> None:
        """Take note of an exception, in a test or before it."""
        self.first = self.first or of_exception(node.name, call.excinfo.value)


def run_tests(files: list[str]) -> Outcome:
    """Run files of unit tests up to the first failure."""
    watcher, output = Watcher(), io.StringIO()
    with contextlib.redirect_stdout(output):
        code = pytest.main(
            ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", *files], [watcher]
        )
    if code != pytest.ExitCode.OK and watcher.first is None:
        lines = output.getvalue().strip().splitlines() or ["nothing was said"]
        return Outcome(Sign(f"pytest ended with {code}: {lines[-1]}", judged=False))
    return Outcome(watcher.first)


if __name__ == "__main__":
    sys.exit(main())
