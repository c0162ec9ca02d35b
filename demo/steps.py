"""Run a command to its end, also when the demo is interrupted in the middle of it."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress

from demo.stage import CannotPlayError

_ENDS_WITHIN_S = 15.0


class CommandFailedError(CannotPlayError):
    """The command has failed; `said` is the last line of its standard error."""

    def __init__(self, name: str, said: str) -> None:
        super().__init__(f"{name} failed: {said}")
        self.said = said


def run(
    command: Sequence[str],
    env: Mapping[str, str],
    *,
    timeout_s: float | None = None,
    show_progress: bool = False,
) -> str:
    """Run a command and return its standard output.

    `show_progress` lets it write its progress to our standard error. Raises
    CommandFailedError if it fails, CannotPlayError after `timeout_s`.
    """
    process = subprocess.Popen(
        list(command),
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=None if show_progress else subprocess.PIPE,
        text=True,
        # A Ctrl-C is for us: we then end it, and see it end, before anything is taken down.
        start_new_session=True,
    )
    name = " ".join(command[:2])
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except BaseException as error:
        _end(process)
        if isinstance(error, subprocess.TimeoutExpired):
            raise CannotPlayError(f"{name} had not ended after {timeout_s:g} s") from None
        raise
    if process.returncode != 0:
        said = [line.strip() for line in (errors or output).splitlines() if line.strip()]
        raise CommandFailedError(name, said[-1] if said else "it does not say why")
    return output


def _end(process: subprocess.Popen[str]) -> None:
    """End the command and what it has started: docker runs its plugins as processes."""
    for number, timeout_s in ((signal.SIGTERM, _ENDS_WITHIN_S), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=timeout_s)
            return
