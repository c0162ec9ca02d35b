"""The bench: a copy for each mutant, and a process that runs the suite on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from mutants.catalogue import Mutant, mutate
from mutants.signs import Outcome, Sign

REPOSITORY = Path(__file__).parents[2]
SEEDS = 1000
"""As many as `make test` simulates: what escapes these escapes there as well."""

_COPIED = ("idempotent_consumer", "tests/simulation", "tests/mutants", "pyproject.toml")
_LASTS_AT_MOST_S = 300.0


@dataclass(frozen=True)
class Options:
    """How a suite is run on a copy."""

    seeds: int = SEEDS
    all_seeds: bool = False


def run_suite(suite: str, mutant: Mutant | None, options: Options) -> Outcome:
    """Run a suite on a copy of the code with this mutant in it; raises OutOfDate."""
    with copied() as root:
        if mutant is not None:
            mutate(root, mutant)
        return _probe(root, suite, mutant, options)


@contextmanager
def copied() -> Iterator[Path]:
    """Give a copy of what the suites need."""
    with TemporaryDirectory(prefix="mutant-") as directory:
        root = Path(directory).resolve()
        for name in _COPIED:
            source, target = REPOSITORY / name, root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                # Compiled code would outlive an edit of the same second and size.
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        yield root


def _probe(root: Path, suite: str, mutant: Mutant | None, options: Options) -> Outcome:
    command = [
        sys.executable,
        "-m",
        "mutants.probe",
        "--suite",
        suite,
        "--seeds",
        str(options.seeds),
    ]
    command += ["--mutant", mutant.name] if mutant is not None else []
    command += ["--all-seeds"] if options.all_seeds else []
    first = (root / "idempotent_consumer", root / "tests", root / "idempotent_consumer/tests")
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, first)),
        "PYTHONSAFEPATH": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    try:
        ended = subprocess.run(
            command,
            cwd=root,
            env=env,
            capture_output=True,
            text=True,
            check=False,
            timeout=_LASTS_AT_MOST_S,
        )
    except subprocess.TimeoutExpired:
        return Outcome(Sign(f"no outcome within {_LASTS_AT_MOST_S:.0f} s", judged=False))
    if ended.returncode:
        said = (ended.stderr or ended.stdout).strip().splitlines() or ["nothing was said"]
        return Outcome(Sign(f"the suite itself ended with an error: {said[-1]}", judged=False))
    return Outcome.from_json(ended.stdout.strip().splitlines()[-1])
