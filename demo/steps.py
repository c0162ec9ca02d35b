"""The steps of an act, and how a command is run.

When the demo is interrupted while a command runs, it ends the command and waits for its end.
"""

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

_ENDS_WITHIN_S = 15.0


class CannotPlayError(Exception):
    """The demo cannot be played here. The message is one line that says what to do about it."""


class PlayFailedError(Exception):
    """A step or a check has failed. The message is one line, the log of `service` may say why."""

    def __init__(self, message: str, service: str) -> None:
        super().__init__(message)
        self.service = service


@dataclass(frozen=True)
class Step:
    """The command that a user would type, and the function that does the same.

    The function returns when it is done. It raises PlayFailedError, CannotPlayError or OSError.
    """

    typed: str
    run: Callable[[], None]


class CommandFailedError(CannotPlayError):
    """A command has failed. The message ends with the last line of its standard error."""


def run(
    command: Sequence[str],
    env: Mapping[str, str],
    *,
    timeout_s: float | None = None,
    show_progress: bool = False,
) -> str:
    """Run a command and return its standard output.

    With `show_progress`, its standard error is ours. Raises CommandFailedError if it fails, and
    CannotPlayError after `timeout_s`.
    """
    process = subprocess.Popen(
        list(command),
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=None if show_progress else subprocess.PIPE,
        text=True,
        # Ctrl-C reaches only us: the command must have ended before anything is taken down.
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
        raise CommandFailedError(f"{name} failed: {said[-1] if said else 'it does not say why'}")
    return output


def _end(process: subprocess.Popen[str]) -> None:
    """End the command and its child processes: docker runs its plugins as such."""
    for number, timeout_s in ((signal.SIGTERM, _ENDS_WITHIN_S), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=timeout_s)
            return
