"""One child process: its log, its signals, its end."""

import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


class Child:
    """A command that can be started, signalled by its process id, and started again.

    Output of every start is appended to `log`. `env` is the whole environment, not an addition.
    """

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], cwd: Path, log: Path
    ) -> None:
        self.command = list(command)
        self.env = dict(env)
        self.cwd = cwd
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id; raises RuntimeError before the first start."""
        return self._started().pid

    @property
    def exit_code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs or before it started."""
        return None if self._process is None else self._process.poll()

    @property
    def running(self) -> bool:
        """Whether the process exists (a frozen one does)."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the command; raises OSError if that is impossible."""
        if self.running:
            raise RuntimeError(f"{self.command[0]} runs already, as process {self.pid}")
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                self.command,
                env=self.env,
                cwd=self.cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C on the terminal is for us: we then end the child in order.
                start_new_session=True,
            )

    def signal(self, number: int) -> None:
        """Send a signal; does nothing to a process that has ended."""
        self._started().send_signal(number)

    def pause(self) -> None:
        """Freeze the process with SIGSTOP; returns when the kernel has stopped it."""
        self.signal(signal.SIGSTOP)
        # A stop is delivered asynchronously: without this a frozen process could still send.
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Let a frozen process go on."""
        self.signal(signal.SIGCONT)

    def terminate(self, timeout_s: float) -> int:
        """Ask it to end (SIGTERM) and return its exit code.

        Kills it after `timeout_s` and raises TimeoutError.
        """
        process = self._started()
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)  # a frozen process would never see the request
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(
                f"{self.command[0]} had not ended {timeout_s:g} s after SIGTERM"
            ) from None

    def kill(self) -> None:
        """End it at once (SIGKILL) and wait until it is gone."""
        process = self._started()
        process.kill()
        process.wait()

    def output(self) -> str:
        """Everything it has written so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError(f"{self.command[0]} has not been started")
        return self._process


def resident_bytes(pid: int) -> int:
    """Return a process's resident size (proc(5), VmRSS)."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    if found is None:
        raise ProcessLookupError(f"process {pid} has no resident size: it has ended")
    return 1024 * int(found[1])
