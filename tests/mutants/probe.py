"""``python -m mutants.probe``: run one suite on a copy of the code, in the working directory.

The last line on standard output is its Outcome, as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from mutants.catalogue import SIMULATION, suite_file

_PROJECTS = ("idempotent_consumer", "simulation", "fakes")


@dataclass(frozen=True)
class Outcome:
    """What a suite has found: its first sign of a fault, empty if there is none.

    A ``judged`` sign is a violation or a failed assertion. Any other exception proves nothing: a
    misspelt name raises one as well.
    """

    sign: str = ""
    judged: bool = False


def main() -> int:
    """Run the suite that the command line names; return 0 if it came to an outcome."""
    parser = argparse.ArgumentParser(prog="mutants.probe", description=__doc__)
    parser.add_argument("suite")
    parser.add_argument("--seeds", type=int, required=True)
    options = parser.parse_args()
    if options.suite == SIMULATION:
        outcome = run_simulation(options.seeds)
    else:
        outcome = run_tests(suite_file(options.suite))
    check_origin(Path.cwd())
    print(json.dumps(asdict(outcome)))
    return 0


def check_origin(root: Path) -> None:
    """Raise RuntimeError unless this repository's imported modules all come from the copy.

    The virtual environment has the library installed as well, from its working tree.
    """
    for name, module in sys.modules.items():
        file = getattr(module, "__file__", None)
        if name.partition(".")[0] in _PROJECTS and file and not Path(file).is_relative_to(root):
            raise RuntimeError(f"{name} was imported from {file}")


def run_simulation(seeds: int) -> Outcome:
    """Simulate run after run, up to the first with a violation."""
    from simulation.world import simulate

    for seed in range(seeds):
        if violations := simulate(seed).run.violations:
            first = violations[0]
            return Outcome(f"seed {seed}: {_one_line(first)}", is_judged(first))
    return Outcome()


def is_judged(violation: str) -> bool:
    """Return whether a simulated run was judged, and did not end by the library's exception."""
    return not violation.startswith("an exception ended the process:")


class Watcher:
    """A plugin of pytest that keeps the first failure."""

    def __init__(self) -> None:
        self.first: Outcome | None = None

    def pytest_exception_interact(self, node: Any, call: Any) -> None:
        """Take note of an exception, in a test or before it."""
        error = call.excinfo.value
        text = _one_line(str(error) or type(error).__name__)
        self.first = self.first or Outcome(f"{node.name}: {text}", is_judgement(error))


def is_judgement(error: BaseException) -> bool:
    """Return whether a test failed by an assertion, and not by any other exception."""
    if isinstance(error, BaseExceptionGroup):  # Hypothesis raises one for several failures.
        return all(map(is_judgement, error.exceptions))
    # pytest.fail, and pytest.raises without an exception, raise pytest's own Failed.
    return isinstance(error, AssertionError) or type(error).__name__ == "Failed"


def run_tests(file: str) -> Outcome:
    """Run a file of unit tests up to the first failure."""
    watcher, output = Watcher(), io.StringIO()
    arguments = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", file]
    with contextlib.redirect_stdout(output):
        code = pytest.main(arguments, [watcher])
    if code == pytest.ExitCode.OK or watcher.first:
        return watcher.first or Outcome()
    lines = output.getvalue().strip().splitlines() or ["nothing was said"]
    return Outcome(f"pytest ended with {code}: {lines[-1]}")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]


if __name__ == "__main__":
    sys.exit(main())
