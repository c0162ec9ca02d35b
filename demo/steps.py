"""What is done step by step: the command to type for each step, and how a command is run.

A command is ended, and has ended, also when the demo is interrupted in the middle of it.
"""

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

_ENDS_WITHIN_S = 15.0


class CannotPlayError(Exception):
    """The demo cannot be played here; the message is one line that says what to do about it."""


class StepFailedError(Exception):
    """A step did not work out, through the fault of a service; the message is one line."""

    def __init__(self, message: str, service: str) -> None:
        super().__init__(message)
        self.service = service


@dataclass(frozen=True)
class Step:
    """Something to do: the command to type for it, and the function that does it.

    The function returns when it is done, and raises StepFailedError, CannotPlayError or OSError.
    """

    typed: str
    run: Callable[[], None]


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
