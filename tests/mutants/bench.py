"""The bench: a copy of the code for each mutant, and a process that runs a suite on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from mutants.catalogue import Mutant, mutated
from mutants.probe import Outcome

REPOSITORY = Path(__file__).parents[2]
SEEDS = 1000
"""As many as `make test` simulates: a mutant that survives these survives `make test` as well."""

_COPIED = ("idempotent_consumer", "tests/simulation", "tests/mutants")
_TIMEOUT_S = 300.0


def run_suite(suite: str, mutant: Mutant | None = None, *, seeds: int = SEEDS) -> Outcome:
    """Run a suite on a copy of the code, with a mutant in it; raises OutOfDate."""
    command = [sys.executable, "-m", "mutants.probe", suite, f"--seeds={seeds}"]
    with TemporaryDirectory(prefix="mutant-") as directory:
        root = Path(directory).resolve()
        for name in _COPIED:
            # Compiled code would outlive an edit of the same second and size.
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(REPOSITORY / name, root / name, ignore=ignored)
        shutil.copy(REPOSITORY / "pyproject.toml", root)
        for path, text in (mutated(root, mutant) if mutant else {}).items():
            path.write_text(text)
        paths = (root / "idempotent_consumer", root / "tests", root / "idempotent_consumer/tests")
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
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
                timeout=_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            return Outcome(f"no outcome within {_TIMEOUT_S:.0f} s")
    if ended.returncode:
        said = (ended.stderr or ended.stdout).strip().splitlines() or ["nothing was said"]
        return Outcome(f"the suite itself ended with an error: {said[-1]}")
    return Outcome(**json.loads(ended.stdout.strip().splitlines()[-1]))
