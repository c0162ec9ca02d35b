"""Processes beside the consumers; one that measures itself tells a line of JSON in the end."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.process import Child
from harness.servers import REPOSITORY
from harness.wait import eventually

from .progress import NotMeasuredError

_PREFIX = "outcome: "


def tell(**fields: float) -> None:
    """Print the outcome; to be called once, by the process that is measured."""
    print(_PREFIX + json.dumps(fields), flush=True)


@contextmanager
def timed(events: int) -> Iterator[None]:
    """Tell how long the block takes over so many events, and what CPU time each of them costs."""
    started_s, cpu_s = time.monotonic(), time.process_time()
    yield
    took_s = time.monotonic() - started_s
    tell(events_per_s=events / took_s, cpu_us=(time.process_time() - cpu_s) / events * 1e6)


@contextmanager
def run_module(module: str, *arguments: str) -> Iterator[Child]:
    """Run a module as a process of its own; it is killed if it outlasts the block."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as logs:
        child = Child(
            [sys.executable, "-m", module, *arguments],
            env=os.environ,
            cwd=REPOSITORY,
            log=Path(logs) / "process.log",
        )
        child.start()
        try:
            yield child
        finally:
            if child.running:
                child.kill()


def outcome(module: str, *arguments: str, within_s: float) -> dict[str, float]:
    """Run a module to its end and return what it told; raises NotMeasuredError."""
    with run_module(module, *arguments) as child:

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


def _not_measured(child: Child, what: str) -> NotMeasuredError:
    return NotMeasuredError(f"{' '.join(child.command[2:])}: {what}:\n{child.output()[-2000:]}")
