"""What a process that measures itself hands back: one line of JSON on its standard output."""

import json
import os
import sys
import tempfile
from pathlib import Path

from harness.process import Child
from harness.servers import REPOSITORY
from harness.wait import eventually

from .progress import NotMeasuredError

_PREFIX = "outcome: "


def tell(**fields: float) -> None:
    """Print the outcome; to be called once, by the process that is measured."""
    print(_PREFIX + json.dumps(fields), flush=True)


def outcome(child: Child, within_s: float) -> dict[str, float]:
    """Wait for the end of a process and return what it told; raises NotMeasuredError."""

    def ended() -> None:
        assert not child.running, f"still runs after {within_s:g} s"

    try:
        eventually(ended, within_s)
    except AssertionError as error:
        raise _not_measured(child, str(error)) from None
    lines = [line for line in child.output().splitlines() if line.startswith(_PREFIX)]
    if child.exit_code or not lines:
        raise _not_measured(child, f"ended with exit code {child.exit_code}")
    fields: dict[str, float] = json.loads(lines[-1].removeprefix(_PREFIX))
    return fields


def run_process(module: str, *arguments: str, within_s: float) -> dict[str, float]:
    """Run a module as a process of its own and return what it told; raises NotMeasuredError."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as logs:
        child = Child([sys.executable, "-m", module, *arguments], env=os.environ, cwd=REPOSITORY,
                      log=Path(logs) / "process.log")
        child.start()
        try:
            return outcome(child, within_s)
        finally:
            if child.running:
                child.kill()


def _not_measured(child: Child, what: str) -> NotMeasuredError:
    return NotMeasuredError(f"{' '.join(child.command[2:])}: {what}:\n{child.output()[-2000:]}")
